"""The configs that were published with the families of Stable Diffusion, for files that hold weights alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

Configs = Mapping[str, Mapping[str, Any]]


@cache
def _families() -> dict[str, Configs]:
    return dict(json.loads((files(__package__) / "published_configs.json").read_text("utf-8")))


def published_configs(family: str) -> Configs:
    """A family's configs by component, with `model_index` and `scheduler`; shared, so not to be changed.

    Args:
        family: sd1 (1.5), sd2 (2.1, of 768 pixels), sdxl or refiner.
    """
    return _families()[family]
