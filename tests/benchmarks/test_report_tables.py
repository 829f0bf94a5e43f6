import math
import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median, stdev

import numpy as np
import pytest
from bench_rows import SIDE, STEPS, bench_results, bench_row, with_row
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from latentrt.benchmarks.cases import System
from latentrt.benchmarks.peer_ratios import base_row, speed_up, verdicts
from latentrt.benchmarks.report_cells import (
    NOTHING,
    Cell,
    Table,
    digits,
    ran_where,
    row_labels,
    size_unit,
    split_shared,
    time_unit,
)
from latentrt.benchmarks.report_tables import all_tables
from latentrt.benchmarks.report_words import heading, sentences
from latentrt.benchmarks.results_file import Results, Row, Vram
from latentrt.benchmarks.speed_tables import stage_shares

RESULTS = bench_results()
GPU = bench_results(on_gpu=True, runs=100)
COMMON = f"All rows: {SIDE}x{SIDE}, DPM++ 2M karras, {STEPS} steps, guidance 5."
# Half a unit of the last of three or four digits.
THREE, FOUR = 5.1e-3, 5.1e-4


def table(results: Results, title: str) -> Table:
    return next(each for each in all_tables(results) if each.title == title)


def cell(each: Table, number: int, column: str) -> Cell:
    """The cell of a row by its number, and of the column whose title begins so."""
    places = [place for place, name in enumerate(each.head) if " ".join(name.split()).startswith(column)]
    assert len(places) == 1, (column, each.head)
    row = next(row for row in each.rows if row[0].text.startswith(f"{number}: "))
    return row[places[0]]


def value(text: str) -> float:
    return float(re.sub(r"[^\d.]", "", text))


def ends(text: str) -> list[float]:
    return [value(part) for part in text.split("\N{EN DASH}")]


def numbered(results: Results) -> list[tuple[int, Row]]:
    """The measured rows with their numbers."""
    return [(number, row) for number, row in enumerate(results.rows, 1) if row.runs]


def median_interval(sample: Sequence[float]) -> list[float]:
    """By the binomial quantile: the largest k whose order statistics k and n + 1 - k hold the median at 95 %."""
    k = int(binom.ppf(0.025, len(sample), 0.5))
    while binom.cdf(k - 1, len(sample), 0.5) > 0.025:
        k -= 1
    ordered = sorted(sample)
    return [ordered[k - 1], ordered[-k]]


@pytest.mark.parametrize("results", [RESULTS, GPU], ids=["cpu", "gpu"])
def test_latency_is_that_of_the_samples(results: Results) -> None:
    found = table(results, "Latency")
    for number, row in numbered(results):
        sample = np.array(row.seconds) * 1e3
        p50 = cell(found, number, "p50, ms")
        assert value(p50.text) == pytest.approx(np.median(sample), rel=FOUR)
        assert ends(p50.notes[0]) == pytest.approx(median_interval(sample.tolist()), rel=FOUR)
        assert value(cell(found, number, "p90").text) == pytest.approx(np.percentile(sample, 90), rel=FOUR)
        mean = cell(found, number, "mean")
        assert value(mean.text) == pytest.approx(sample.mean(), rel=FOUR)
        assert value(mean.notes[0]) == pytest.approx(stdev(sample.tolist()), rel=THREE)
        assert value(cell(found, number, "images/s").text) == pytest.approx(
            1e3 * row.case.subject.batch / np.median(sample), rel=THREE
        )
        loop = [run.stages["unet"] + run.stages["sampler"] for run in row.runs]
        assert value(cell(found, number, "it/s").text) == pytest.approx(STEPS / median(loop), rel=THREE)
        assert cell(found, number, "runs") == Cell(str(len(sample)), ("settled" if row.settled else "unsettled",))


def test_a_percentile_needs_runs_beyond_it() -> None:
    assert not [name for name in table(RESULTS, "Latency").head if "p99" in name]
    found = table(GPU, "Latency")
    for number, row in numbered(GPU):
        assert value(cell(found, number, "p99").text) == pytest.approx(
            np.percentile(np.array(row.seconds) * 1e3, 99), rel=FOUR
        )
    few = table(bench_results(runs=9), "Latency")
    assert not [name for name in few.head if "p90" in name]
    assert cell(few, 1, "p50").notes
    assert not cell(table(bench_results(runs=5), "Latency"), 1, "p50").notes


