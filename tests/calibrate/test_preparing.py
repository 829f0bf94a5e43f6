"""What a calibration refuses before it computes anything, and how prompts are shared out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from drawn import small_plan
from hypothesis import given
from hypothesis import strategies as st
from linked_bundles import edit_graph, linked

from latentrt.calibrate import requirements
from latentrt.calibrate.budget import parse_budgets
from latentrt.calibrate.calibration import verify_edited
from latentrt.calibrate.calibration_options import CalibrateOptions, captured_by, counts_for, drawn_by
from latentrt.calibrate.plan_file import save_plan
from latentrt.calibrate.preparing import network_on, prepare, prompts_for
from latentrt.calibrate.source import open_source
from latentrt.runtime.errors import ArtifactError, BackendError, CalibrationError, LatentrtError, UsageError
from latentrt.runtime.manifest import load_manifest, save_manifest

OPTIONS = CalibrateOptions(prompts="shapes", counts=(3, 2, 2), settings={"steps": 2})


@given(available=st.integers(3, 200), wanted=st.tuples(*(st.integers(1, 100),) * 3))
def test_prompts_are_shared_out_in_proportion(available: int, wanted: tuple[int, int, int]) -> None:
    found = counts_for(available, wanted)
    assert sum(found) == min(available, sum(wanted))
    assert min(found) >= 1
    if sum(wanted) <= available:
        assert found == wanted
    else:
        for count, asked in zip(found, wanted, strict=True):
            assert abs(count - available * asked / sum(wanted)) < 4


@pytest.mark.parametrize(("available", "wanted"), [(2, (1, 1, 1)), (100, (0, 1, 1)), (100, (5, 1, -1))])
def test_prompts_that_cannot_be_shared_out(available: int, wanted: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="prompts: expected"):
        counts_for(available, wanted)


def test_parts_share_neither_prompts_nor_seeds() -> None:
    options = dataclasses.replace(OPTIONS, seed=11, counts=(40, 20, 30), noise_prompts=4)
    split = prompts_for(options)
    captured = [captured_by(options, split, part) for part in ("calibration", "search", "verification")]
    # Ranges are taken of all; what noise is measured with is a few of those that are drawn.
    assert [len(each.prompts) for each in captured] == [40, 4, 4]
    seeds = [{each.seed + index for index in range(40)} for each in captured]
    assert len(set.union(*seeds)) == 3 * 40
    drawn = drawn_by(options, split, "verification", Path("a.bundle"))
    assert (drawn.prompts, drawn.seed) == (split.verification, 11)
    assert drawn.prompts[:4] == captured[2].prompts
    assert len({*split.calibration, *split.search, *split.verification}) == 90


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"device": "abacus"}, BackendError, "device: expected one that PyTorch has, got 'abacus'"),
        ({"judge": "none.py:shows"}, UsageError, "judge: expected a Python file, found none at none.py"),
        ({"lpips": Path("none.safetensors")}, ArtifactError, "none.safetensors: expected a safetensors file"),
        ({"budgets": parse_budgets(["accuracy=0.1"])}, UsageError, "budget accuracy: expected a judge"),
        ({"times": Path("none.json")}, UsageError, "none.json: expected a JSON file of layer times"),
        ({"prompts": "none.txt"}, UsageError, "none.txt: expected a file of prompts"),
        ({"counts": (1, 0, 1)}, UsageError, "prompts: expected 1 or more for each part"),
        ({"timesteps": 1}, UsageError, "timesteps: expected 2 or more"),
        ({"component": "text_encoder"}, UsageError, "component: expected unet or vae_decoder"),
        ({"settings": {"height": 63, "width": 64}}, UsageError, "height: expected a positive multiple of 8, got 63"),
        ({"settings": {"guidance": float("nan")}}, UsageError, "guidance: expected a finite number"),
        ({"loras": {"none": None}}, UsageError, "expected a LoRA of the bundle, got 'none'"),
    ],
)
def test_options_are_refused_before_anything_is_drawn(
    shapes_bundle: Path, tmp_path: Path, changes: dict[str, Any], error: type[LatentrtError], message: str
) -> None:
    bundle = linked(shapes_bundle, tmp_path / "shapes.bundle")
    with pytest.raises(error) as caught:
        prepare(bundle, dataclasses.replace(OPTIONS, **changes))
    assert message in str(caught.value)
    assert not (bundle / "calibration").exists()


@pytest.mark.parametrize(("gone", "message"), [("fp32", "in fp32"), ("fp16", "expected unet in fp16 as well")])
def test_both_precisions_are_needed(shapes_bundle: Path, tmp_path: Path, gone: str, message: str) -> None:
    bundle = linked(shapes_bundle, tmp_path / "shapes.bundle")
    manifest = load_manifest(bundle)
    kept = tuple(each for each in manifest.artifacts if (each.component, each.precision) != ("unet", gone))
    (bundle / "manifest.json").unlink()
    save_manifest(bundle, dataclasses.replace(manifest, artifacts=kept, engines=()))
    with pytest.raises(UsageError, match=message):
        prepare(bundle, OPTIONS)


def test_too_little_memory_is_said_before_it_is_needed(shapes_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(shapes_bundle)
    weights = 4 * sum(int(np.prod(weight.shape)) for weight in source.network.weights.values())
    monkeypatch.setattr(requirements, "available_memory", lambda: weights - 1)
    with pytest.raises(UsageError, match="GB of free memory for its weights in float32"), network_on(source, "cpu"):
        pass
    monkeypatch.setattr(requirements, "available_memory", lambda: weights)
    with network_on(source, "cpu") as network:
        assert not any(parameter.is_meta for parameter in network.parameters())


def test_a_nan_of_the_network_is_named_with_its_timestep(shapes_bundle: Path, tmp_path: Path) -> None:
    def poison(model: onnx.ModelProto) -> None:
        weight = next(
            each for each in model.graph.initializer if each.name.endswith("mid_block.resnets.0.conv1.weight")
        )
        values = onnx.numpy_helper.to_array(weight).copy()
        values.flat[0] = np.nan
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    bundle = linked(shapes_bundle, tmp_path / "shapes.bundle")
    edit_graph(bundle, poison)
    with pytest.raises(CalibrationError, match=r"NaN or infinity in out_sample at timestep \d+ of prompt 1, '"):
        prepare(bundle, OPTIONS)


def test_a_plan_for_another_graph_is_refused_before_anything_is_drawn(shapes_bundle: Path, tmp_path: Path) -> None:
    path, _ = save_plan(small_plan(), tmp_path / "int8.plan.json")
    bundle = linked(shapes_bundle, tmp_path / "shapes.bundle")
    with pytest.raises(CalibrationError, match="expected a plan for this graph, got a plan for another graph"):
        verify_edited(bundle, path, OPTIONS)
    assert not (bundle / "unet/model.int8.onnx").exists()
