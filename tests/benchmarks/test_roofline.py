from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from latentrt.benchmarks.cases import Case, Settings, Subject, System
from latentrt.benchmarks.dry_run import work_counter
from latentrt.benchmarks.graph_flops import graph_work
from latentrt.benchmarks.results_file import Peak, Roofline, Row, Run, Work
from latentrt.benchmarks.roofline import (
    achieved_flops,
    bound,
    host_gap,
    intensity,
    share_of_peak,
    stage_seconds,
    with_roofline,
)
from latentrt.export.recording import watched_pipeline
from latentrt.runtime.bundle import open_bundle

PEAK = Peak(device="a device", flops=1e12, bandwidth=1e10, source="none")
PROMPTS = ("a red circle", "a blue square")


def case(
    *,
    system: System = "latentrt",
    precision: str = "fp32",
    batch: int = 1,
    sampler: str = "Euler",
    steps: int = 4,
    guidance: float = 5.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Case:
    return Case(
        subject=Subject(system=system, precision=precision, backend="onnxruntime", width=64, height=48, batch=batch),
        settings=Settings(sampler=sampler, schedule=None, steps=steps, guidance=guidance, guidance_interval=interval),
    )


def unet_flops(bundle: Path, rows: int) -> int:
    shapes = {"sample": (rows, 4, 6, 8), "timestep": (rows,), "encoder_hidden_states": (rows, 77, 64)}
    return graph_work(ir.load(bundle / "unet" / "model.onnx"), shapes).flops


def test_a_case_is_counted_call_by_call_as_it_really_runs(shapes_bundle: Path) -> None:
    """Against the pipeline with its networks: guidance that ends, a sampler of two evaluations, different prompts."""
    measured = case(sampler="Heun", steps=3, batch=3, interval=(0.0, 0.5))
    calls: Counter[str] = Counter()
    rows: list[int] = []

    def seen(component: str, feeds: Mapping[str, Any], _: Mapping[str, Any]) -> None:
        calls[component] += 1
        if component == "unet":
            rows.append(len(feeds["sample"]))

    pipeline = watched_pipeline(open_bundle(shapes_bundle), "fp32", seen, verify=False)
    settings = measured.settings
    pipeline(
        [PROMPTS[0], PROMPTS[1], PROMPTS[0]],
        width=64,
        height=48,
        sampler=settings.sampler,
        steps=settings.steps,
        guidance=settings.guidance,
        guidance_interval=settings.guidance_interval,
    )
    work = work_counter(open_bundle(shapes_bundle), PROMPTS)(measured)
    assert {name: each.calls for name, each in work.items()} == calls
    assert calls == {"text_encoder": 3, "unet": 5, "vae_decoder": 3}
    assert sorted(set(rows)) == [3, 6]
    mean = sum(unet_flops(shapes_bundle, count) for count in rows) / len(rows)
    assert work["unet"].flops == pytest.approx(mean, abs=1)


@pytest.mark.parametrize(
    ("changes", "rows"), [({}, 2), ({"guidance": 1.0}, 1), ({"batch": 2}, 4), ({"interval": (0.0, 0.0)}, 1)]
)
def test_guided_rows_are_twice_the_pictures(changes: dict[str, Any], rows: int, shapes_bundle: Path) -> None:
    work = work_counter(open_bundle(shapes_bundle), PROMPTS)(case(**changes))
    assert work["unet"] == replace(work["unet"], flops=unet_flops(shapes_bundle, rows), calls=4)


def test_a_peer_in_another_precision_moves_bytes_of_its_own(shapes_bundle: Path) -> None:
    count = work_counter(open_bundle(shapes_bundle), PROMPTS)
    full, half = count(case()), count(case(system="diffusers", precision="bf16"))
    assert {name: (work.flops, work.calls) for name, work in half.items()} == {
        name: (work.flops, work.calls) for name, work in full.items()
    }
    assert half["unet"].weight_bytes == full["unet"].weight_bytes // 2
    assert half["unet"].activation_bytes == full["unet"].activation_bytes // 2


def row(case_: Case, *runs: Run, **changes: Any) -> Row:
    return Row(case=case_, runs=runs or (run(),), **changes)


def run(calls: tuple[float, ...] = (0.2, 0.3), gpu_calls: tuple[float, ...] | None = None, sampler: float = 0.1) -> Run:
    stages = {"unet": sum(calls), "sampler": sampler, "vae_decoder": 0.25}
    return Run(turn=0, seconds=1.0, stages=stages, calls=calls, gpu_calls=gpu_calls)


def test_rows_get_their_work_and_their_peak(shapes_bundle: Path) -> None:
    done: list[tuple[str, int, int]] = []
    rows = (
        row(case()),
        Row(case=case(), skipped="no GPU"),
        row(case(system="diffusers")),
        row(case(sampler="no such sampler")),
    )
    ours, skipped, peer, broken = with_roofline(
        rows, shapes_bundle, lambda _: PEAK, lambda *told: done.append(told), prompts=PROMPTS
    )
    assert ours.roofline is not None
    assert ours.roofline.peak == PEAK
    assert ours.roofline.work["unet"].calls == 2  # those that were measured
    assert skipped is rows[1]
    assert peer.roofline == ours.roofline
    assert broken.roofline is None
    assert "no such sampler" in broken.notes[0]
    assert [index for _, index, _ in done] == [0, 1, 2, 3, 4]
    assert {total for _, _, total in done} == {4}


WORK = {
    "text_encoder": Work(flops=10**9, weight_bytes=1000, activation_bytes=500, calls=1),
    "unet": Work(flops=10**11, weight_bytes=6 * 10**8, activation_bytes=4 * 10**8, calls=2),
    "vae_decoder": Work(flops=10**10, weight_bytes=10**9, activation_bytes=10**9, calls=1),
}


def judged(*runs: Run, peak: Peak = PEAK) -> Row:
    return replace(row(case(steps=2), *runs), roofline=Roofline(work=WORK, peak=peak))


def test_figures_of_a_stage_by_their_definitions() -> None:
    found = judged(run((0.2, 0.3)), run((0.2, 0.2)), run((0.9, 0.9)))
    assert stage_seconds(found, "unet") == pytest.approx(0.5)
    assert achieved_flops(found) == pytest.approx(2e11 / 0.5)
    assert share_of_peak(found) == pytest.approx(0.4)
    assert intensity(found) == pytest.approx(100)
    assert achieved_flops(found, "vae_decoder") == pytest.approx(1e10 / 0.25)
    assert intensity(found, "vae_decoder") == pytest.approx(5)
    # The ridge of the device is at 100 operations a byte.
    assert bound(found) == "compute"
    assert bound(found, "vae_decoder") == "memory"
    assert bound(judged(peak=replace(PEAK, flops=1.01e12))) == "memory"


def test_a_stage_in_another_precision_than_the_unets_is_not_held_against_its_peak() -> None:
    found = replace(judged(run((0.2, 0.3))), precisions={"unet": "int8", "vae_decoder": "fp16"})
    assert share_of_peak(found) is not None
    assert share_of_peak(found, "vae_decoder") is None
    assert bound(found, "vae_decoder") is None
    assert achieved_flops(found, "vae_decoder") is not None
    alike = replace(found, precisions={"unet": "fp16", "vae_decoder": "fp16"})
    assert share_of_peak(alike, "vae_decoder") == pytest.approx(1e10 / 0.25 / 1e12)


def test_times_of_a_gpu_are_those_of_its_events() -> None:
    found = judged(run((0.2, 0.3), gpu_calls=(0.1, 0.3)))
    assert achieved_flops(found) == pytest.approx(2e11 / 0.4)
    # 0.6 s from the first call to the last step, in which the GPU computes for 0.4 s, over two steps.
    assert host_gap(found) == pytest.approx(0.1)
    assert host_gap(judged(run((0.2, 0.3)))) == pytest.approx(0.05)


def test_what_is_not_known_is_none() -> None:
    found = judged(peak=Peak(device="?", flops=None, bandwidth=None, source=""))
    assert achieved_flops(found) is not None
    assert share_of_peak(found) is None
    assert bound(found) is None
    assert achieved_flops(found, "text_encoder") is None  # which no run has timed
    nothing = row(case())
    assert [achieved_flops(nothing), share_of_peak(nothing), intensity(nothing), bound(nothing)] == [None] * 4
    assert host_gap(Row(case=case())) is None