def test_ratios_are_by_round_to_the_peer_s_fastest_row_of_the_same_batch() -> None:
    found = table(RESULTS, "Times as fast")
    assert found.head == ("row", "as diffusers")
    for number, row in numbered(RESULTS):
        base = bench_row(RESULTS, "diffusers", "fp16", row.case.subject.batch)
        ratio = cell(found, number, "as diffusers")
        if row is base:
            assert ratio == Cell("1", ("the base",))
            continue
        by_round = [theirs / ours for theirs, ours in zip(base.seconds, row.seconds, strict=True)]
        assert value(ratio.text) == pytest.approx(median(by_round), rel=0.01)
        assert ends(ratio.notes[0]) == pytest.approx(median_interval(by_round), rel=0.01)


def test_rows_that_did_not_take_turns_are_compared_by_medians() -> None:
    blocks = replace(RESULTS, interleaved=False)
    ours, base = bench_row(blocks, "latentrt", "int8", 1), bench_row(blocks, "diffusers", "fp16", 1)
    ratio = speed_up(blocks, ours, base)
    assert ratio.value == median(base.seconds) / median(ours.seconds)
    assert "by blocks" in table(blocks, "Times as fast").caption
    assert "run by run" in table(RESULTS, "Times as fast").caption


def test_only_like_is_compared_with_like() -> None:
    row = bench_row(RESULTS, "latentrt", "fp32", 4)
    for changed in (
        replace(row.case, settings=replace(row.case.settings, steps=10)),
        replace(row.case, subject=replace(row.case.subject, width=2 * SIDE)),
        replace(row.case, subject=replace(row.case.subject, batch=2)),
    ):
        assert base_row(RESULTS, replace(row, case=changed), "diffusers") is None
    assert base_row(RESULTS, row, "diffusers") is bench_row(RESULTS, "diffusers", "fp16", 4)
    assert base_row(RESULTS, row, "optimum") is None


def test_without_peers_rows_are_held_against_the_first_of_latentrt() -> None:
    own = replace(RESULTS, rows=RESULTS.rows[:6])
    found = table(own, "Times as fast")
    assert cell(found, 2, "as latentrt") == Cell("1", ("the base",))
    assert value(cell(found, 6, "as latentrt").text) > 1.5
    assert list(verdicts(own)) == []
    fastest = median(bench_row(own, "latentrt", "int8", 4).seconds) / 4
    assert heading(own) == f"shapes: latentrt int8 draws a picture in {1e3 * fastest:.0f} ms"


@pytest.mark.parametrize("results", [RESULTS, GPU], ids=["cpu", "gpu"])
def test_stages_are_those_of_the_samples(results: Results) -> None:
    found = table(results, "Stages")
    columns = {"tokenize": "tokenize", "text": "text_encoder", "U-Net": "unet", "sampler": "sampler"}
    columns |= {"VAE": "vae_decoder", "PNG": "encode"}
    for number, row in numbered(results):
        total = sum(row.seconds)
        for title, stage in columns.items():
            times = [run.stages[stage] for run in row.runs]
            shown = cell(found, number, title)
            assert value(shown.text) == pytest.approx(1e3 * median(times), rel=THREE)
            assert value(shown.notes[0]) == pytest.approx(100 * sum(times) / total, abs=0.051)
        rest = [run.seconds - sum(run.stages.values()) for run in row.runs]
        assert value(cell(found, number, "other").text) == pytest.approx(1e3 * median(rest), rel=THREE)
        assert sum(stage_shares(row).values()) == pytest.approx(1)
        calls = np.array([run.calls for run in row.runs]) * 1e3
        shown = cell(found, number, "a call, ms")
        assert value(shown.text) == pytest.approx(np.median(calls), rel=THREE)
        assert value(shown.notes[0].removeprefix("p90")) == pytest.approx(np.percentile(calls, 90), rel=THREE)
        if results is GPU:
            on_gpu = np.array([run.gpu_calls for run in row.runs]) * 1e3
            assert value(cell(found, number, "on the GPU, ms").text) == pytest.approx(np.median(on_gpu), rel=THREE)
    assert ("CUDA events" in found.caption) == (results is GPU)


