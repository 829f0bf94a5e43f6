"""The same results in the terminal, in Markdown and as a page."""

import base64
import io
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from bench_rows import OFF, PROMPTS, bench_results, bench_row, drawn_picture, with_row, write_pictures
from html_page import Page, assert_self_contained
from PIL import Image

from latentrt.benchmarks.html_report import page, write_html
from latentrt.benchmarks.markdown import markdown, write_markdown
from latentrt.benchmarks.picture_pairs import pictures_section
from latentrt.benchmarks.quality_pictures import reference_name
from latentrt.benchmarks.report_tables import all_tables
from latentrt.benchmarks.report_words import heading, sentences
from latentrt.benchmarks.results_file import Results
from latentrt.benchmarks.terminal import print_results
from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.image import Pictures

HOSTILE = "</title><script>alert(1)</script>|`[x](javascript:y)"
WHERE = "On the CPU; not run on a GPU."
# Few enough for rows that are not settled, enough for p90.
RESULTS = bench_results(runs=12)
ONCE = bench_results(runs=1)
RANDOM = bench_results(runs=6, random_weights=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("results")
    write_pictures(made, RESULTS)
    return made


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return page(RESULTS, folder)


@pytest.fixture(scope="module")
def found(text: str) -> Page:
    return Page(text)


def printed(results: Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    print_results(results)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def test_a_page_needs_nothing_but_itself(text: str, found: Page) -> None:
    assert_self_contained(text, found)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)


def test_a_page_can_be_read_without_seeing_it(text: str, found: Page) -> None:
    assert found.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in found.all("img"))
    assert all(plot["role"] == "img" and WHERE in str(plot["aria-label"]) for plot in found.all("svg"))
    assert len(found.captions) == len(found.all("table"))
    assert all(each["scope"] == "col" for each in found.all("th"))
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(found.ids) == len(set(found.ids))
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text)) <= set(found.ids)


def test_a_page_has_the_tables(found: Page) -> None:
    expected = [
        [" ".join(" ".join((cell.text, *cell.notes)).split()) for cell in row]
        for table in all_tables(RESULTS)
        for row in table.rows
    ]
    heads = [[" ".join(name.split()) for name in table.head] for table in all_tables(RESULTS)]
    cells = [[" ".join(cell.split()) for cell in row] for row in found.cells]
    assert [row for row in cells if row in heads] == heads
    assert [row for row in cells if row not in heads] == expected
    assert [" ".join(caption.split()) for caption in found.captions] == [each.caption for each in all_tables(RESULTS)]


def test_a_page_begins_with_the_verdict(found: Page) -> None:
    assert found.text.index(heading(RESULTS)) < found.text.index(sentences(RESULTS)[0]) < found.text.index("Latency")
    fastest = bench_row(RESULTS, "latentrt", "int8", 4)
    middle = float(np.median(fastest.seconds))
    assert f"images/s of the fastest, latentrt int8 batch 4{4 / middle:.2f}" in "".join(found.words)


def test_only_what_was_shown_has_the_colour_of_good_news(text: str, folder: Path) -> None:
    ours, base = bench_row(RESULTS, "latentrt", "fp32", 1), bench_row(RESULTS, "diffusers", "fp32", 1)
    assert '<div class="verdict">' in text
    for runs, swapped in ((3, False), (12, True)):
        rows = (replace(ours, runs=base.runs), replace(base, runs=ours.runs)) if swapped else (ours, base)
        few = tuple(replace(row, runs=row.runs[:runs], pictures=()) for row in rows)
        assert '<div class="verdict open">' in page(replace(RESULTS, rows=few), folder)


