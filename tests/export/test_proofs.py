from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentrt.export import proofs
from latentrt.export.component import Component
from latentrt.export.graph_builder import components_of
from latentrt.export.proofs import effort_for, note_proven
from latentrt.export.reference_run import LARGE, NONE, QUICK, THOROUGH, Effort
from latentrt.runtime.errors import UsageError

OPSET = 20


@pytest.fixture
def components(tiny_networks: dict[str, Any]) -> dict[str, Component]:
    return components_of(tiny_networks)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny U-Net counts as large, and nothing else does."""
    monkeypatch.setattr(proofs, "LARGE_BYTES", 4 * 80_000)


def test_small_networks_are_always_compared_thoroughly(components: dict[str, Component], tmp_path: Path) -> None:
    graphs = [(component, "fp16") for component in components.values()]
    for component, precision in graphs:
        note_proven(component, precision, THOROUGH, opset=OPSET, cache=tmp_path)
    assert effort_for("auto", graphs, opset=OPSET, cache=tmp_path) == THOROUGH
    assert effort_for("full", graphs, opset=OPSET, cache=tmp_path) == THOROUGH
    assert effort_for("quick", graphs, opset=OPSET, cache=tmp_path) == QUICK


@pytest.mark.usefixtures("large")
def test_large_networks_are_until_all_of_their_graphs_are_proven(
    components: dict[str, Component], tmp_path: Path
) -> None:
    graphs = [(components["unet"], "fp32"), (components["unet"], "fp16"), (components["vae_decoder"], "fp16")]
    for component, precision in graphs:
        assert effort_for("auto", graphs, opset=OPSET, cache=tmp_path) == LARGE
        note_proven(component, precision, LARGE, opset=OPSET, cache=tmp_path)
    assert effort_for("auto", graphs, opset=OPSET, cache=tmp_path) == QUICK
    assert effort_for("full", graphs, opset=OPSET, cache=tmp_path) == LARGE
    assert effort_for("auto", graphs, opset=18, cache=tmp_path) == LARGE
    assert effort_for("auto", [*graphs, (components["unet"], "bf16")], opset=OPSET, cache=tmp_path) == LARGE


@pytest.mark.usefixtures("large")
def test_a_quick_look_proves_nothing(components: dict[str, Component], tmp_path: Path) -> None:
    note_proven(components["unet"], "fp32", QUICK, opset=OPSET, cache=tmp_path)
    assert effort_for("auto", [(components["unet"], "fp32")], opset=OPSET, cache=tmp_path) == LARGE


def test_a_cache_that_cannot_be_written_is_no_error(components: dict[str, Component], tmp_path: Path) -> None:
    note_proven(components["unet"], "fp32", THOROUGH, opset=OPSET, cache=tmp_path / "not there")
    assert not list(tmp_path.iterdir())


def test_a_quick_effort_asks_for_less() -> None:
    def work(effort: Effort) -> int:
        return effort.prompts * effort.steps * effort.largest_latent**2

    assert work(NONE) == 0 < work(QUICK) < work(LARGE) < work(THOROUGH)
    assert [effort.name for effort in (NONE, QUICK, LARGE, THOROUGH)] == ["none", "quick", "full", "full"]


def test_no_check_is_for_what_passed_a_full_one_in_just_that_precision(
    components: dict[str, Component], tmp_path: Path
) -> None:
    unet, decoder = components["unet"], components["vae_decoder"]
    note_proven(unet, "fp16", THOROUGH, opset=OPSET, cache=tmp_path)
    assert effort_for("none", [(unet, "fp16")], opset=OPSET, cache=tmp_path) == NONE
    # An fp16 that was made mixed: another checkpoint may have to keep other tensors, and running it shows which.
    note_proven(decoder, "mixed", THOROUGH, opset=OPSET, cache=tmp_path)
    wanted = r"check: expected vae_decoder in fp16 to have passed a full check .* Export with --check auto"
    with pytest.raises(UsageError, match=wanted):
        effort_for("none", [(unet, "fp16"), (decoder, "fp16")], opset=OPSET, cache=tmp_path)


@pytest.mark.usefixtures("large")
def test_a_mixed_graph_proves_the_fp16_it_was_asked_for_as(components: dict[str, Component], tmp_path: Path) -> None:
    note_proven(components["unet"], "mixed", LARGE, opset=OPSET, cache=tmp_path)
    assert effort_for("auto", [(components["unet"], "fp16")], opset=OPSET, cache=tmp_path) == QUICK
    assert effort_for("auto", [(components["unet"], "bf16")], opset=OPSET, cache=tmp_path) == LARGE