def test_stages_that_a_system_does_not_tell_apart_are_left_open() -> None:
    row = bench_row(RESULTS, "diffusers", "fp32", 1)
    runs = tuple(replace(run, stages={}, calls=()) for run in row.runs)
    changed = with_row(RESULTS, replace(row, runs=runs))
    number = RESULTS.rows.index(row) + 1
    found = table(changed, "Stages")
    shown = next(cells for cells in found.rows if cells[0].text.startswith(f"{number}: "))
    assert {each.text for each in shown[1:]} == {NOTHING}
    assert cell(table(changed, "Latency"), number, "it/s").text == NOTHING


def test_cold_starts_are_medians_with_the_range_of_the_whole() -> None:
    found = table(RESULTS, "Cold start")
    for number, row in numbered(RESULTS):
        process = [start.process for start in row.cold]
        shown = cell(found, number, "process, s")
        assert value(shown.text) == pytest.approx(median(process), rel=THREE)
        assert ends(shown.notes[0]) == pytest.approx([min(process), max(process)], rel=THREE)
        for title, name in (("imports", "imports"), ("load", "load"), ("picture", "first")):
            times = [getattr(start, name) for start in row.cold]
            assert value(cell(found, number, title).text) == pytest.approx(median(times), rel=THREE)
        peak = median(start.peak_rss for start in row.cold) / 1e9
        assert value(cell(found, number, "peak RSS, GB").text) == pytest.approx(peak, rel=THREE)
        first = cell(found, number, "first run")
        assert value(first.text) == pytest.approx(row.warm_up[0], rel=THREE)
        assert value(first.notes[0]) == pytest.approx(row.warm_up[0] / median(row.seconds), rel=THREE)


def test_memory_is_told_by_what_it_is_for() -> None:
    found = table(GPU, "Memory")
    for title, megabytes in (
        ("RSS loaded, MB", "400"),
        ("RSS peak", "700"),
        ("VRAM weights", "200"),
        ("VRAM activation", "200"),
        ("VRAM I/O", "10.0"),
        ("VRAM context", "400"),
        ("VRAM peak", "1,000"),
    ):
        assert cell(found, 3, title) == Cell(megabytes)
    assert cell(found, 9, "VRAM weights").text == NOTHING
    assert cell(found, 9, "VRAM peak").text == "2,000"
    row = bench_row(GPU, "diffusers", "fp16", 1)
    assert row.memory is not None
    shared = replace(row, memory=replace(row.memory, vram=Vram(peak=3 * 10**9, peak_of="gpu")))
    assert cell(table(with_row(GPU, shared), "Memory"), 9, "VRAM peak") == Cell("3,000", ("whole GPU",))


def test_memory_on_a_gpu_is_not_asked_of_a_cpu() -> None:
    found = table(RESULTS, "Memory")
    assert [" ".join(name.split()) for name in found.head] == ["row", "RSS loaded, MB", "RSS peak, MB"]
    assert "VRAM is not known: not run on a GPU." in found.caption


def test_sizes_on_disk_are_those_of_latentrt_s_rows() -> None:
    found = table(RESULTS, "On disk")
    assert [row[0].text[:2] for row in found.rows] == ["1:", "2:", "3:", "4:", "5:", "6:"]
    assert found.head == ("row", "graphs, MB", "bundle, MB")
    assert [each.text for each in found.rows[0][1:]] == ["40.0", "90.0"]