def test_plots_show_every_run_and_the_page_s_colours(text: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", text, re.S)
    names = [re.findall(r'id="([a-z-]+?)-', plot)[0] for plot in plots]
    assert names == ["latency", "turns", "stages", "memory", "roofline", "latents", *["pareto"] * 3]
    by_name = dict(zip(names, plots, strict=True))
    runs = sum(len(row.runs) for row in RESULTS.rows)
    for name in ("latency", "turns"):
        # Points of the legend are further ones, one a system.
        assert sum("<use" in line and "--series-" in line for line in by_name[name].splitlines()) == runs + 2
    for plot in plots:
        assert "currentColor" in plot
        assert not re.findall(r"#[01][0-9a-f][01][0-9a-f][01][0-9a-f]\b", plot.split("</defs>", 1)[1])
    assert all(f">{stage}<" in by_name["stages"] for stage in ("tokenize", "U-Net", "PNG", "other"))
    assert ">5: latentrt int8, batch 1<" in by_name["latents"]
    assert ">int8, CPU<" in by_name["roofline"]


def test_memory_on_a_gpu_has_a_plot_of_its_own(folder: Path) -> None:
    gpu = bench_results(runs=6, on_gpu=True)
    text = page(replace(gpu, rows=gpu.rows[:1]), folder)
    assert 'id="vram-figure_1"' in text
    assert "On a GPU." in text
    assert "not run on a GPU" not in text


def decoded(uri: str | None) -> Pictures:
    assert uri is not None
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def test_pictures_stand_beside_their_reference_and_their_difference(found: Page) -> None:
    images = found.all("img")
    # Of two batches the first: five rows that were measured, each with its difference, and the reference.
    assert len(images) == len(PROMPTS) * (1 + 2 * 5)
    np.testing.assert_array_equal(decoded(images[0]["src"]), drawn_picture(0, "fp32"))
    quality = bench_row(RESULTS, "latentrt", "int8", 1).quality
    assert quality is not None
    assert images[5]["alt"] == f"5: latentrt int8, batch 1, {quality.psnr[0]:.1f} dB"
    np.testing.assert_array_equal(decoded(images[5]["src"]), drawn_picture(0, "int8"))
    # The largest power of two that keeps int8's 4 levels within 255, for all rows alike.
    assert images[6]["alt"] == "5: latentrt int8, batch 1, difference 32 times"
    for place, precision in ((2, "fp32"), (4, "fp16"), (6, "int8")):
        assert np.unique(decoded(images[place]["src"])).tolist() == [32 * OFF[precision]]
    assert f"{PROMPTS[1]} DPM++ 2M karras, 20 steps, guidance 5; seed 101" in found.text


def test_without_a_reference_pictures_stand_alone(tmp_path: Path) -> None:
    row = bench_row(RESULTS, "latentrt", "int8", 1)
    results = replace(RESULTS, rows=(row,))
    write_pictures(tmp_path, results)
    for name in row.pictures:
        (tmp_path / reference_name(name)).unlink()
    images = Page(pictures_section(results, tmp_path)).all("img")
    assert [str(image["alt"]).partition(",")[0] for image in images] == ["1: latentrt int8"] * 2


def test_a_page_holds_the_pictures_of_twelve_rows_at_most(tmp_path: Path) -> None:
    first = replace(bench_row(RESULTS, "latentrt", "int8", 1), pictures=("pictures/000-latentrt-int8/00000.png",))
    rows = tuple(
        replace(first, case=replace(first.case, settings=replace(first.case.settings, steps=steps)))
        for steps in range(1, 15)
    )
    results = replace(RESULTS, rows=rows)
    write_pictures(tmp_path, results)
    found = Page(pictures_section(results, tmp_path))
    assert len([image for image in found.all("img") if "difference" in str(image["alt"])]) == 12
    assert "2 more rows are left out" in found.text


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"00000\.png: expected a picture"):
        pictures_section(replace(RESULTS, rows=RESULTS.rows[:1]), tmp_path)


def test_how_it_was_made_is_told(found: Page) -> None:
    for fact in (
        RESULTS.command,
        RESULTS.date,
        "Example CPU 9000",
        "onnxruntime 1.32.0",
        "unet/model.onnx " + "ab" * 32,
        "0.04% of a run",
        "run by run",
    ):
        assert fact in found.text
        assert fact.replace("_", r"\_") in markdown(RESULTS)


