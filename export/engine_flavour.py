"""What differs between `tensorrt` 10.13 to 11.x and `tensorrt_rtx` 1.x when an engine is built.

Which flags tensorrt_rtx 1.7.1.116 takes ahead of time, on a machine without a GPU, tried one by one on a small U-Net:

    taken      REFIT_INDIVIDUAL with no weights marked, WEIGHT_STREAMING, optimization levels 0 to 5, tiling levels,
               a workspace limit, several profiles, several compute capabilities; TF32, DEBUG, STRICT_NANS,
               SPARSE_WEIGHTS, DIRECT_IO, DISTRIBUTIVE_INDEPENDENCE, REQUIRE_USER_ALLOCATION
    refused    REFIT, REFIT_IDENTICAL, STRIP_PLAN, and REFIT_INDIVIDUAL as soon as a weight is marked: such a build
               allocates memory on a GPU ("graph_jit.cpp: CHECK(status == CUDA_SUCCESS) failed", of cuMemAlloc);
               VERSION_COMPATIBLE: "Unable to load library: libnvinfer_lean.so.1", which the wheels do not hold;
               the runtime platform WINDOWS_AMD64, whose engines are those of Linux anyway
    ignored    the hardware compatibility level ("unsupported in TensorRT-RTX"), the timing cache (its calls are no-ops)

What is refused or ignored there is refused here, before the build and with what to do instead; but for STRIP_PLAN,
because `engine_thinning` leaves weights out of the file without the builder's help. Refused is also REFIT in full
TensorRT 11.3, whose release notes state that it may drop the bias of a matrix product, refitted or not; REFIT_IDENTICAL
and REFIT_INDIVIDUAL are not named there, and 11.4 is without the note.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import BuildError, UsageError
from latentrt.runtime.machine import probe_machine
from latentrt.runtime.manifest import write_atomic

from .engine_config import EngineConfig

# Full layer information for the engine inspector; it names layers and changes no kernel.
VERBOSITY = "DETAILED"
# Builds ahead of time, for GPUs that need not be here; full TensorRT builds for the one that it runs on.
_RTX = "tensorrt_rtx"


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that can be used."""
    return bool(probe_machine().gpus)


def check_supported(trt: Any, config: EngineConfig, *, gpu: Callable[[], bool] = has_gpu) -> None:
    """Refuse, before anything is built, what the flavour cannot do.

    Raises:
        UsageError: says what to do instead.
    """
    name = f"{trt.__name__} {trt.__version__}"
    levels = [("tiling", config.tiling, "TilingOptimizationLevel")]
    if trt.__name__ == _RTX:
        _check_ahead_of_time(name, config, gpu)
    else:
        if config.refit == "all" and trt.__version__.startswith("11.3."):
            raise UsageError(
                f"refit: expected another version than {name} for all weights: it may drop the bias of a matrix "
                "product. Use --refit lora, or another version."
            )
        levels.append(("hardware-compatibility", config.hardware_compatibility, "HardwareCompatibilityLevel"))
    for option, level, enum in levels:
        if level != "none" and not hasattr(getattr(trt, enum, None), level.upper()):
            raise UsageError(f"{option}: expected a level that {name} has, got {level}. Leave it out.")
    stripping = config.strip and strips_weights(trt)
    flags = (("weight-streaming", config.weight_streaming, "WEIGHT_STREAMING"), ("strip", stripping, "STRIP_PLAN"))
    for option, asked, flag in flags:
        if asked and not hasattr(trt.BuilderFlag, flag):
            raise UsageError(f"{option}: expected a TensorRT that has it, got {name}. Leave it out or upgrade.")


def _check_ahead_of_time(name: str, config: EngineConfig, gpu: Callable[[], bool]) -> None:
    if config.version_compatible:
        raise UsageError(
            f"version-compatible: expected full TensorRT, because {name} comes without the lean runtime that such "
            "engines carry. Leave it out: an engine is built again in about a minute after an upgrade."
        )
    if config.hardware_compatibility != "none":
        raise UsageError(
            f"hardware-compatibility: expected full TensorRT, because {name} ignores it. Name the GPUs instead: "
            "--target sm86+sm89+sm120 builds one engine for all of them."
        )
    if config.timing_cache is not None:
        raise UsageError(
            f"timing-cache: expected full TensorRT, because {name} takes no timings when it builds. Leave it out."
        )
    if config.refit != "none" and not gpu():
        raise UsageError(
            f"refit: expected a GPU, because {name} prepares on one how weights are "
            "put in place, and none can be used here. Build on a machine with a GPU, or without this option."
        )


