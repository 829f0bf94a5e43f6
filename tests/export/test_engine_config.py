from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from latentrt.export.engine_config import EngineConfig
from latentrt.runtime.engine_sidecar import ShapeProfile
from latentrt.runtime.errors import UsageError
from latentrt.runtime.manifest import changed_inputs

CONFIG = EngineConfig("unet", "fp16", ({"x": ShapeProfile((1,), (1,), (2,))},), ("sm86", "sm89"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"precision": "int8"}, "precision"),
        ({"targets": ("sm89",)}, "targets"),
        ({"profiles": ({"x": ShapeProfile((1,), (1,), (4,))},)}, "profiles.0.x.max"),
        ({"profiles": (*CONFIG.profiles, {"x": ShapeProfile((3,), (3,), (3,))})}, "profiles.1"),
        ({"workspace_mib": 5}, "options.workspace_mib"),
        ({"optimization_level": 5}, "options.optimization_level"),
        ({"refit": "all"}, "options.refit"),
        ({"refittable": ("w",)}, "options.refittable"),
        ({"strip": True}, "options.strip"),
        ({"version_compatible": True}, "options.version_compatible"),
        ({"hardware_compatibility": "ampere_plus"}, "options.hardware_compatibility"),
        ({"tiling": "full"}, "options.tiling"),
        ({"weight_streaming": True}, "options.weight_streaming"),
        ({"narrow": True}, "options.narrow"),
    ],
)
def test_a_change_is_part_of_the_key_and_named(changes: dict[str, Any], named: str) -> None:
    assert changed_inputs(CONFIG.made_from(), dataclasses.replace(CONFIG, **changes).made_from()) == [named]


def test_where_timings_lie_changes_no_engine_and_the_key_is_json() -> None:
    made_from = CONFIG.made_from()
    assert dataclasses.replace(CONFIG, timing_cache=Path("elsewhere")).made_from() == made_from
    assert json.loads(json.dumps(made_from)) == made_from


def test_compatibility_is_said_in_words() -> None:
    assert CONFIG.compatibility == ()
    wide = dataclasses.replace(CONFIG, version_compatible=True, hardware_compatibility="ampere_plus")
    assert wide.compatibility == ("version_compatible", "ampere_plus")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workspace_mib": 0}, "workspace: expected at least 1 MiB, got 0"),
        ({"optimization_level": 6}, r"level: expected 0 \(quick build\) to 5"),
        ({"refit": "lora"}, "refit: expected none, individual or all, got 'lora'"),
        ({"refit": "individual"}, "unet: expected weights that may be refitted one by one, got none"),
        ({"hardware_compatibility": "hopper"}, "hardware-compatibility: expected none, ampere_plus or same_compute"),
        ({"tiling": "max"}, "tiling: expected none, fast, moderate or full"),
        ({"profiles": ()}, "unet: expected at least one shape profile"),
    ],
)
def test_values_that_cannot_be_are_usage_errors(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(CONFIG, **changes)