@pytest.mark.parametrize("results", [RESULTS, GPU], ids=["cpu", "gpu"])
def test_the_roofline_is_work_over_time(results: Results) -> None:
    found = table(results, "Roofline")
    for number, row in numbered(results):
        subject = row.case.subject
        width = {"fp32": 4, "fp16": 2, "int8": 1}[subject.precision]
        peak = 2e11 * 4 / width
        calls = [sum(run.gpu_calls or run.calls) for run in row.runs]
        reached = STEPS * 2e9 * subject.batch / median(calls)
        assert value(cell(found, number, "U-Net, TFLOP/call").text) == pytest.approx(2e-3 * subject.batch, rel=THREE)
        shown = cell(found, number, "U-Net, TFLOP/s")
        assert value(shown.text) == pytest.approx(reached / 1e12, rel=THREE)
        assert value(shown.notes[0]) == pytest.approx(100 * reached / peak, abs=0.051)
        dense = 2e9 * subject.batch / (width * (8e6 + 5e6 * subject.batch))
        shown = cell(found, number, "U-Net, FLOP/byte")
        assert value(shown.text) == pytest.approx(dense, rel=THREE)
        assert shown.notes == ("compute" if dense > peak / 2e10 else "memory",)
        gaps = [run.stages["unet"] + run.stages["sampler"] - busy for run, busy in zip(row.runs, calls, strict=True)]
        unit = next(name for name in found.head if name.startswith("host gap")).split()[-1]
        scale = {"µs": 1e6, "ms": 1e3}[unit]
        shown = cell(found, number, "host gap")
        assert value(shown.text) == pytest.approx(scale * median(gaps) / STEPS, rel=THREE)
        decoding = median(run.stages["vae_decoder"] for run in row.runs)
        shown = cell(found, number, "VAE, TFLOP/s")
        assert value(shown.text) == pytest.approx(3e-3 * subject.batch / decoding, rel=THREE)
    assert "fp16 0.400 TFLOP/s, 20.0 GB/s on " in found.caption


def test_quality_is_the_mean_over_the_pictures_and_the_worst() -> None:
    found = table(RESULTS, "Quality")
    for number, row in numbered(RESULTS):
        quality = row.quality
        assert quality is not None
        for title, values, places in (
            ("PSNR, dB", quality.psnr, 1),
            ("SSIM", quality.ssim, 4),
            ("PSNR of settings, dB", quality.finest_psnr, 1),
        ):
            shown = cell(found, number, title)
            assert shown == Cell(f"{fmean(values):.{places}f}", (f"worst {min(values):.{places}f}",))
        assert value(cell(found, number, "latents").text) == pytest.approx(quality.latent_l2[-1], rel=THREE)
        assert cell(found, number, "accuracy").text == f"{100 * (quality.accuracy or 0):.1f}%"
    assert "LPIPS" not in found.head
    assert "8 prompts, against latentrt fp32 pictures" in found.caption


def test_a_larger_lpips_is_worse() -> None:
    row = bench_row(RESULTS, "latentrt", "int8", 1)
    assert row.quality is not None
    changed = with_row(RESULTS, replace(row, quality=replace(row.quality, lpips=(0.1, 0.3))))
    assert cell(table(changed, "Quality"), 5, "LPIPS") == Cell("0.2000", ("worst 0.3000",))


def test_a_row_is_beaten_only_by_one_of_its_batch_that_is_better() -> None:
    found = table(RESULTS, "Speed against its price")
    rows = dict(numbered(RESULTS))
    beaten = 0
    for number, row in rows.items():
        batch = row.case.subject.batch
        seconds = cell(found, number, "a picture, ms")
        assert value(seconds.text) == pytest.approx(1e3 * median(row.seconds) / batch, rel=THREE)
        price = cell(found, number, "PSNR, dB")
        assert row.quality is not None
        assert value(price.text) == pytest.approx(fmean(row.quality.psnr), rel=THREE)
        if price.notes[-1] != "on the front":
            by = rows[int(price.notes[-1].removeprefix("beaten by "))]
            assert by.quality is not None
            assert by.case.subject.batch == batch
            assert median(by.seconds) < median(row.seconds)
            assert fmean(by.quality.psnr) >= fmean(row.quality.psnr)
            beaten += 1
    # diffusers' fp16 by latentrt's fp32, in both batches at least.
    assert beaten >= 2
    assert cell(found, 5, "PSNR, dB").notes[-1] == "on the front"


