"""The seam between the two libraries, on a stand-in of each that records what it is given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.export.engine_config import EngineConfig
from latentrt.export.engine_flavour import (
    check_supported,
    configure,
    network_flags,
    read_timings,
    set_flags,
    write_timings,
)
from latentrt.runtime.engine_sidecar import ShapeProfile
from latentrt.runtime.errors import BuildError, UsageError

CONFIG = EngineConfig("unet", "fp16", ({"x": ShapeProfile((1,), (1,), (2,))},), ("sm86", "sm89"))
REFITS = ("REFIT", "REFIT_INDIVIDUAL", "REFIT_IDENTICAL")
FLAGS = (*REFITS, "STRIP_PLAN", "VERSION_COMPATIBLE", "WEIGHT_STREAMING", "TF32")


class Enum:
    def __init__(self, *names: str) -> None:
        self.__members__ = {name: name for name in names}
        self.__dict__.update(self.__members__)


def library(name: str, version: str, **changes: Any) -> Any:
    parts = {
        "BuilderFlag": Enum(*FLAGS),
        "ProfilingVerbosity": Enum("DETAILED"),
        "MemoryPoolType": Enum("WORKSPACE"),
        "TilingOptimizationLevel": Enum("NONE", "FAST", "MODERATE", "FULL"),
        "HardwareCompatibilityLevel": Enum("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"),
        "ComputeCapability": Enum("SM86", "SM89"),
        "NetworkDefinitionCreationFlag": SimpleNamespace(STRONGLY_TYPED=1),
    }
    return SimpleNamespace(__name__=name, __version__=version, **{**parts, **changes})


FULL = library("tensorrt", "11.4.0.1")
RTX = library("tensorrt_rtx", "1.7.1.116", BuilderFlag=Enum(*FLAGS, "REQUIRE_USER_ALLOCATION"))


class Settings:
    """An IBuilderConfig that keeps what it is told."""

    def __init__(self, *, takes: bool = True) -> None:
        self.flags, self.takes = {"TF32"}, takes
        self.pools: dict[str, int] = {}
        self.targets: dict[int, str] = {}
        self.profiles: list[Any] = []
        self.timings: Any = None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def get_flag(self, flag: str) -> bool:
        return flag in self.flags

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.pools[pool] = size

    def set_compute_capability(self, sm: str, index: int) -> bool:
        self.targets[index] = sm
        return self.takes

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1 if self.takes else -1

    def create_timing_cache(self, content: bytes) -> Any:
        return None if content == b"damaged" else SimpleNamespace(content=content, serialize=lambda: content + b"+new")

    def set_timing_cache(self, cache: Any, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content == b"another GPU":
            return False
        self.timings = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.timings


class Builder:
    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *bounds: shapes.__setitem__(name, bounds))


def configured(trt: Any, config: EngineConfig) -> Any:
    settings = Settings()
    configure(trt, Builder(), settings, config)
    return settings


@pytest.mark.parametrize(
    ("version", "flags"), [("10.13.3.9", 1 << 1), ("10.16.1.1", 1 << 1), ("11.0.0.1", 0), ("11.4.0.1", 0)]
)
def test_strong_typing_is_asked_for_where_it_is_a_choice(version: str, flags: int) -> None:
    assert network_flags(library("tensorrt", version)) == flags
    assert network_flags(library("tensorrt_rtx", "1.7.1.116")) == 0


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, set()),
        ({"refit": "all"}, {"REFIT"}),
        ({"refit": "individual", "refittable": ("w",)}, {"REFIT_INDIVIDUAL"}),
        ({"strip": True}, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        ({"strip": True, "refit": "all"}, {"STRIP_PLAN", "REFIT"}),
        ({"version_compatible": True, "weight_streaming": True}, {"VERSION_COMPATIBLE", "WEIGHT_STREAMING"}),
    ],
)
def test_options_become_flags(changes: dict[str, Any], flags: set[str]) -> None:
    settings = configured(FULL, dataclasses.replace(CONFIG, **changes))
    assert set(set_flags(FULL, settings)) == {"TF32", *flags}


def test_levels_memory_and_profiles_are_set_and_left_alone_where_nothing_is_asked() -> None:
    asked = dataclasses.replace(
        CONFIG, workspace_mib=3, optimization_level=5, tiling="fast", hardware_compatibility="ampere_plus"
    )
    settings = configured(FULL, asked)
    assert settings.pools == {"WORKSPACE": 3 << 20}
    assert settings.builder_optimization_level == 5
    assert (settings.tiling_optimization_level, settings.hardware_compatibility_level) == ("FAST", "AMPERE_PLUS")
    assert settings.profiles == [{"x": ((1,), (1,), (2,))}]
    assert settings.targets == {}  # full TensorRT builds for the GPU that is here
    plain = configured(RTX, CONFIG)
    assert plain.pools == {}
    for name in ("builder_optimization_level", "tiling_optimization_level", "hardware_compatibility_level"):
        assert not hasattr(plain, name)
    assert (plain.num_compute_capabilities, plain.targets) == (2, {0: "SM86", 1: "SM89"})
    assert plain.flags - settings.flags == {"REQUIRE_USER_ALLOCATION"}  # without it no call can be recorded


def test_a_builder_that_refuses_says_what() -> None:
    with pytest.raises(BuildError, match="refused the target sm86"):
        configure(RTX, Builder(), Settings(takes=False), CONFIG)
    with pytest.raises(BuildError, match="refused the shapes"):
        configure(FULL, Builder(), Settings(takes=False), CONFIG)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version_compatible": True}, "version-compatible: expected full TensorRT"),
        ({"hardware_compatibility": "ampere_plus"}, "--target sm86\\+sm89\\+sm120"),
        ({"timing_cache": Path("timings")}, "timing-cache: expected full TensorRT"),
        ({"refit": "all"}, "refit: expected a GPU"),
        ({"refit": "individual", "refittable": ("w",)}, "refit: expected a GPU"),
    ],
)
def test_what_ahead_of_time_builds_cannot_do_is_refused_before_them(changes: dict[str, Any], said: str) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UsageError, match=said):
        check_supported(RTX, config, gpu=lambda: False)
    check_supported(FULL, config, gpu=lambda: False)
    if "expected a GPU" in said:
        check_supported(RTX, config, gpu=lambda: True)


def test_what_a_version_does_not_have_is_refused() -> None:
    old = library("tensorrt", "10.13.0.1", TilingOptimizationLevel=None, BuilderFlag=Enum("REFIT"))
    for changes in ({"tiling": "full"}, {"weight_streaming": True}, {"strip": True}):
        with pytest.raises(UsageError, match=r"tensorrt 10\.13\.0\.1"):
            check_supported(old, dataclasses.replace(CONFIG, **changes))
        check_supported(FULL, dataclasses.replace(CONFIG, **changes))


def test_a_version_whose_refit_is_wrong_is_refused() -> None:
    wrong = library("tensorrt", "11.3.0.5")
    with pytest.raises(UsageError, match=r"refit: expected another version than tensorrt 11\.3\.0\.5"):
        check_supported(wrong, dataclasses.replace(CONFIG, refit="all"))
    check_supported(wrong, dataclasses.replace(CONFIG, refit="individual", refittable=("w",)))
    check_supported(wrong, dataclasses.replace(CONFIG, strip=True))
    check_supported(FULL, dataclasses.replace(CONFIG, refit="all"))


def test_timings_are_read_and_kept(tmp_path: Path) -> None:
    settings, path = Settings(), tmp_path / "deep" / "timings"
    for expected in (b"+new", b"+new+new"):
        read_timings(settings, path)
        write_timings(settings, path)
        assert path.read_bytes() == expected
    for useless in (b"damaged", b"another GPU"):
        path.write_bytes(useless)
        read_timings(settings, path)
        write_timings(settings, path)
        assert path.read_bytes() == b"+new"
    bare = Settings()
    read_timings(bare, None)
    write_timings(bare, None)
    assert bare.timings is None
