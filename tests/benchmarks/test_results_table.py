"""The tables of README.md against figures reckoned here from the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measured_sections import Kept
from measured_tables import README_SECTIONS
from project_rows import MIB, made_results, made_row
from results_table import BEGIN, DOCUMENTS, END, main, outdated, with_tables

from latentrt.benchmarks.report_cells import NOTHING
from latentrt.benchmarks.results_file import Results, save_results
from latentrt.runtime.errors import ArtifactError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = f"# title\n\nbefore\n\n{BEGIN}\nbygone\n{END}\n\nafter\n"
OURS = (0.40, 0.42, 0.41, 0.44, 0.43, 0.45)
THEIRS = (0.80, 0.63, 0.82, 0.88, 0.86, 0.99)


def small(*more: Any) -> Results:
    return made_results(
        made_row("latentrt", OURS, cold=(1.0, 1.4, 1.2)),
        made_row("latentrt", [2 * time for time in OURS], precision="int8"),
        made_row("diffusers", THEIRS, cold=(7.0, 6.0, 7.2), loaded=400 * MIB),
        *more,
    )


def kept_results(folder: Path, **files: Results) -> Kept:
    for name, results in files.items():
        save_results(folder / f"{name.replace('_', '-')}.json", results)
    return Kept(folder, "results/")


def section(title: str, kept: Kept) -> str:
    return next(each for each in README_SECTIONS if each.title == title).text(kept)


def cells(text: str) -> dict[str, list[str]]:
    """Rows of the only table of a text, by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines[2:]}


def test_documents_are_those_of_their_files() -> None:
    assert not [str(path) for path in outdated(ROOT)]


def test_end_to_end_has_medians_ratios_and_intervals(tmp_path: Path) -> None:
    # Twice as slow at full width in every round: an interval of one point.
    large = made_results(
        made_row("latentrt", [10 * time for time in OURS]),
        made_row("optimum", [20 * time for time in OURS]),
        random_weights=True,
    )
    text = section("End to end", kept_results(tmp_path, end_to_end_cpu=small(), full_size_cpu=large))
    ratios = np.array(THEIRS) / np.array(OURS)
    ratio = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"  # of six, the ends hold at 96.9 %
    found = cells(text)
    assert found["diffusers fp32"] == ["840 ms", ratio, NOTHING, NOTHING]
    assert found["latentrt fp32"] == ["425 ms", "1", "4.25 s", "1"]
    assert found["latentrt int8"][:2] == ["850 ms", "2.00 (2.00 to 2.00)"]
    assert found["optimum fp32"] == [NOTHING, NOTHING, "8.50 s", "2.00 (2.00 to 2.00)"]