def test_every_row_that_is_missing_or_other_says_why() -> None:
    found = table(RESULTS, "Not measured, or not as asked for")
    shown = [(row[0].text.partition(":")[0], row[1].text, row[2].text) for row in found.rows]
    assert [each[:2] for each in shown] == [("5", "yes"), ("6", "yes"), ("11", "no"), ("12", "no")]
    assert shown[0][2] == "vae_decoder: fp16, there is no int8 one"
    assert shown[2][2] == "diffusers: expected fp32 or fp16, got int8. It has no int8 networks."
    row = replace(RESULTS.rows[10], notes=("a note\nand its traceback",))
    assert table(with_row(RESULTS, row), found.title).rows[2][2] == Cell(shown[2][2], ("a note",))


def test_labels_leave_out_what_all_rows_share_and_no_more() -> None:
    labels, common = row_labels(RESULTS)
    assert list(labels.values())[:2] == ["1: latentrt fp32, batch 1", "2: latentrt fp32, batch 4"]
    assert common == f"{SIDE}x{SIDE}, DPM++ 2M karras, {STEPS} steps, guidance 5"
    row = RESULTS.rows[0]
    gpu = replace(row, case=replace(row.case, subject=replace(row.case.subject, backend="cuda")))
    labels, _ = row_labels(replace(RESULTS, rows=(row, gpu)))
    assert list(labels.values()) == ["1: latentrt fp32, onnxruntime", "2: latentrt fp32, cuda"]
    steps = replace(row, case=replace(row.case, settings=replace(row.case.settings, steps=5)))
    labels, common = row_labels(replace(RESULTS, rows=(row, steps)))
    assert list(labels.values()) == ["1: latentrt fp32, 20 steps", "2: latentrt fp32, 5 steps"]
    assert "steps" not in common


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.tuples(*[st.sampled_from("ab")] * n), max_size=5)))
def test_parts_are_split_without_loss(parts: list[tuple[str, ...]]) -> None:
    own, common = split_shared(parts)
    for whole, rest in zip(parts, own, strict=True):
        assert sorted((*rest, *common)) == sorted(whole)
    assert len(set(own)) == len(set(parts))


@pytest.mark.parametrize(
    ("results", "where"),
    [
        (RESULTS, "On the CPU; not run on a GPU."),
        (GPU, "On a GPU."),
        (bench_results(runs=6, random_weights=True), "On the CPU; not run on a GPU. Random weights: timing only."),
        (with_row(RESULTS, replace(RESULTS.rows[0], on_gpu=True)), "On the CPU and on a GPU, as the rows say."),
        (replace(RESULTS, rows=RESULTS.rows[10:]), "Nothing was measured."),
    ],
    ids=["cpu", "gpu", "random", "both", "nothing"],
)
def test_every_table_says_where_it_ran(results: Results, where: str) -> None:
    assert ran_where(results) == where
    tables = all_tables(results)
    assert tables
    assert all(each.caption.startswith(where) for each in tables)
    if "Random" in where:
        assert not {"Quality", "Speed against its price"} & {each.title for each in tables}


def test_rows_of_two_devices_name_theirs() -> None:
    both = table(with_row(RESULTS, replace(RESULTS.rows[0], on_gpu=True)), "Latency")
    assert [row[1].text for row in both.rows[:2]] == ["GPU", "CPU"]
    assert "on" not in table(RESULTS, "Latency").head


def test_the_verdict_is_the_fastest_row_and_that_of_the_peer_s_precision() -> None:
    found = [
        (each.ours.case.subject.precision, each.peer.case.subject.precision, each.ours.case.subject.batch)
        for each in verdicts(RESULTS)
    ]
    assert found == [("int8", "fp16", 1), ("fp16", "fp16", 1), ("int8", "fp16", 4), ("fp16", "fp16", 4)]
    ours, base = bench_row(RESULTS, "latentrt", "int8", 1), bench_row(RESULTS, "diffusers", "fp16", 1)
    ratio = median(theirs / own for theirs, own in zip(base.seconds, ours.seconds, strict=True))
    said = sentences(RESULTS)
    assert said[0].startswith(f"batch 1: latentrt int8 is {ratio:.2f} times as fast as diffusers fp16 (95 % interval ")
    assert ours.quality is not None
    assert said[0].endswith(f"; PSNR of its pictures {fmean(ours.quality.psnr):.1f} dB.")
    assert "PSNR" not in said[1]
    assert heading(RESULTS) == f"shapes: latentrt int8 is {ratio:.2f} times as fast as diffusers fp16, batch 1"
    alone = replace(RESULTS, rows=tuple(row for row in RESULTS.rows if row.case.subject.batch == 1))
    assert heading(alone) == f"shapes: latentrt int8 is {ratio:.2f} times as fast as diffusers fp16"


