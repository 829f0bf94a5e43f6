from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from latentrt.export import derived_graphs, graph_files
from latentrt.export.derived_graphs import build_prompt_split, build_uint8_decoder
from latentrt.export.graph_files import save_onnx
from latentrt.export.prompt_keys import split_prompt
from latentrt.export.vae_pictures import PictureOutputPass
from latentrt.runtime.components import PICTURES
from latentrt.runtime.errors import ExportError
from latentrt.runtime.latents import decode_latents, decode_to_uint8
from latentrt.runtime.prompt_keys import CACHED, PROMPT, SplitUnet
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.start_latents import unscale_latents

SCALES: list[dict[str, Any]] = [
    {"scaling_factor": 0.5},
    {},
    {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    {"scaling_factor": 0.5, "latents_mean": [-1.6, 2.3, 0.1, 0.7], "latents_std": [8.4, 5.9, 5.3, 5.7]},
]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle"))


@pytest.mark.parametrize("config", SCALES)
def test_pictures_are_those_of_the_runtime_byte_for_byte(
    config: dict[str, Any], bundle: Path, tiny_cases: dict[str, Any]
) -> None:
    source, path = bundle / "vae_decoder/model.fp16.onnx", bundle / "vae_decoder/uint8.fp16.onnx"
    made = build_uint8_decoder(source, path, config, tiny_cases["vae_decoder"], precision="fp16")
    assert made.files == (path,)
    assert made.parity == {
        **{case.name: {"differing_bytes": 0} for case in tiny_cases["vae_decoder"]},
        "worst_relative_l2": 0.0,
    }
    onnx.checker.check_model(str(path), full_check=True)
    rows = {name: config.get(name) for name in ("latents_mean", "latents_std")}
    facts: Any = SimpleNamespace(
        scaling_factor=config.get("scaling_factor", 0.18215),
        shift_factor=config.get("shift_factor", 0.0),
        **{name: None if row is None else np.float32(row).reshape(1, 4, 1, 1) for name, row in rows.items()},
    )
    latents = np.random.default_rng(0).standard_normal((2, 4, 6, 5)).astype(np.float32) * np.float32(0.4)
    wanted = decode_latents(OnnxSession(source, optimize=False), unscale_latents(facts, latents), scaling_factor=1.0)
    found = decode_to_uint8(OnnxSession(path, optimize=False), latents)
    np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(wanted)) > 50


def test_a_single_wrong_byte_fails(bundle: Path, tiny_cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = PictureOutputPass

    def slightly_off(scaling: float, *rest: Any) -> Any:
        return real(scaling * 1.0001, *rest)

    monkeypatch.setattr(derived_graphs, "PictureOutputPass", slightly_off)
    source = bundle / "vae_decoder/model.onnx"
    with pytest.raises(ExportError, match=rf"{PICTURES} fp32: expected the bytes .* got \d+ of \d+ others"):
        build_uint8_decoder(
            source,
            source.with_name("uint8.onnx"),
            {"scaling_factor": 0.5},
            tiny_cases["vae_decoder"],
            precision="fp32",
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_prompt_split_computes_what_the_unet_does(precision: str, bundle: Path, tiny_cases: dict[str, Any]) -> None:
    source = bundle / ("unet/model.onnx" if precision == "fp32" else "unet/model.fp16.onnx")
    paths = {PROMPT: source.with_name("prompt.onnx"), CACHED: source.with_name("cached.onnx")}
    made = build_prompt_split(source, paths, tiny_cases["unet"], precision=precision)
    assert {name: graph.files for name, graph in made.items()} == {name: (path,) for name, path in paths.items()}
    figures = made[PROMPT].parity
    assert figures == made[CACHED].parity
    assert 0 < figures["worst_relative_l2"] <= (1e-5 if precision == "fp32" else 5e-3)
    assert {case.name for case in tiny_cases["unet"]} < figures.keys()
    split = SplitUnet(*(OnnxSession(path, optimize=False) for path in paths.values()))
    whole = OnnxSession(source, optimize=False)
    for case in tiny_cases["unet"][:2]:
        np.testing.assert_array_equal(split(case.feeds)["out_sample"], whole(case.feeds)["out_sample"])


def test_a_split_with_other_keys_fails(
    bundle: Path, tiny_cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = split_prompt

    def swapped(model: ir.Model) -> tuple[ir.Model, ir.Model]:
        prompt, cached = real(model)
        first, second = prompt.graph.outputs[:2]
        first.name, second.name = second.name, first.name
        return prompt, cached

    monkeypatch.setattr(derived_graphs, "split_prompt", swapped)
    source = bundle / "unet/model.onnx"
    paths = {PROMPT: source.with_name("prompt.onnx"), CACHED: source.with_name("cached.onnx")}
    with pytest.raises(ExportError, match="unet_cached fp32: expected out_sample within relative L2"):
        build_prompt_split(source, paths, tiny_cases["unet"], precision="fp32")


def test_large_weights_stay_in_the_file_of_the_graph_that_they_came_from(
    bundle: Path, tiny_cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_files, "EXTERNAL_DATA_BYTES", 0)
    folder = bundle / "large"
    graph, data = save_onnx(ir.load(bundle / "unet/model.onnx"), folder / "model.onnx")
    before = data.read_bytes()
    paths = {PROMPT: folder / "prompt.onnx", CACHED: folder / "cached.onnx"}
    made = build_prompt_split(graph, paths, tiny_cases["unet"][:1], precision="fp32")
    assert {name: graph.files for name, graph in made.items()} == {name: (paths[name], data) for name in paths}
    assert data.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [
        "cached.onnx",
        "model.onnx",
        "model.onnx_data",
        "prompt.onnx",
    ]