def test_every_table_says_where_it_ran_and_by_what_command(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    kept = kept_results(tmp_path, end_to_end_cpu=small(), full_size_cpu=small())
    write_exports(tmp_path)
    for each in README_SECTIONS:
        text = each.text(kept)
        assert each.command in text
        assert all(f"[{name}](results/{name})" in text for name in each.files)
        assert "not run on a GPU" in text, each.title


def test_peers_that_were_not_measured_say_why(tmp_path: Path) -> None:
    with_skipped = small(made_row("torch-compile", (), skipped="no C++ compiler"))
    kept = kept_results(tmp_path, end_to_end_cpu=with_skipped, full_size_cpu=small())
    assert section("End to end", kept).count("torch-compile fp32 was not measured: no C++ compiler.") == 1


def test_random_weights_are_marked(tmp_path: Path) -> None:
    kept = kept_results(
        tmp_path, end_to_end_cpu=small(), full_size_cpu=made_results(*small().rows, random_weights=True)
    )
    assert section("End to end", kept).count("Random weights: timing only.") == 1


def test_cold_starts_and_memory(tmp_path: Path) -> None:
    found = cells(section("Cold start and memory", kept_results(tmp_path, end_to_end_cpu=small())))
    # Peak memory is that of the fresh process, in which made_row has twice what is loaded.
    assert found["latentrt fp32"] == ["1.20 s", "1.00", "300 ms", "100 MiB", "200 MiB"]
    assert found["diffusers fp32"] == ["7.00 s", f"{7.0 / 1.2:.2f}", "1.75 s", "400 MiB", "800 MiB"]
    assert "latentrt int8" not in found


def write_exports(folder: Path) -> None:
    ours = {"seconds": 50.4, "peak_mib": 1200, "nodes": 900, "bytes": 39_000_000, "files": 4}
    theirs = {"seconds": 20.0, "peak_mib": 2400, "nodes": 2000, "bytes": 41_500_000, "files": 8}
    graph = {"unet": {"nodes": 900, "bytes": 39_000_000, "files": 4, "opset": 20}}
    ways = {
        "latentrt": {**ours, "components": graph},
        "optimum-cli": {**theirs, "components": {"unet": {**theirs, "nodes": 1990, "opset": 18}}},
    }
    (folder / "export-cpu.json").write_text(json.dumps({"exports": {"shapes": ways}}))
    failed = {"latentrt": {**ours, "components": graph}, "optimum-cli": {"failed": "out of memory"}}
    (folder / "export-full-size-cpu.json").write_text(json.dumps({"exports": {"sd1": failed}}))


def test_exports_show_what_failed(tmp_path: Path) -> None:
    write_exports(tmp_path)
    found = cells(section("Export against optimum-cli", Kept(tmp_path, "")))
    assert found["shapes: latentrt"] == ["50 s", "1,200 MiB", "4", "39.0 MB", "900"]
    assert found["shapes: optimum-cli"] == ["20 s", "2,400 MiB", "8", "41.5 MB", "2,000"]
    assert found["SD 1.5, random weights: optimum-cli"][0] == "failed"


def test_graphs_stand_beside_those_of_optimum(tmp_path: Path) -> None:
    write_exports(tmp_path)
    sections, _ = DOCUMENTS["benchmarks/results/README.md"]
    found = cells(next(each for each in sections if each.title == "Graphs").text(Kept(tmp_path, "")))
    assert found["shapes: unet"] == ["900", "1,990", "39.00 MB", "41.50 MB"]
    assert found["SD 1.5, random weights: unet"] == ["900", NOTHING, "39.00 MB", NOTHING]


def test_quality_of_int8_is_what_the_file_has() -> None:
    report = json.loads((RESULTS / "int8-shapes.json").read_text())["table"]
    found = cells(section("Quality of int8", Kept(RESULTS, "")))
    plan = report["latentrt, sqnr=28"]
    assert found["`latentrt calibrate --budget sqnr=28`"] == [
        f"{100 * plan['macs_int8']:.1f} %",
        f"{plan['psnr']['mean']:.1f} dB",
        f"{plan['sqnr_guided']['mean_db']:.1f} dB",
        f"{100 * plan['accuracy']:.1f} %",
    ]
    assert len(found) == len(report)


def test_samplers_range_over_the_file() -> None:
    rows = json.loads((RESULTS / "samplers-cpu.json").read_text())["rows"]
    ratios = [row["diffusers_us"] / row["latentrt_us"] for row in rows]
    text = section("Samplers", Kept(RESULTS, ""))
    assert f"is {min(ratios):.1f} to {max(ratios):.0f} times faster" in text


def growth_files(folder: Path) -> None:
    for varied, values in {"batch": (1, 4), "size": (64, 128), "steps": (5, 20)}.items():
        rows = []
        for value, factor in zip(values, (1, 3), strict=True):
            varying: dict[str, Any] = {"width" if varied == "size" else varied: value}
            rows.append(made_row("latentrt", [factor * time for time in OURS], **varying))
            rows.append(made_row("diffusers", [2 * factor * time for time in OURS], **varying))
        save_results(folder / f"growth-{varied}-cpu.json", made_results(*rows))


def test_growth_is_in_multiples_of_the_first(tmp_path: Path) -> None:
    growth_files(tmp_path)
    sections, _ = DOCUMENTS["benchmarks/results/README.md"]
    found = cells(next(each for each in sections if each.title == "Growth").text(Kept(tmp_path, "")))
    twice = "2.00 (2.00 to 2.00)"
    assert found["batch 1"] == ["425 ms", "1.00", "850 ms", "1.00", twice]
    assert found["batch 4"] == ["1.27 s", "3.00", "2.55 s", "3.00", twice]
    assert found["64x64"][1] == found["5 steps"][1] == "1.00"
    assert found["128x128"][1] == found["20 steps"][1] == "3.00"


def test_only_what_stands_between_the_markers_changes() -> None:
    made = with_tables("README.md", DOCUMENT, README_SECTIONS, Kept(RESULTS, ""))
    assert made.startswith(f"# title\n\nbefore\n\n{BEGIN}\n")
    assert made.endswith(f"{END}\n\nafter\n")
    assert "bygone" not in made
    assert with_tables("README.md", made, README_SECTIONS, Kept(RESULTS, "")) == made


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"README\.md: expected lines <!-- measured:begin -->"):
        with_tables("README.md", "no markers\n", README_SECTIONS, Kept(RESULTS, ""))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    assert "not measured yet: no samplers-cpu.json. `make bench ONLY=samplers`" in section(
        "Samplers", Kept(tmp_path, "")
    )


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samplers-cpu.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"samplers-cpu\.json: expected results"):
        section("Samplers", Kept(tmp_path, ""))


def test_check_writes_nothing_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    for name in DOCUMENTS:
        (tmp_path / name).write_text(DOCUMENT)
    assert main(["--root", str(tmp_path), "--check"]) == 1
    assert (tmp_path / "README.md").read_text() == DOCUMENT
    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--root", str(tmp_path), "--check"]) == 0
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("48.2 dB", "49.2 dB"))
    assert main(["--root", str(tmp_path), "--check"]) == 1
    assert "README.md" in capsys.readouterr().out