def strips_weights(trt: Any) -> bool:
    """Whether the builder leaves weights out itself; ahead of time it cannot without a GPU, and `thin_engine` does."""
    return bool(trt.__name__ != _RTX)


def network_flags(trt: Any) -> int:
    """The flags a network is made with: strong typing has to be asked for in TensorRT 10 and is always on since."""
    if trt.__name__ == "tensorrt" and trt.__version__.startswith("10."):
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0


def configure(trt: Any, builder: Any, settings: Any, config: EngineConfig) -> None:
    """Set a builder's config.

    Args:
        settings: an IBuilderConfig.

    Raises:
        BuildError: the builder refuses a target or the shapes.
    """
    component, flags = config.component, trt.BuilderFlag
    settings.profiling_verbosity = getattr(trt.ProfilingVerbosity, VERBOSITY)
    if config.workspace_mib is not None:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_mib << 20)
    if config.optimization_level is not None:
        settings.builder_optimization_level = config.optimization_level
    if config.tiling != "none":
        settings.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, config.tiling.upper())
    if config.hardware_compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, config.hardware_compatibility.upper())
        settings.hardware_compatibility_level = level
    refit = {"none": "REFIT_IDENTICAL" if config.strip else None, "individual": "REFIT_INDIVIDUAL", "all": "REFIT"}
    wanted = {
        refit[config.refit]: True,
        "STRIP_PLAN": config.strip,
        "VERSION_COMPATIBLE": config.version_compatible,
        "WEIGHT_STREAMING": config.weight_streaming,
        # Else the runtime may allocate memory of its own in a call, and the call cannot be recorded in a CUDA graph.
        "REQUIRE_USER_ALLOCATION": trt.__name__ == _RTX,
    }
    for flag, asked in wanted.items():
        if flag is not None and asked:
            settings.set_flag(getattr(flags, flag))
    if trt.__name__ == _RTX:
        _set_targets(trt, settings, config)
    for shapes in config.profiles:
        profile = builder.create_optimization_profile()
        for name, held in shapes.items():
            profile.set_shape(name, held.min, held.opt, held.max)
        if settings.add_optimization_profile(profile) < 0:
            raise BuildError(f"{component}: the builder refused the shapes {dict(shapes)}.")


def _set_targets(trt: Any, settings: Any, config: EngineConfig) -> None:
    settings.num_compute_capabilities = len(config.targets)
    for index, sm in enumerate(config.targets):
        if not settings.set_compute_capability(getattr(trt.ComputeCapability, sm.upper()), index):
            raise BuildError(f"{config.component}: {trt.__name__} {trt.__version__} refused the target {sm}.")


def read_timings(settings: Any, path: Path | None) -> None:
    """Give the builder the kernel timings of earlier builds, so that it measures only what is new.

    Those of another GPU or version are of no use; the build begins anew then.
    """
    if path is not None:
        held = path.read_bytes() if path.is_file() else b""
        timings = settings.create_timing_cache(held)
        if timings is None or not settings.set_timing_cache(timings, ignore_mismatch=False):
            settings.set_timing_cache(settings.create_timing_cache(b""), ignore_mismatch=False)


def write_timings(settings: Any, path: Path | None) -> None:
    """Keep the kernel timings for the next build.

    Raises:
        OSError: they cannot be written.
    """
    if path is not None:
        timings = settings.get_timing_cache()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, bytes(timings.serialize()))


def set_flags(trt: Any, settings: Any) -> tuple[str, ...]:
    """The names of all builder flags that are set, TensorRT's defaults included."""
    members = trt.BuilderFlag.__members__.items()
    return tuple(sorted(name for name, flag in members if settings.get_flag(flag)))
