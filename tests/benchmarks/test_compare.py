import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_workers import GIB, row, subject

from latentrt.benchmarks.changes import Change
from latentrt.benchmarks.compare import Comparison, compare
from latentrt.benchmarks.compare_words import HEAD, comparison_rows, comparison_sentences
from latentrt.benchmarks.report_cells import NOTHING
from latentrt.benchmarks.results_file import ColdStart, Disk, Memory, Quality, Results, Row, Run, Vram
from latentrt.runtime.errors import UsageError

A, B = subject("latentrt"), subject("latentrt", precision="int8")
MACHINE = {
    "architecture": "x86_64",
    "cpu": "Example",
    "cores": 2,
    "gpus": [{"name": "GPU", "sm_mhz": 1}],
    "cuda": "13.0",
}


def measured(
    of: Row,
    *,
    seed: int = 0,
    slower: float = 1.0,
    runs: int = 40,
    cold: float = 1.0,
    peak: int = GIB,
    vram: Vram | None = None,
    quality: Quality | None = None,
) -> Row:
    rng = np.random.default_rng(seed)
    return replace(
        of,
        backend="onnxruntime CPU",
        runs=tuple(
            Run(turn=turn, seconds=seconds, stages={}, calls=())
            for turn, seconds in enumerate((slower * rng.lognormal(0, 0.02, runs)).tolist())
        ),
        cold=tuple(
            ColdStart(process=cold * seconds, imports=0.1, load=0.2, first=0.3, peak_rss=GIB)
            for seconds in rng.lognormal(0, 0.02, 6).tolist()
        ),
        memory=Memory(rss_loaded=GIB // 2, peak_rss=peak, vram=vram or Vram(reason="not run on a GPU")),
        disk=Disk(graphs=10 * GIB, engines=0, bundle=20 * GIB),
        quality=quality,
    )


def results(*rows: Row, **more: Any) -> Results:
    facts: dict[str, Any] = {
        "command": "latentrt bench shapes.bundle",
        "date": "2026-11-23T15:00:00+00:00",
        "latentrt": "0.1.0",
        "model": {"name": "shapes", "family": "StableDiffusionPipeline", "files": {"unet/model.onnx": "ab"}},
        "machine": MACHINE,
        "packages": {"numpy": "2.4.6"},
        "prompts": ("a red circle",),
        "seed": 0,
        "confidence": 0.02,
        "interleaved": True,
    }
    return Results(**{**facts, **more}, rows=rows)


def figure(comparison: Comparison, what: str, place: int = 0) -> Change:
    return next(change for change in comparison.rows[place].changes if change.what == what)


def of_quality(mean: float, *, seed: int = 0, noise: float = 0.01, accuracy: float | None = None) -> Quality:
    rng = np.random.default_rng(seed)
    psnr = mean + np.linspace(-3, 3, 12) + rng.normal(0, noise, 12)
    return Quality(prompts=12, psnr=tuple(psnr.tolist()), accuracy=accuracy)


def test_a_benchmark_is_the_same_as_itself() -> None:
    one = results(
        measured(row(A), quality=of_quality(40, accuracy=1.0)), measured(row(B), runs=3, quality=of_quality(30))
    )
    comparison = compare(one, one, threshold=0.05)
    changes = [change for each in comparison.rows for change in each.changes]
    assert {change.verdict for change in changes if change.judged} == {"same"}
    assert {change.ratio for change in changes} == {1}
    assert [change.what for change in comparison.rows[0].changes] == [
        *("median", "p90", "cold start", "peak memory", "graphs and engines", "PSNR", "accuracy")
    ]
    assert (comparison.warnings, comparison.broken, comparison.regressed) == ((), {}, False)


@pytest.mark.parametrize(("factor", "verdict"), [(1.10, "worse"), (1 / 1.10, "better"), (1.0, "same")])
def test_times(factor: float, verdict: str) -> None:
    before, after = results(measured(row(A))), results(measured(row(A), seed=1, slower=factor))
    comparison = compare(before, after, threshold=0.05)
    median = figure(comparison, "median")
    assert median.verdict == verdict
    assert median.ratio == pytest.approx(factor, rel=0.02)
    assert median.interval is not None
    assert median.interval[0] <= factor <= median.interval[1]
    assert comparison.regressed is (verdict == "worse")
    assert figure(comparison, "cold start").verdict == "same"
    assert figure(comparison, "p90").verdict is None


def test_a_change_within_the_threshold_is_no_regression() -> None:
    before, after = results(measured(row(A))), results(measured(row(A), seed=1, slower=1.03))
    median = figure(compare(before, after, threshold=0.05), "median")
    assert median.p is not None
    assert median.p < 0.01  # it is there
    assert median.verdict == "same"  # and does not count
    assert compare(before, after, threshold=0.015).regressed
    assert figure(compare(before, after, threshold=0.03), "median").verdict == "unclear"  # on the edge


def test_too_few_runs_are_unclear() -> None:
    before, after = results(measured(row(A), runs=3)), results(measured(row(A), seed=1, slower=1.5, runs=3))
    comparison = compare(before, after, threshold=0.05)
    # Of 20 ways to divide six values in halves two are as extreme.
    assert figure(comparison, "median").p == pytest.approx(0.1)
    assert figure(comparison, "median").verdict == "unclear"
    assert not comparison.regressed


def test_many_rows_are_corrected_for() -> None:
    # Of 5 against 5 the least p is 2 / 252; times 8 rows it is no longer significant.
    def benchmark(count: int, slower: float) -> Results:
        rows = [measured(row(A, steps=10 + place), seed=place, runs=5, slower=slower) for place in range(count)]
        return results(*rows)

    for count, verdict in ((1, "worse"), (6, "worse"), (8, "unclear")):
        median = figure(compare(benchmark(count, 1.0), benchmark(count, 1.5), threshold=0.05), "median")
        assert median.p == pytest.approx(count * 2 / math.comb(10, 5))
        assert median.verdict == verdict


def test_a_slower_start_is_a_regression() -> None:
    before, after = results(measured(row(A))), results(measured(row(A), seed=1, cold=1.3))
    comparison = compare(before, after, threshold=0.05)
    assert (figure(comparison, "cold start").verdict, figure(comparison, "median").verdict) == ("worse", "same")
    assert comparison.regressed


@pytest.mark.parametrize(("share", "verdict"), [(1.06, "worse"), (1.04, "same"), (0.96, "same"), (0.94, "better")])
def test_memory_goes_by_the_threshold_alone(share: float, verdict: str) -> None:
    before, after = results(measured(row(A))), results(measured(row(A), peak=int(share * GIB)))
    comparison = compare(before, after, threshold=0.05)
    assert figure(comparison, "peak memory").verdict == verdict
    assert comparison.regressed is (verdict == "worse")


def test_video_memory_of_like_measurements() -> None:
    def peak(nbytes: int, of: str) -> Results:
        return results(measured(row(A), vram=Vram(peak=nbytes, peak_of=of)))

    assert figure(compare(peak(100, "process"), peak(120, "process"), threshold=0.1), "peak VRAM").verdict == "worse"
    mixed = compare(peak(100, "process"), peak(120, "gpu"), threshold=0.1)
    assert "peak VRAM" not in [change.what for change in mixed.rows[0].changes]


@pytest.mark.parametrize(("drop", "verdict"), [(1.0, "worse"), (-1.0, "better"), (0.05, "same"), (0.0, "same")])
def test_quality_by_picture(drop: float, verdict: str) -> None:
    # Pictures are 6 dB apart from each other and 0.01 dB from what they were.
    before = results(measured(row(A), quality=of_quality(40)))
    after = results(measured(row(A), quality=of_quality(40 - drop, seed=1)))
    psnr = figure(compare(before, after, threshold=0.05), "PSNR")
    assert psnr.verdict == verdict
    assert psnr.ratio == pytest.approx(10 ** (drop / 10), rel=0.01)  # of the error's power
    assert psnr.after - psnr.before == pytest.approx(-drop, abs=0.02)


def test_errors_below_rounding_are_none() -> None:
    before = results(measured(row(A), quality=Quality(prompts=12, psnr=(100.0,) * 12, ssim=(1.0,) * 12)))
    after = results(measured(row(A), quality=Quality(prompts=12, psnr=(60.0,) * 12, ssim=(0.99995,) * 12)))
    comparison = compare(before, after, threshold=0.05)
    assert [figure(comparison, what).verdict for what in ("PSNR", "SSIM")] == ["same", "same"]
    # Half a level off everywhere is more than rounding does: 1/4 against 1/12.
    half = results(measured(row(A), quality=Quality(prompts=12, psnr=(20 * math.log10(255 / 0.5),) * 12)))
    psnr = figure(compare(before, half, threshold=0.05), "PSNR")
    assert psnr.verdict == "worse"
    assert psnr.ratio == pytest.approx(3)


@pytest.mark.parametrize(("shown", "verdict"), [(12, "same"), (10, "unclear"), (5, "worse")])
def test_accuracy_by_counts(shown: int, verdict: str) -> None:
    before = results(measured(row(A), quality=of_quality(40, accuracy=1.0)))
    after = results(measured(row(A), quality=of_quality(40, accuracy=shown / 12)))
    accuracy = figure(compare(before, after, threshold=0.05), "accuracy")
    # Fisher: of all ways to have so many failures among 24, those that fall on one side, twice.
    failed = 12 - shown
    assert accuracy.p == pytest.approx(min(1, 2 * math.comb(12, failed) / math.comb(24, failed)))
    assert accuracy.verdict == verdict


def test_other_hardware_makes_times_incomparable() -> None:
    before = results(measured(row(A), quality=of_quality(40)), measured(row(B)))
    other = {**MACHINE, "gpus": [{"name": "Other"}]}
    after = results(
        measured(row(A), slower=2, peak=2 * GIB, quality=of_quality(30)), row(B, skipped="no GPU"), machine=other
    )
    comparison = compare(before, after, threshold=0.05)
    assert not comparison.comparable
    assert comparison.warnings == (
        "other hardware, so that times and memory cannot be judged: gpus: GPU before, Other after",
    )
    judged = {change.what for each in comparison.rows for change in each.changes if change.verdict is not None}
    assert judged == {"PSNR"}  # pictures are no matter of the machine
    assert figure(comparison, "median").ratio == pytest.approx(2)
    better = replace(after, rows=(measured(row(A), slower=2, quality=of_quality(40)), *after.rows[1:]))
    assert not compare(before, better, threshold=0.05).regressed


def test_what_else_differs_is_named() -> None:
    before = results(measured(row(A), quality=of_quality(40)))
    after = results(
        replace(measured(row(A), quality=of_quality(30)), backend="onnxruntime CUDA"),
        machine={**MACHINE, "cuda": "13.1", "gpus": [{"name": "GPU", "sm_mhz": 2}], "load_average": [3]},
        packages={"numpy": "2.5.0", "scipy": "1.17"},
        latentrt="0.2.0",
        prompts=("a blue square",),
        model={**before.model, "files": {f"{letter}.onnx": letter for letter in "abcd"}},
    )
    comparison = compare(before, after, threshold=0.05)
    assert comparison.comparable
    assert comparison.warnings == (
        "other pictures, so that quality cannot be compared: prompts: a red circle before, a blue square after",
        "latentrt: 0.1.0 before, 0.2.0 after",
        "cuda: 13.0 before, 13.1 after",
        "package numpy: 2.4.6 before, 2.5.0 after",
        "package scipy: unknown before, 1.17 after",
        "files of the bundle differ: a.onnx, b.onnx, c.onnx and 2 more",
        f"{row(A).case.label}: backend onnxruntime CPU before, onnxruntime CUDA after",
    )
    assert "PSNR" not in [change.what for change in comparison.rows[0].changes]


def test_rows_without_partners_are_named() -> None:
    rows = [row(A, steps=steps) for steps in (10, 20, 30, 40, 50)]
    labels = [each.case.label for each in rows]
    before = results(*(measured(each) for each in rows[:3]), replace(rows[4], skipped="not installed"))
    after = results(
        replace(rows[3], skipped="no"), replace(rows[1], skipped="it crashed"), *map(measured, (rows[2], rows[4]))
    )
    comparison = compare(before, after, threshold=0.05)
    assert [each.case for each in comparison.rows] == [rows[2].case]
    assert comparison.only_before == (labels[0],)
    assert comparison.only_after == (labels[4],)
    assert comparison.broken == {labels[1]: "it crashed"}
    assert comparison.regressed
    text = "\n".join(comparison_sentences(comparison))
    assert f"Cannot be measured any more: {labels[1]}: it crashed" in text
    assert f"Measured before only: {labels[0]}." in text
    assert f"Measured after only: {labels[4]}." in text


def test_cells() -> None:
    before = results(measured(row(A), quality=of_quality(40)))
    after = results(measured(row(A), slower=1.5, peak=2 * GIB, quality=of_quality(37)))
    comparison = compare(before, after, threshold=0.05)
    cells = comparison_rows(comparison)
    assert all(len(line) == len(HEAD) for line in cells)
    assert [line[0] for line in cells] == [row(A).case.label, *[""] * (len(cells) - 1)]
    by_figure = {line[1]: line[2:] for line in cells}
    assert by_figure["median"][2] == "+50.0%"
    assert by_figure["median"][-1] == "slower"
    assert by_figure["peak memory"] == ("1.07 GB", "2.15 GB", "+100.0%", NOTHING, NOTHING, "larger")
    assert by_figure["PSNR"][:3] == ("40.0 dB", "37.0 dB", "+99.5%")
    assert by_figure["PSNR"][-1] == "worse"
    assert by_figure["graphs and engines"][-1] == NOTHING
    assert comparison_sentences(comparison)[0] == "3 worse, 1 same of 4 figures in 1 row, at a threshold of 0.05."


@pytest.mark.parametrize("threshold", [0.0, -0.1, math.nan, math.inf])
def test_thresholds_that_are_none(threshold: float) -> None:
    with pytest.raises(UsageError, match="threshold: expected a share above 0"):
        compare(results(), results(), threshold=threshold)


def test_other_families_are_refused() -> None:
    with pytest.raises(UsageError, match="one family of models, got StableDiffusionPipeline and StableDiffusionXL"):
        compare(results(), results(model={"family": "StableDiffusionXL"}), threshold=0.05)


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(UsageError, match="expected rows in common, got none"):
        compare(results(measured(row(A))), results(measured(row(B))), threshold=0.05)
    skipped = compare(results(measured(row(A))), results(row(A, skipped="it crashed")), threshold=0.05)
    assert skipped.regressed
    assert comparison_sentences(skipped)[0] == "Nothing could be judged."
