"""What to try after a build that ran out of memory or found no kernel.

Each step gives up a little more of what the engine could have been: scratch memory for the kernels, time spent looking
for fast ones, and last, where the user allows it, sizes that it would have served. A failure for want of workspace goes
the other way and lifts the limit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from latentrt.runtime.engine_sidecar import ShapeProfile
from latentrt.runtime.errors import BuildError

from .engine_config import EngineConfig, Profiles
from .engine_messages import Kind

# MiB. TensorRT's own limit is the whole device; what Stable Diffusion's kernels ask for at 512 pixels is below 1 GiB.
WORKSPACES = (4096, 512)
# TensorRT's own is 3. Level 2 tries fewer kernels for each layer, level 0 takes the first that works.
LEVELS = (2, 0)
_OWN_LEVEL = 3
# Each may take minutes.
MOST_ATTEMPTS = 6


class FailedBuildError(BuildError):
    """A build gave no engine.

    Attributes:
        kind: what ran out.
        seconds: how long it took to fail.
    """

    def __init__(self, message: str, kind: Kind, seconds: float) -> None:
        super().__init__(message)
        self.kind, self.seconds = kind, seconds


def next_config(config: EngineConfig, kind: Kind, tried: Sequence[EngineConfig]) -> EngineConfig | None:
    """The next thing to try after `config` failed, or None if nothing is left.

    Args:
        kind: what ran out.
        tried: what has failed so far, `config` included, so that nothing is tried twice.
    """
    if len(tried) >= MOST_ATTEMPTS:
        return None
    return next((candidate for candidate in _candidates(config, kind) if candidate not in tried), None)


def describe_change(before: EngineConfig, after: EngineConfig) -> str:
    """What differs between two attempts, for people: `workspace 2048 MiB`, `level 2`, `fewer sizes`."""
    words = []
    if after.workspace_mib != before.workspace_mib:
        words.append(f"workspace {after.workspace_mib or 'without a limit'}{' MiB' if after.workspace_mib else ''}")
    if after.optimization_level != before.optimization_level:
        words.append(f"level {after.optimization_level}")
    if after.profiles != before.profiles:
        words.append("fewer sizes")
    return ", ".join(words)


def settings_of(config: EngineConfig) -> dict[str, Any]:
    """What the ladder may change, as it is recorded."""
    return {
        "workspace_mib": config.workspace_mib,
        "optimization_level": config.optimization_level,
        "profiles": len(config.profiles),
    }


def _candidates(config: EngineConfig, kind: Kind) -> Iterator[EngineConfig]:
    workspace = config.workspace_mib
    if kind == "memory":
        smaller = [size for size in WORKSPACES if workspace is None or size < workspace]
        yield from (dataclasses.replace(config, workspace_mib=size) for size in smaller[:1])
    elif kind in ("workspace", "kernels") and workspace is not None:
        larger = [size for size in reversed(WORKSPACES) if size > workspace]
        yield from (dataclasses.replace(config, workspace_mib=size) for size in (*larger, None))
    if kind == "other":
        return
    level = _OWN_LEVEL if config.optimization_level is None else config.optimization_level
    yield from (dataclasses.replace(config, optimization_level=lower) for lower in LEVELS if lower < level)
    if config.narrow and (narrower := _narrower(config.profiles)) is not None:
        yield dataclasses.replace(config, profiles=narrower)


def _narrower(profiles: Profiles) -> Profiles | None:
    """Without the largest of several profiles; a single one up to its usual shapes only."""
    if len(profiles) > 1:
        largest = max(profiles, key=lambda profile: sum(math.prod(shapes.max) for shapes in profile.values()))
        return tuple(profile for profile in profiles if profile is not largest)
    (profile,) = profiles
    usual = {name: ShapeProfile(shapes.min, shapes.opt, shapes.opt) for name, shapes in profile.items()}
    return None if usual == profile else (usual,)
