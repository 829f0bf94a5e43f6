"""All that decides what engine comes out of a graph: one frozen value, whose content goes into the engine's key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.engine_sidecar import ShapeProfile
from latentrt.runtime.errors import UsageError

from .engine_targets import Targets

Profiles = tuple[Mapping[str, ShapeProfile], ...]

# What a command line may say; which of it a flavour can do, `engine_flavour` knows.
REFIT_MODES = ("none", "individual", "all")
HARDWARE_LEVELS = ("none", "ampere_plus", "same_compute_capability")
TILING_LEVELS = ("none", "fast", "moderate", "full")
OPTIMIZATION_LEVELS = range(6)


@dataclass(frozen=True)
class EngineConfig:
    """What to build of a graph.

    Attributes:
        component, precision: for messages, and to hold the engine to its name.
        profiles: shapes by input, one mapping for each optimization profile.
        targets: compute capabilities that the engine is to run on.
        workspace_mib: limit of the builder's scratch memory; None leaves TensorRT's own, the whole device.
        optimization_level: 0 (quick build) to 5 (quick engine); None leaves TensorRT's own.
        refit: whose weights may be replaced in a loaded engine: `none`, `individual` (of `refittable`) or `all`.
        refittable: names of initializers whose weights may be replaced, with `individual`.
        strip: leave the weights out of the engine's file; the graph's are put in when it is loaded.
        version_compatible: later versions of TensorRT can load the engine.
        hardware_compatibility: `none`, `ampere_plus` (any GPU from Ampere on) or `same_compute_capability`.
        tiling: how hard to look for ways to keep a subgraph in the L2 cache: `none`, `fast`, `moderate` or `full`.
        weight_streaming: the engine may keep a part of its weights in the host's memory when it runs.
        narrow: if the memory does not suffice, build for fewer sizes rather than not at all.
        timing_cache: file of kernel timings to read and extend, or None. It changes how long a build takes, so it is
            no part of `made_from`.

    Raises:
        UsageError: a value is none of these, or two exclude each other.
    """

    component: str
    precision: str
    profiles: Profiles
    targets: Targets
    workspace_mib: int | None = None
    optimization_level: int | None = None
    refit: str = "none"
    refittable: tuple[str, ...] = ()
    strip: bool = False
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    tiling: str = "none"
    weight_streaming: bool = False
    narrow: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.workspace_mib is not None and not self.workspace_mib >= 1:
            raise UsageError(f"workspace: expected at least 1 MiB, got {self.workspace_mib}.")
        if self.optimization_level is not None and self.optimization_level not in OPTIMIZATION_LEVELS:
            raise UsageError(f"level: expected 0 (quick build) to 5 (quick engine), got {self.optimization_level}.")
        for name, value, known in (
            ("refit", self.refit, REFIT_MODES),
            ("hardware-compatibility", self.hardware_compatibility, HARDWARE_LEVELS),
            ("tiling", self.tiling, TILING_LEVELS),
        ):
            if value not in known:
                raise UsageError(f"{name}: expected {', '.join(known[:-1])} or {known[-1]}, got {value!r}.")
        if not self.profiles:
            raise UsageError(f"{self.component}: expected at least one shape profile, got none.")
        if self.refit == "individual" and not self.refittable:
            raise UsageError(f"{self.component}: expected weights that may be refitted one by one, got none.")

    @property
    def compatibility(self) -> tuple[str, ...]:
        """What lets other versions or GPUs load the engine, as a sidecar states it."""
        version = ("version_compatible",) if self.version_compatible else ()
        hardware = () if self.hardware_compatibility == "none" else (self.hardware_compatibility,)
        return (*version, *hardware)

    def made_from(self) -> dict[str, Any]:
        """What goes into the engine's key, as JSON gives it back."""
        options = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("component", "precision", "profiles", "targets", "timing_cache")
        }
        content = {
            "component": self.component,
            "precision": self.precision,
            "targets": self.targets,
            # A mapping, so that a change is named to the profile, input and bound.
            "profiles": {
                str(index): {name: dataclasses.asdict(shapes) for name, shapes in profile.items()}
                for index, profile in enumerate(self.profiles)
            },
            "options": options,
        }
        found: dict[str, Any] = json.loads(json.dumps(content))
        return found
