"""The VAE's decoder in int8: calibrated, measured by its own effect, and drawn with beside a U-Net in int8."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from linked_bundles import linked

from latentrt.calibrate.calibrate_output import note_of
from latentrt.calibrate.picture_metrics import psnr
from latentrt.calibrate.verification import load_verification
from latentrt.export.derived_graphs import build_uint8_decoder
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.cli import main
from latentrt.runtime.components import PICTURES, Components
from latentrt.runtime.latents import decode_latents
from latentrt.runtime.manifest import load_manifest, record_of, save_manifest
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.session import OnnxSession

DRAWN = ["--steps", "2", "--size", "64x64", "--seed", "3", "--counts", "3,1,2"]
SETTINGS: dict[str, Any] = {"steps": 2, "width": 64, "height": 64}


def with_pictures(bundle: Path) -> None:
    """Add the decoder that rounds to uint8 in its graph, which the runtime prefers where it is."""
    config = json.loads((bundle / "vae_decoder/config.json").read_text())
    path = bundle / "vae_decoder/uint8.onnx"
    build_uint8_decoder(bundle / "vae_decoder/model.onnx", path, config, [], precision="fp32")
    manifest = load_manifest(bundle)
    plain = manifest.artifact("vae_decoder", "fp32")
    assert plain is not None
    name = "vae_decoder/uint8.onnx"
    artifact = dataclasses.replace(plain, component=PICTURES, path=name, files=(name,))
    (bundle / "manifest.json").unlink()
    files = {**manifest.files, name: record_of(path)}
    save_manifest(bundle, dataclasses.replace(manifest, files=files, artifacts=(*manifest.artifacts, artifact)))


@pytest.fixture(scope="module")
def calibrated(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose decoder is in int8 too. Not to be changed."""
    bundle = linked(shapes_bundle, tmp_path_factory.mktemp("decoder") / "shapes.bundle")
    with_pictures(bundle)
    prompts = bundle.parent / "prompts.txt"
    prompts.write_text("a red star\na blue circle\na green square\na white ring\na red heart\na blue cross\n")
    command = ["calibrate", str(bundle), "--component", "vae_decoder", "--prompts", str(prompts), "--json"]
    assert main([*command, *DRAWN, "--budget", "psnr=25"]) == 0
    return bundle


def test_its_own_effect_is_measured_beside_networks_in_fp32(calibrated: Path) -> None:
    found = load_verification(calibrated / "calibration/vae_decoder/verification-int8/verification.json")
    for precision in ("fp16", "int8"):
        used = found.measured[precision].precisions
        assert (used["unet"], used["vae_decoder"]) == ("fp32", precision)
    # The same latents, decoded by somebody else.
    config = json.loads((calibrated / "vae_decoder/config.json").read_text())
    decoders = [OnnxSession(calibrated / f"vae_decoder/model{name}.onnx") for name in ("", ".int8.cpu")]
    with Pipeline.load(calibrated, precision="fp32", backend="onnxruntime") as pipeline:
        results = [
            pipeline(prompt, seed=found.seed + index, decode=False, **SETTINGS)
            for index, prompt in enumerate(found.prompts)
        ]
    latents = np.concatenate([result.latents for result in results])
    exact, int8 = (decode_latents(each, latents, scaling_factor=config["scaling_factor"]) for each in decoders)
    values = found.measured["int8"].metrics["psnr"].values
    np.testing.assert_allclose(values, psnr(exact, int8), atol=0.05)
    assert 25 < min(values) < max(values) < 70
    assert "calibrate the U-Net after it" in note_of(found)
    assert "U-Net" not in note_of(dataclasses.replace(found, component="unet"))


def test_plans_are_measured_through_the_network_that_is_calibrated(calibrated: Path) -> None:
    """And not through what was derived from it, which would draw as before."""
    (file,) = calibrated.glob("calibration/vae_decoder/plan-*/trials-*.json")
    trials = json.loads(file.read_text())
    assert all(25 < trial["psnr"] < 70 for trial in trials.values())
    # One timestep, which it is not told.
    plan = json.loads((calibrated / "vae_decoder/int8.plan.json").read_text())
    assert plan["made"]["statistics"]["bins"] == 1


def test_it_is_drawn_with_beside_a_unet_in_int8_and_not_without(calibrated: Path, tmp_path: Path) -> None:
    assert "int8" not in open_bundle(calibrated).precisions()
    bundle = open_bundle(linked(calibrated, tmp_path / "both.bundle"))
    assert bundle.manifest is not None
    unet = bundle.manifest.artifact("unet", "fp16")
    assert unet is not None
    artifacts = (*bundle.manifest.artifacts, dataclasses.replace(unet, precision="int8"))
    both = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, artifacts=artifacts))
    components = Components(both, "int8", verify=False, backend="onnxruntime")
    # The one that rounds in its graph is in fp32 here.
    assert (both.precision_of("vae_decoder", "int8"), components.picture_decoder) == ("int8", "vae_decoder")
    assert Components(both, "fp32", verify=False, backend="onnxruntime").picture_decoder == PICTURES


def test_its_graphs_hold_the_same_integers(calibrated: Path) -> None:
    full, half = (ir.load(calibrated / f"vae_decoder/model.int8{name}.onnx").graph for name in (".cpu", ""))
    stored = [name for name, value in full.initializers.items() if value.dtype == ir.DataType.INT8]
    assert sum(name.endswith(".weight.int8") for name in stored) >= 25
    for name in stored:
        ours, theirs = (graph.initializers[name].const_value for graph in (full, half))
        assert ours is not None
        assert theirs is not None
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
