"""LoRAs at run time: loaded with a pipeline, swapped in it, recorded in pictures and replayed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from latentrt.export.lora_bundle import add_lora
from latentrt.runtime import Pipeline
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.cli import main
from latentrt.runtime.components import Components
from latentrt.runtime.errors import UsageError
from latentrt.runtime.generate_options import read_loras
from latentrt.runtime.graph_weights import GraphWeights
from latentrt.runtime.lora_store import open_loras
from latentrt.runtime.lora_weights import lora_notes
from latentrt.runtime.manifest import update_manifest
from latentrt.runtime.picture_metadata import read_metadata
from latentrt.runtime.picture_text import bundle_digest
from latentrt.runtime.specs import Array

PROMPT = "a small red circle on a blue background"
DRAWING: dict[str, Any] = {"steps": 2, "seed": 3, "width": 64, "height": 64, "decode": False}


def write_lora(path: Path, bundle: Path, networks: Mapping[str, str]) -> Path:
    """Random factors for weights whose names hold a word, by network."""
    rng, tensors = np.random.default_rng(len(path.stem)), {}
    for network, word in networks.items():
        for parameter, weight in GraphWeights.open(bundle / network / "model.onnx").by_parameter.items():
            if word in parameter and parameter.endswith("weight") and len(weight.shape) == 2:
                key = f"{network}.{parameter.removesuffix('.weight')}"
                tensors[f"{key}.lora_A.weight"] = rng.standard_normal((2, weight.shape[1])).astype(np.float32)
                tensors[f"{key}.lora_B.weight"] = 0.03 * rng.standard_normal((weight.shape[0], 2)).astype(np.float32)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def bundle(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes bundle with a LoRA of both networks and one of the U-Net alone."""
    folder = tmp_path_factory.mktemp("lora")
    copy = Path(shutil.copytree(shapes_bundle, folder / "shapes.bundle"))
    both, unet = {"unet": "attn", "text_encoder": "self_attn"}, {"unet": "attn2"}
    add_lora(copy, write_lora(folder / "style.safetensors", copy, both), scale=0.8)
    add_lora(copy, write_lora(folder / "detail.safetensors", copy, unet))
    return copy


def draw(pipe: Pipeline, prompt: str = PROMPT) -> NDArray[np.float32]:
    return pipe(prompt, **DRAWING).latents


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_b_base(bundle: Path, precision: str) -> None:
    pipe = Pipeline.load(bundle, precision=precision)
    base, decoder = draw(pipe), pipe.model.components[pipe.model.components.picture_decoder]
    pipe = pipe.with_loras(["style"])
    text = pipe.model.components["text_encoder"]
    styled = draw(pipe)
    np.testing.assert_array_equal(styled, draw(Pipeline.load(bundle, precision=precision, loras={"style": 0.8})))
    pipe = pipe.with_loras({"style": None, "detail": -0.5})
    both = draw(pipe)
    pipe = pipe.with_loras(())
    np.testing.assert_array_equal(draw(pipe), base)
    for one, other in ((base, styled), (styled, both), (base, both)):
        assert np.abs(one - other).max() > 0.01
    # What no LoRA changes stays open.
    components = pipe.model.components
    assert components[components.picture_decoder] is decoder
    assert components["text_encoder"] is not text
    before = components["text_encoder"]
    assert pipe.with_loras(["detail"]).model.components["text_encoder"] is before


def test_networks_that_come_and_go(bundle: Path) -> None:
    """With one network in memory at a time, each comes with its LoRAs whenever it comes."""
    pipe = Pipeline.load(bundle, precision="fp32", residency="swap", loras=["style"])
    np.testing.assert_array_equal(draw(pipe), draw(Pipeline.load(bundle, precision="fp32", loras=["style"])))
    np.testing.assert_array_equal(draw(pipe.with_loras(())), draw(Pipeline.load(bundle, precision="fp32")))