def test_equal_results_are_equal_files(folder: Path, tmp_path: Path) -> None:
    few = replace(RESULTS, rows=RESULTS.rows[:2])
    write_html(tmp_path / "report.html", few, folder)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(few, folder)
    write_markdown(tmp_path / "report.md", RESULTS)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == markdown(RESULTS)


def cells_of(line: str) -> list[str]:
    """The cells of a line of a GitHub table."""
    assert line[:2] == "| "
    assert line[-2:] == " |"
    return re.split(r"(?<!\\) \| ", line[2:-2])


def test_markdown_has_the_tables() -> None:
    blocks = markdown(RESULTS).split("\n## ")[1:]
    for table, block in zip(all_tables(RESULTS), blocks, strict=False):
        title, _, caption, _, head, rule, *lines = block.strip().splitlines()
        assert (title, WHERE in caption) == (table.title, True)
        assert cells_of(head) == [" ".join(name.split()) for name in table.head]
        assert cells_of(rule) == ["---"] * table.texts + ["---:"] * (len(table.head) - table.texts)
        shown = [[re.sub(r"\\(.)", r"\1", cell) for cell in cells_of(line)] for line in lines]
        assert shown == [["<br>".join((cell.text, *cell.notes)) for cell in row] for row in table.rows]


def test_the_terminal_keeps_numbers_whole_within_a_hundred_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for results in (RESULTS, bench_results(runs=100, on_gpu=True)):
        text = printed(results, capsys, monkeypatch)
        tables = text[text.index("\n\n") :]
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
        for table in all_tables(results):
            for row in table.rows:
                for cell in row[table.texts :]:
                    for line in (cell.text, *cell.notes):
                        assert re.search(rf"(?<= ){re.escape(line)}\s", tables), line
        assert len(re.findall("^ *5: latentrt", tables, re.M)) == len(all_tables(results))
        assert all(sentence in " ".join(text.split()) for sentence in sentences(results))


@pytest.mark.parametrize(
    "results",
    [
        replace(RESULTS, rows=()),
        replace(RESULTS, rows=RESULTS.rows[10:]),
        replace(ONCE, rows=ONCE.rows[:1]),
        replace(RANDOM, rows=RANDOM.rows[:2]),
    ],
    ids=["no rows", "all skipped", "one run", "random weights"],
)
def test_every_form_can_tell_of_little(
    results: Results, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(results, folder)
    found = Page(text)
    terminal = " ".join(printed(results, capsys, monkeypatch).split())
    plain = re.sub(r"\\(.)", r"\1", markdown(results))
    where = WHERE if any(row.runs for row in results.rows) else "Nothing was measured."
    for form in (found.text, terminal, plain):
        assert where in form
        assert heading(results) in form
        assert ("Random weights: timing only." in form) == results.random_weights
    for row in results.rows:
        if row.skipped is not None:
            assert row.skipped in found.text
            assert row.skipped in plain
    if results.random_weights:
        assert found.all("img") == []
        assert all("Random weights: timing only." in caption for caption in found.captions)


def test_what_others_wrote_is_text_and_not_markup(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(RESULTS.rows[10], skipped=HOSTILE)
    named = replace(RESULTS, model={**RESULTS.model, "name": HOSTILE}, command=f"latentrt bench ```{HOSTILE}")
    results = with_row(replace(named, rows=(*RESULTS.rows[:1], row)), row)
    text = page(results, folder)
    assert_self_contained(text, Page(text))
    # Title, heading, reason, command and model.
    assert Page(text).text.count(HOSTILE) == 5
    assert PROMPTS[1] in Page(text).text
    plain = markdown(results)
    fenced = f"````\nlatentrt bench ```{HOSTILE}\n````"
    assert fenced in plain
    outside = plain.replace(fenced, "")
    assert not re.search(r"(?<!\\)(<(?!br>)|`|\[)", outside)
    assert re.sub(r"\\(.)", r"\1", outside).count(HOSTILE) == 3
    missing = [line for line in plain.partition("## Not measured")[2].splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in missing] == [4] * 3
    found = printed(replace(results, model={"name": "[bold]x[/bold]"}), capsys, monkeypatch)
    assert "[bold]x[/bold]" in found
