"""The options of `latentrt bench`: what they are read from, what they refuse, and the rows that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.benchmarks.bench_options import (
    BenchOptions,
    cases_of,
    read_guidance,
    read_integers,
    read_names,
    read_sizes,
)
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.errors import UsageError


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=5, unique=True))
def test_integers_are_read_as_they_were_written(numbers: list[int]) -> None:
    assert read_integers("batch", ",".join(map(str, numbers))) == tuple(numbers)


@given(st.lists(st.tuples(st.integers(8, 4096), st.integers(8, 4096)), min_size=1, max_size=5, unique=True))
def test_sizes_are_width_and_height(sizes: list[tuple[int, int]]) -> None:
    assert read_sizes(",".join(f"{width}x{height}" for width, height in sizes)) == tuple(sizes)


def test_one_side_is_a_square_and_nothing_counts_twice() -> None:
    assert read_sizes("512,512x512,512x768") == ((512, 512), (512, 768))
    assert read_integers("steps", "20,10,20") == (20, 10)
    assert read_names(" Euler a, DPM++ 2M ,,Euler a") == ("Euler a", "DPM++ 2M")
    assert read_names(None) == ()


def test_guidance_is_a_scale_with_shares_of_the_steps() -> None:
    assert read_guidance("1,7.5,7.5:0.2-0.8") == ((1.0, (0.0, 1.0)), (7.5, (0.0, 1.0)), (7.5, (0.2, 0.8)))


@pytest.mark.parametrize("text", ["", "x", "5:", "5:0.5", "5:0.8-0.2", "5:0-1.5", "5:nan-1", "nan", "inf", "5:-1-1"])
def test_guidance_refuses_what_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="guidance: expected SCALE"):
        read_guidance(text)


@pytest.mark.parametrize("text", ["", "512x", "x512", "512x512x3", "big", "5.5"])
def test_sizes_refuse_what_is_none(text: str) -> None:
    if text == "512x":  # the second side may be left out, and a cross at the end changes nothing
        assert read_sizes(text) == ((512, 512),)
        return
    with pytest.raises(UsageError, match="size: expected"):
        read_sizes(text)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"warm_up": 0}, "warm-up: expected 1 or more, got 0"),
        ({"min_runs": 0}, "min-runs: expected 1"),
        ({"min_runs": 9, "max_runs": 8}, "max-runs: expected 9 or more, got 8"),
        ({"cold": -1}, "cold: expected 0"),
        ({"quality": -1}, "quality: expected 0"),
        ({"threads": -1}, "threads: expected 0"),
        ({"seed": -1}, "seed: expected 0"),
        ({"batches": (1, 0)}, "batch: expected 1 or more, got 0"),
        ({"steps": (0,)}, "steps: expected 1"),
        ({"sizes": ((512, 0),)}, "size: expected 1"),
        ({"confidence": float("nan")}, "confidence: expected a share"),
        ({"confidence": 1.0}, "confidence: expected a share"),
        ({"seconds": 0.0}, "seconds: expected more than 0"),
        ({"seconds": float("inf")}, "seconds: expected more than 0"),
        ({"against": ("comfy",)}, "against: expected some of diffusers, torch-compile, optimum, got 'comfy'"),
        ({"backends": ("cpu",)}, "backend: expected some of auto"),
    ],
)
def test_options_out_of_range_are_refused(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchOptions(bundle=Path("x.bundle"), **given_)


def test_every_combination_is_a_row(shapes_bundle: Path) -> None:
    options = BenchOptions(
        bundle=shapes_bundle,
        sizes=((64, 64), (128, 64)),
        batches=(1, 2),
        steps=(4, 8),
        samplers=("dpmpp_2m", "Euler a Karras"),
        guidance=((1.0, (0.0, 1.0)), (5.0, (0.2, 0.8))),
        precisions=("fp32", "fp16"),
        backends=("onnxruntime",),
        against=("diffusers",),
    )
    cases = cases_of(options, open_bundle(shapes_bundle))
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 * 2 * 2 * (2 + 1)
    assert len({case.label for case in cases}) == len(cases)
    assert {(c.settings.sampler, c.settings.schedule) for c in cases} == {("DPM++ 2M", None), ("Euler a", "karras")}
    assert {(c.subject.system, c.subject.precision, c.subject.backend) for c in cases} == {
        ("latentrt", "fp32", "onnxruntime"),
        ("latentrt", "fp16", "onnxruntime"),
        ("diffusers", "fp32", "cpu"),
    }


def test_what_is_left_out_is_the_checkpoints_own(shapes_bundle: Path) -> None:
    bundle = open_bundle(shapes_bundle)
    cases = cases_of(BenchOptions(bundle=shapes_bundle), bundle)
    (settings,) = {case.settings for case in cases}
    assert settings.sampler == bundle.config("scheduler/scheduler_config.json")["_class_name"]
    assert (settings.schedule, settings.steps, settings.guidance) == (None, 20, 7.5)
    assert {(case.subject.width, case.subject.height) for case in cases} == {(128, 128)}
    assert [case.subject.precision for case in cases] == list(bundle.precisions())


def test_a_size_that_latents_do_not_have_is_refused(shapes_bundle: Path) -> None:
    with pytest.raises(UsageError, match="size: expected multiples of 8, got 66"):
        cases_of(BenchOptions(bundle=shapes_bundle, sizes=((128, 66),)), open_bundle(shapes_bundle))