def test_a_textual_inversion_beside_it(bundle: Path, tmp_path: Path) -> None:
    width = GraphWeights.open(bundle / "text_encoder/model.onnx").by_parameter["embeddings.token_embedding.weight"]
    vectors = np.random.default_rng(1).standard_normal((1, width.shape[1])).astype(np.float32)
    save_file({"emb_params": vectors}, tmp_path / "zork.safetensors")
    loading: dict[str, Any] = {"precision": "fp32", "textual_inversions": [tmp_path / "zork.safetensors"]}
    pipe = Pipeline.load(bundle, **loading, loras=["style"])
    np.testing.assert_array_equal(draw(pipe), draw(Pipeline.load(bundle, precision="fp32", loras=["style"])))
    word = draw(pipe, "a zork")
    assert np.abs(word - draw(pipe.with_loras(()), "a zork")).max() > 0.01
    np.testing.assert_array_equal(draw(pipe.with_loras(["style"]), "a zork"), word)


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ({"style": 1e9}, "Lower the scale"),
        ({"stile": 1.0}, "'stile', found detail, style"),
        ({"style": float("nan")}, "finite scale"),
    ],
)
def test_a_swap_that_fails_leaves_the_pipeline_as_it_was(bundle: Path, loras: dict[str, float], message: str) -> None:
    pipe = Pipeline.load(bundle, precision="fp16", loras=["detail"])
    before = draw(pipe)
    with pytest.raises(UsageError, match=message):
        pipe.with_loras(loras)
    np.testing.assert_array_equal(draw(pipe), before)
    assert [active.lora.name for active in pipe.model.components.loras] == ["detail"]


def test_a_swap_while_others_draw(bundle: Path) -> None:
    """Threads that draw see one LoRA or the other, never a mixture and never a network that is gone."""
    pipe = Pipeline.load(bundle, precision="fp32")
    base = draw(pipe)
    detailed = draw(pipe.with_loras(["detail"]))
    with ThreadPoolExecutor(2) as pool:
        drawn = [pool.submit(draw, pipe) for _ in range(6)]
        for loras in ([], ["detail"], []):
            assert pipe.with_loras(loras) is pipe
        found = [future.result() for future in drawn]
    assert all(np.array_equal(latents, base) or np.array_equal(latents, detailed) for latents in found)
    np.testing.assert_array_equal(draw(pipe), base)


def test_a_pipeline_whose_text_encoder_went_over_says_so(bundle: Path) -> None:
    pipe = Pipeline.load(bundle, precision="fp32")
    run = pipe.stream(PROMPT, **DRAWING)
    next(run)
    with pytest.raises(UsageError, match="run under way in this thread"):
        pipe.with_loras(["style"])
    run.close()
    styled = pipe.with_loras(["style"])
    with pytest.raises(UsageError, match="the last with_loras returned"):
        draw(pipe)
    draw(styled)


def calibrated(bundle: Path, folder: Path, loras: Mapping[str, float]) -> Path:
    """A bundle that says of its fp32 U-Net that it is an int8 one, calibrated with LoRAs."""
    copy = Path(shutil.copytree(bundle, folder / "int8.bundle"))
    opened = open_bundle(copy)
    assert opened.manifest is not None
    unet = opened.manifest.artifact("unet", "fp32")
    assert unet is not None
    notes = lora_notes(open_loras(opened, loras))
    quantized = dataclasses.replace(unet, precision="int8", inputs={"loras": notes})
    update_manifest(copy, lambda held: dataclasses.replace(held, artifacts=(*held.artifacts, quantized)))
    return copy


def test_what_was_calibrated_with_a_lora_draws_with_it_unasked(bundle: Path, tmp_path: Path) -> None:
    copy = calibrated(bundle, tmp_path, {"style": 0.5})
    pipe = Pipeline.load(copy, precision="int8")
    result = pipe(PROMPT, **DRAWING)
    assert 'Lora: "style:0.5"' in result.parameters[0] or "Lora: style:0.5" in result.parameters[0]
    assert any("calibrated with LoRA style:0.5" in note for note in pipe.notes)
    # The weights of the U-Net are those of the graph; the text encoder has the LoRA's.
    components = pipe.model.components
    plain = Components(open_bundle(copy), "fp32")
    feeds = {"sample": np.ones((1, 4, 8, 8), np.float32), "timestep": np.full(1, 5, np.float32)}
    feeds["encoder_hidden_states"] = np.ones((1, 77, 64), np.float32)
    np.testing.assert_array_equal(components["unet"](feeds)["out_sample"], plain["unet"](feeds)["out_sample"])
    tokens = {"input_ids": np.arange(77, dtype=np.int64)[None]}
    styled = Components(open_bundle(copy), "fp16", loras={"style": 0.5})
    texts = [part["text_encoder"](tokens)["last_hidden_state"] for part in (components, styled)]
    np.testing.assert_array_equal(texts[0], texts[1])
    unet = components["unet"]
    assert pipe.with_loras({"style": 0.5}).model.components["unet"] is unet


