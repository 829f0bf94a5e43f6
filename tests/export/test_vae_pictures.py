from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_graphs import model_of

from latentrt.export.half_precision import HalfPrecisionPass
from latentrt.export.vae_pictures import PictureOutputPass
from latentrt.runtime.components import PICTURES
from latentrt.runtime.errors import BackendError, ExportError
from latentrt.runtime.latents import decode_latents, decode_to_uint8
from latentrt.runtime.manifest import Artifact, record_of, update_manifest
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.start_latents import unscale_latents

# The first three channels of the latents are the picture.
DECODER = """
    decoder (float[batch,4,height,width] latent_sample) => (float[batch,3,height,width] sample)
    <int64[1] start = {0}, int64[1] end = {3}, int64[1] axis = {1}>
    { sample = Slice(latent_sample, start, end, axis) }
"""
SCALES: list[dict[str, Any]] = [
    {"scaling_factor": 0.18215},
    {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    {"scaling_factor": 0.5, "latents_mean": [-1.6, 2.3, 0.1, 0.7], "latents_std": [8.4, 5.9, 5.3, 5.7]},
]


def facts_of(scale: dict[str, Any]) -> Any:
    """What the runtime reads of a VAE's config."""
    given = {"shift_factor": 0.0, "latents_mean": None, "latents_std": None} | scale
    for name in ("latents_mean", "latents_std"):
        if given[name] is not None:
            given[name] = np.asarray(given[name], np.float32).reshape(1, -1, 1, 1)
    return SimpleNamespace(**given)


def sessions(folder: Path, scale: dict[str, Any]) -> tuple[OnnxSession, OnnxSession]:
    """The decoder, and the one made of it."""
    for name, changed in (("plain.onnx", False), ("pictures.onnx", True)):
        model = model_of(DECODER)
        if changed:
            PictureOutputPass(**scale)(model)
        ir.save(model, folder / name)
        onnx.checker.check_model(folder / name, full_check=True)
    return OnnxSession(folder / "plain.onnx"), OnnxSession(folder / "pictures.onnx")


@pytest.mark.parametrize("scale", SCALES)
def test_the_bytes_are_those_of_the_host(scale: dict[str, Any], tmp_path: Path) -> None:
    plain, pictures = sessions(tmp_path, scale)
    rng = np.random.default_rng(0)
    latents = (rng.standard_normal((3, 4, 64, 48)) * 0.3).astype(np.float32)
    wanted = decode_latents(plain, unscale_latents(facts_of(scale), latents), scaling_factor=1.0)
    found = decode_to_uint8(pictures, latents)
    assert found.shape == (3, 64, 48, 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(wanted)) > 100


def test_ties_and_the_ends_of_the_range_are_rounded_alike(tmp_path: Path) -> None:
    """Every float32 around every value at which a picture's byte changes."""
    plain, pictures = sessions(tmp_path, {"scaling_factor": 1.0})
    edges = ((np.arange(256) + 0.5) / 255 * 2 - 1).astype(np.float32)
    values = [edges]
    for direction in (-np.inf, np.inf):
        value = edges
        for _ in range(8):
            value = np.nextafter(value, np.float32(direction))
            values.append(value)
    row = np.concatenate([*values, np.array([-1e30, -1, -0.0, 0, 1, 1e30, 3e38], np.float32)])
    latents = np.broadcast_to(row, (1, 4, 1, row.size)).astype(np.float32)
    found = decode_to_uint8(pictures, latents)
    np.testing.assert_array_equal(found, decode_latents(plain, latents, scaling_factor=1.0))
    unit = np.clip(row * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    ties = unit == np.floor(unit) + 0.5
    assert ties.sum() > 50
    assert {0, 1} == set((found[0, 0, ties, 0] - unit[ties] + 0.5).tolist()), "some ties go up and some down"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_picture_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    _, pictures = sessions(tmp_path, {"scaling_factor": 1.0})
    latents = np.zeros((2, 4, 8, 8), np.float32)
    decode_to_uint8(pictures, latents)
    latents[1, 2, 3, 4] = value
    with pytest.raises(BackendError, match=r"expected finite numbers, got NaN or infinity in picture \[0\] of 1.*fp32"):
        decode_to_uint8(pictures, latents)


def test_another_graph_is_refused() -> None:
    text = "net (float[b,4] sample) => (float[b,4] out_sample) { out_sample = Neg(sample) }"
    with pytest.raises(ExportError, match="expected a decoder from latent_sample to sample"):
        PictureOutputPass(1.0)(model_of(text))


@pytest.fixture
def picture_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle with a decoder for pictures in fp32, and its U-Net's decoder in mixed instead of fp16."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    model = ir.load(bundle / "vae_decoder/model.onnx")
    PictureOutputPass(0.5)(model)
    ir.save(model, bundle / "vae_decoder/uint8.onnx")
    mixed = ir.load(bundle / "vae_decoder/model.onnx")
    HalfPrecisionPass()(mixed)
    ir.save(mixed, bundle / "vae_decoder/model.mixed.onnx")

    def change(manifest: Any) -> Any:
        full = manifest.artifact("vae_decoder", "fp32")
        made = [("vae_decoder/uint8.onnx", PICTURES, "fp32"), ("vae_decoder/model.mixed.onnx", "vae_decoder", "mixed")]
        added = [
            dataclasses.replace(full, component=component, precision=precision, path=path, files=(path,))
            for path, component, precision in made
        ]
        kept: list[Artifact] = [a for a in manifest.artifacts if (a.component, a.precision) != ("vae_decoder", "fp16")]
        records = {path: record_of(bundle / path) for path, _, _ in made}
        return dataclasses.replace(manifest, artifacts=(*kept, *added), files={**manifest.files, **records})

    update_manifest(bundle, change)
    return bundle


def test_a_bundle_with_it_draws_the_same_pictures(tiny_bundle: Path, picture_bundle: Path) -> None:
    plain, pictures = Pipeline.load(tiny_bundle), Pipeline.load(picture_bundle)
    settings: dict[str, Any] = {"steps": 2, "seed": 3, "batch": 2, "width": 64, "height": 64}
    wanted = plain("a red circle", **settings)
    found = pictures("a red circle", **settings)
    np.testing.assert_array_equal(found.images, wanted.images)
    assert pictures.precisions["vae_decoder_uint8"] == "fp32"
    assert "vae_decoder" not in pictures.precisions, "one decoder is enough"
    # Tiles are blended as floats.
    tiled = pictures("a red circle", **settings, tile=32)
    np.testing.assert_array_equal(tiled.images, plain("a red circle", **settings, tile=32).images)
    assert "vae_decoder" in pictures.precisions


def test_a_run_in_fp16_takes_a_mixed_graph_where_there_is_no_other(picture_bundle: Path) -> None:
    half = Pipeline.load(picture_bundle, precision="fp16")
    half("a red circle", steps=1, width=64, height=64)
    assert half.precision == "fp16"
    assert half.precisions == {"text_encoder": "fp16", "unet": "fp16", "vae_decoder": "mixed"}
    assert half.model.components.bundle.precisions() == ["fp32", "fp16"]