def test_cold_starts_and_open_ends_are_said() -> None:
    said = sentences(RESULTS)
    quickest = {
        system: min(median(start.process for start in row.cold) for row in found)
        for system, found in (("latentrt", _own("latentrt")), ("diffusers", _own("diffusers")))
    }
    times = re.findall(r"[\d.]+(?= s\b| times)", next(line for line in said if line.startswith("From the start")))
    expected = [quickest["latentrt"], quickest["diffusers"], quickest["diffusers"] / quickest["latentrt"]]
    assert [float(each) for each in times] == pytest.approx(expected, rel=THREE)
    assert "5 of 10 rows did not settle: their medians are known less well than to 2.0%." in said
    assert "2 of 12 rows were not measured; the last table says why." in said


def _own(system: System) -> list[Row]:
    return [row for row in RESULTS.rows if row.case.subject.system == system and row.cold]


def test_what_cannot_be_told_apart_is_not_called_faster() -> None:
    base = bench_row(RESULTS, "diffusers", "fp16", 1)
    ours = bench_row(RESULTS, "latentrt", "fp16", 1)
    equal = tuple(
        replace(run, seconds=theirs.seconds * (1.001 if place % 2 else 0.999))
        for place, (run, theirs) in enumerate(zip(ours.runs, base.runs, strict=True))
    )
    results = replace(RESULTS, rows=(replace(ours, runs=equal), base))
    assert heading(results).startswith("shapes: latentrt fp16 is neither faster nor slower than diffusers fp16")
    few = replace(RESULTS, rows=tuple(replace(row, runs=row.runs[:3]) for row in results.rows))
    assert re.search(r"is about [\d.]+ times as fast .*\(too few runs for an interval\)\.$", sentences(few)[0])
    slower = replace(RESULTS, rows=(replace(base, case=ours.case), replace(ours, case=base.case)))
    assert re.search(r"latentrt fp16 is 0\.6\d times as fast as diffusers fp16 \(", sentences(slower)[0])


@pytest.mark.parametrize("rows", [(), RESULTS.rows[10:]], ids=["none", "all skipped"])
def test_nothing_measured_is_said(rows: tuple[Row, ...]) -> None:
    results = replace(RESULTS, rows=rows)
    assert heading(results) == "shapes: nothing was measured"
    assert [each.title for each in all_tables(results)] == (["Not measured, or not as asked for"] if rows else [])


def test_one_run_has_no_spread() -> None:
    results = bench_results(runs=1)
    found = table(results, "Latency")
    assert cell(found, 1, "mean").notes == ()
    assert cell(found, 1, "runs").text == "1"
    assert cell(table(results, "Times as fast"), 1, "as diffusers").notes == ("too few runs",)


@given(st.floats(1e-9, 1e12), st.integers(1, 5))
def test_digits_round_and_have_no_powers_of_ten(number: float, significant: int) -> None:
    text = digits(number, significant)
    assert re.fullmatch(r"\d{1,3}(,\d{3})*(\.\d+)?", text)
    unit = max(10.0 ** (math.floor(math.log10(number)) - significant + 1), 1e-9)
    assert abs(float(text.replace(",", "")) - number) <= 0.5 * min(unit, 1) * (1 + 1e-6) + 1e-12 * number


@given(st.lists(st.floats(1e-6, 1e4), min_size=1))
def test_units_leave_a_digit_before_the_point(times: list[float]) -> None:
    unit = time_unit(times)
    assert min(times) / unit.size >= 1
    assert {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit.name] == unit.size


def test_units_of_nothing_are_the_largest() -> None:
    assert time_unit([]).name == "s"
    assert size_unit([0]).name == "GB"
    assert size_unit([2_500_000]).full(2_500_000) == "2.50 MB"