@pytest.mark.parametrize(
    ("made_with", "wanted", "message"),
    [
        ({}, {"detail": 1.0}, r"calibrated with, none, got detail:1\. .*latentrt calibrate .* --lora detail:1"),
        ({"style": 0.5}, {"style": 0.8}, r"with, style:0\.5, got style:0\.8\. int8 weights cannot be changed"),
        ({"style": 0.5, "detail": 1.0}, {"detail": 1.0, "style": 0.5}, "got detail:1, style:0.5"),
    ],
)
def test_other_loras_than_it_was_calibrated_with(
    bundle: Path, tmp_path: Path, made_with: dict[str, float], wanted: dict[str, float], message: str
) -> None:
    copy = calibrated(bundle, tmp_path, made_with)
    with pytest.raises(UsageError, match=message):
        Components(open_bundle(copy), "int8", loras=wanted)
    components = Components(open_bundle(copy), "int8")
    with pytest.raises(UsageError, match=message):
        components.set_loras(wanted)
    assert [active.lora.name for active in components.loras] == list(made_with)


class Refitted:
    """A session that runs from an engine: it keeps the weights that it is given. Not run on a GPU."""

    def __init__(self) -> None:
        self.weights: dict[str, Array] = {}
        self.fails = False

    def refit(self, weights: Mapping[str, Array]) -> None:
        if self.fails:
            raise UsageError("unet: expected an engine that takes new weights")
        self.weights |= weights


def test_engines_are_refitted(bundle: Path) -> None:
    components = Components(open_bundle(bundle), "fp16")
    engine = Refitted()
    session: Any = engine
    components._open["unet"] = session
    graph = GraphWeights.open(bundle / "unet/model.fp16.onnx")
    assert components.set_loras(["style"]) == {"unet", "text_encoder"}
    assert components["unet"] is session
    styled = dict(engine.weights)
    assert len(styled) > 10
    # Those of the first LoRA go back to what the graph has, to the bit; those of the second are new.
    assert components.set_loras(["detail"]) == {"unet", "text_encoder"}
    for weight in graph.by_parameter.values():
        if weight.name in styled:
            own = np.array_equal(engine.weights[weight.name], graph.laid(weight, graph.read(weight)))
            assert own == ("attn2" not in weight.parameter)
    components.set_loras(())
    for weight in graph.by_parameter.values():
        if weight.name in engine.weights:
            np.testing.assert_array_equal(engine.weights[weight.name], graph.laid(weight, graph.read(weight)))
    engine.fails = True
    with pytest.raises(UsageError, match="takes new weights"):
        components.set_loras(["style"])
    assert components.loras == ()


def test_the_command_and_the_record(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, options = tmp_path / "out.png", ["--steps", "2", "--width", "64", "--height", "64", "--precision", "fp32"]
    words = ["generate", str(bundle), PROMPT, "-o", str(output), *options, "--json"]
    assert main([*words, "--lora", "style:0.5", "--lora", "detail"]) == 0
    metadata = read_metadata(output)
    assert metadata.parameters is not None
    assert metadata.record is not None
    assert 'Lora: "style:0.5, detail:1"' in metadata.parameters
    # In their order: folded in the other way round, the last bits are others.
    assert [(note["name"], note["scale"]) for note in metadata.record["loras"]] == [("style", 0.5), ("detail", 1.0)]
    capsys.readouterr()
    assert main(["replay", str(output), "--bundle", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"same": True, "differences": {}}
    assert main([*words, "--lora", "other"]) == 2
    assert "found detail, style" in json.loads(capsys.readouterr().out)["error"]


def test_adding_a_lora_changes_no_picture_without_it(bundle: Path, shapes_bundle: Path) -> None:
    assert bundle_digest(open_bundle(bundle)) == bundle_digest(open_bundle(shapes_bundle))


def test_loras_on_the_command_line() -> None:
    assert read_loras(["a", "b c:-0.5", "d:1e-1"]) == {"a": None, "b c": -0.5, "d": 0.1}
    for words, message in ((["a:"], "NAME:SCALE"), (["a:x"], "NAME:SCALE"), (["a", "a:1"], "twice")):
        with pytest.raises(UsageError, match=message):
            read_loras(words)
