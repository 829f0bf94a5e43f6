import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.export.engine_targets import choose_flavour, parse_targets, resolve_current
from latentrt.runtime.errors import BackendError, UsageError
from latentrt.runtime.machine import Gpu, Machine, Package

ADA = Gpu("NVIDIA RTX 4090", "sm89", 24 << 30)
HOPPER = Gpu("NVIDIA H200", "sm90", 139 << 30)
BOTH = {"tensorrt": Package("11.0.0.1", 13), "tensorrt_rtx": Package("1.7.1.116", 13)}


@pytest.mark.parametrize(
    ("text", "engines"),
    [
        ("sm86", (("sm86",),)),
        ("sm86,sm89,sm120", (("sm86",), ("sm89",), ("sm120",))),
        ("sm120+sm89, 8.6", (("sm89", "sm120"), ("sm86",))),
        ("SM_86,86,sm86", (("sm86",),)),
        ("12.0", (("sm120",),)),
        ("current", (("current",),)),
    ],
)
def test_targets_are_read_and_doubles_are_one(text: str, engines: tuple[tuple[str, ...], ...]) -> None:
    assert parse_targets(text) == engines


@given(st.text(max_size=12))
def test_any_other_text_is_one_usage_error(text: str) -> None:
    try:
        engines = parse_targets(text)
    except UsageError as err:
        assert "expected sm86" in str(err)  # noqa: PT017 # most texts, but not all, are refused
    else:
        assert all(engines)


def test_current_becomes_the_gpu_that_is_here() -> None:
    machine = Machine(gpus=(ADA,))
    assert resolve_current((("current", "sm86"), ("current",), ("sm89",)), machine) == (("sm86", "sm89"), ("sm89",))


def test_current_without_a_gpu_says_what_to_give() -> None:
    with pytest.raises(UsageError, match=r"no driver.*--target sm86,sm89,sm120"):
        resolve_current((("current",),), Machine(why_no_gpu="no driver"))


def test_nothing_installed_names_both_extras() -> None:
    with pytest.raises(BackendError, match=r"latentrt\[tensorrt-rtx\].*latentrt\[tensorrt\]"):
        choose_flavour("auto", (("sm89",),), Machine())


def test_full_tensorrt_needs_a_gpu() -> None:
    with pytest.raises(BackendError, match=r"tensorrt: expected a GPU.*no driver"):
        choose_flavour("tensorrt", (("sm89",),), Machine(packages=BOTH, why_no_gpu="no driver"))


def test_full_tensorrt_builds_only_for_its_own_gpu() -> None:
    with pytest.raises(UsageError, match=r"expected sm90.*got sm86,sm89\+sm120"):
        choose_flavour("tensorrt", (("sm86",), ("sm89", "sm120")), Machine(gpus=(HOPPER,), packages=BOTH))


@pytest.mark.parametrize(
    ("machine", "engines", "chosen"),
    [
        (Machine(packages=BOTH, gpus=(HOPPER,)), (("sm90",),), "tensorrt"),
        (Machine(packages=BOTH, gpus=(ADA,)), (("sm89",),), "tensorrt"),
        (Machine(packages=BOTH, gpus=(ADA,)), (("sm86",), ("sm89",)), "tensorrt_rtx"),
        (Machine(packages=BOTH), (("sm89",),), "tensorrt_rtx"),
        (Machine(packages={"tensorrt_rtx": BOTH["tensorrt_rtx"]}, gpus=(ADA,)), (("sm89",),), "tensorrt_rtx"),
        (Machine(packages={"tensorrt": BOTH["tensorrt"]}, gpus=(ADA,)), (("sm89",),), "tensorrt"),
    ],
)
def test_auto_builds_on_the_device_where_it_can_and_ahead_of_time_elsewhere(
    machine: Machine, engines: tuple[tuple[str, ...], ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Module:
        __version__ = "0"

    monkeypatch.setattr("latentrt.export.engine_targets.import_flavour", lambda name: Module)
    monkeypatch.setattr("latentrt.export.engine_targets.supported_sms", lambda module, name: ("sm86", "sm89"))
    assert choose_flavour("auto", engines, machine)[0] == chosen


def test_a_target_that_rtx_does_not_build_for_lists_those_it_does() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    machine = Machine(packages={"tensorrt_rtx": BOTH["tensorrt_rtx"]})
    with pytest.raises(UsageError, match=r"expected one of sm75, .*sm89, .*got sm90, sm70"):
        choose_flavour("auto", (("sm90",), ("sm89",), ("sm70",)), machine)
