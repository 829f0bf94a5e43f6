from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from latentrt.export.engine_config import EngineConfig
from latentrt.export.engine_messages import Kind
from latentrt.export.engine_retry import MOST_ATTEMPTS, describe_change, next_config
from latentrt.runtime.engine_sidecar import ShapeProfile


def profile(rows: int, usual: int | None = None, least: int | None = None) -> dict[str, ShapeProfile]:
    return {"sample": ShapeProfile(*[(count, 4, 8, 8) for count in (least or rows, usual or rows, rows)])}


CONFIG = EngineConfig("unet", "fp16", (profile(2), profile(8), profile(1)), ("sm89",))


def walk(config: EngineConfig, kind: Kind) -> list[str]:
    """What is changed from attempt to attempt if each fails in the same way."""
    tried, steps = [config], []
    while (following := next_config(config, kind, tried)) is not None:
        steps.append(describe_change(config, following))
        config = following
        tried.append(config)
    return steps


def test_without_memory_scratch_goes_first_then_the_search_for_kernels() -> None:
    assert walk(CONFIG, "memory") == ["workspace 4096 MiB", "workspace 512 MiB", "level 2", "level 0"]
    low = dataclasses.replace(CONFIG, workspace_mib=600, optimization_level=1)
    assert walk(low, "memory") == ["workspace 512 MiB", "level 0"]


@pytest.mark.parametrize("kind", ["workspace", "kernels"])
def test_too_tight_a_workspace_is_lifted(kind: Kind) -> None:
    tight = dataclasses.replace(CONFIG, workspace_mib=64)
    assert walk(tight, kind)[:3] == ["workspace 512 MiB", "workspace 4096 MiB", "workspace without a limit"]
    assert walk(CONFIG, kind) == ["level 2", "level 0"]


def test_sizes_are_given_up_only_where_that_is_allowed_and_the_largest_first() -> None:
    last = dataclasses.replace(CONFIG, workspace_mib=512, optimization_level=0, narrow=True)
    assert walk(last, "memory") == ["fewer sizes", "fewer sizes"]
    narrower = next_config(last, "memory", [last])
    assert narrower is not None
    assert narrower.profiles == (profile(2), profile(1))
    ranged = dataclasses.replace(last, profiles=(profile(8, usual=4, least=1),))
    usual = next_config(ranged, "memory", [ranged])
    assert usual is not None
    assert usual.profiles == (profile(4, least=1),)
    assert next_config(usual, "memory", [ranged, usual]) is None


def test_failures_that_pull_both_ways_repeat_nothing() -> None:
    tried = [dataclasses.replace(CONFIG, workspace_mib=512)]
    kinds: tuple[Kind, ...] = ("workspace", "memory", "workspace", "memory")
    for kind in kinds:
        following = next_config(tried[-1], kind, tried)
        assert following is not None
        assert following not in tried
        tried.append(following)


def test_what_a_retry_cannot_change_is_not_retried_and_there_is_an_end() -> None:
    assert walk(CONFIG, "other") == []
    many: Any = [dataclasses.replace(CONFIG, workspace_mib=size) for size in range(1, MOST_ATTEMPTS + 1)]
    assert next_config(many[-1], "memory", many) is None
