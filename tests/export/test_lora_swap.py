"""LoRAs swapped into the graphs of real exports: against diffusers' fuse_lora, and against the export's own folding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from lora_files import (
    COMPONENTS,
    EVERYTHING,
    distance,
    kohya,
    load_pipeline,
    parts_of,
    peft,
    random_lora,
    reference,
    write,
)

from latentrt.export.lora import fused
from latentrt.export.lora_bundle import add_lora, lora_targets
from latentrt.export.lora_file import read_lora
from latentrt.export.ort_fusions import fuse
from latentrt.export.prompt_keys import split_prompt
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.graph_weights import GraphWeights, stripped_weights
from latentrt.runtime.lora_store import open_loras
from latentrt.runtime.lora_weights import lora_weights
from latentrt.runtime.onnx_file import FLOAT, read_graph
from latentrt.runtime.prompt_keys import CACHED, PROMPT
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.specs import Array
from latentrt.runtime.trt_flavour import import_flavour

SCALES = {"style": 0.6, "convolutions": -0.4, "dora": 0.8}


@pytest.fixture(scope="module", params=["sd15", "sdxl_base"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def files(
    family: str, family_sources: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Path, float]]:
    """A kohya LoRA with alphas, a LoCon of every layer in peft's format, and a DoRA, of all networks."""
    pipeline, folder = load_pipeline(family, family_sources(family).path), tmp_path_factory.mktemp("loras")
    tensors = {
        "style": kohya(random_lora(pipeline, seed=1, rank=4, alpha=2)),
        "convolutions": peft(random_lora(pipeline, seed=2, modules=EVERYTHING)),
        "dora": peft(random_lora(pipeline, seed=3, dora=True)),
    }
    return [(write(folder / f"{name}.safetensors", own), SCALES[name]) for name, own in tensors.items()]


@pytest.fixture(scope="module")
def bundle(
    family: str,
    files: list[tuple[Path, float]],
    family_bundle: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle of the family with these LoRAs."""
    copy = Path(shutil.copytree(family_bundle(family), tmp_path_factory.mktemp("swap") / "tiny.bundle"))
    for path, scale in files:
        add_lora(copy, path, scale=scale)
    return copy


def changed(bundle: Path, component: str, **scales: float | None) -> tuple[GraphWeights, dict[str, Array]]:
    opened = open_bundle(bundle)
    path = opened.graph(component, "fp32")
    wanted = scales or dict.fromkeys(SCALES)
    return GraphWeights.open(path), lora_weights(open_loras(opened, wanted), path, component)


def feeds_of(session: OnnxSession) -> dict[str, Array]:
    """Random inputs, the same at every call."""
    rng = np.random.default_rng(7)
    feeds: dict[str, Array] = {}
    for spec in session.spec.inputs:
        free = [2, *[8 if len(spec.shape) == 4 else 77] * len(spec.shape)]
        shape = [own if isinstance(size, str) else size for size, own in zip(spec.shape, free, strict=False)]
        if spec.dtype == "int64":
            feeds[spec.name] = rng.integers(0, 40, shape)
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return feeds


def run_torch(pipeline: Any, component: str, feeds: dict[str, Array]) -> Array:
    inputs = {name: torch.from_numpy(np.asarray(values)) for name, values in feeds.items()}
    with torch.no_grad():
        if component != "unet":
            return np.asarray(getattr(pipeline, component)(inputs["input_ids"]).last_hidden_state)
        added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
        return np.asarray(pipeline.unet(**inputs, added_cond_kwargs=added or None).sample)


def test_several_loras_equal_diffusers(
    family: str, bundle: Path, files: list[tuple[Path, float]], family_sources: Callable[[str], Any]
) -> None:
    """Weights of all networks, one after the other at their own scales; and what the networks then compute."""
    pipeline = load_pipeline(family, family_sources(family).path)
    before = {name: pipeline for name in COMPONENTS if getattr(pipeline, name, None) is not None}
    wanted = reference(pipeline, files)
    figures = {}
    for component in before:
        graph, weights = changed(bundle, component)
        names = {weight.name: weight for weight in graph.by_parameter.values()}
        assert len(weights) > 10
        worst = max(
            distance(names[name].unlaid(values), wanted[component][names[name].parameter])
            for name, values in weights.items()
        )
        assert worst <= 1e-6
        session = OnnxSession(graph.graph.path, weights=weights)
        feeds = feeds_of(session)
        output = "out_sample" if component == "unet" else "last_hidden_state"
        found, base = session(feeds)[output], OnnxSession(graph.graph.path)(feeds)[output]
        answer = run_torch(pipeline, component, feeds)
        figures[component] = distance(found, answer)
        assert distance(base, answer) > 0.1
    print(f"{family}: relative L2 of the outputs {figures}")
    assert max(figures.values()) <= 2e-5


def test_swapped_is_what_an_export_folds(
    family: str, bundle: Path, files: list[tuple[Path, float]], family_sources: Callable[[str], Any]
) -> None:
    """Bit for bit in fp32: the export computes with the same functions on the same numbers."""
    parts = parts_of(load_pipeline(family, family_sources(family).path))
    for path, scale in files:
        parts = dict(fused(parts, read_lora(path), scale=scale))
    for component in parts:
        graph, weights = changed(bundle, component)
        for parameter, weight in graph.by_parameter.items():
            if weight.name in weights:
                wanted = parts[component].weights[parameter].read()
                np.testing.assert_array_equal(weight.unlaid(weights[weight.name]), wanted)


def test_graphs_made_from_others(bundle: Path, tmp_path: Path) -> None:
    """Those for ONNX Runtime's providers and the U-Net in two: the same weights, in the layouts of these graphs."""
    graph, weights = changed(bundle, "unet")
    loras, source = open_loras(open_bundle(bundle), dict.fromkeys(SCALES)), graph.graph.path
    wanted = {
        weight.parameter: weight.unlaid(weights[weight.name])
        for weight in graph.by_parameter.values()
        if weight.name in weights
    }
    made: dict[str, tuple[str, ir.Model]] = {}
    for target in ("cpu", "cuda"):
        model = ir.load(source)
        fuse(model, target)
        made[target] = "unet", model
    for component, model in zip((PROMPT, CACHED), split_prompt(ir.load(source)), strict=True):
        made[component] = component, model
    found: dict[str, dict[str, Array]] = {}
    for name, (component, model) in made.items():
        path = tmp_path / f"{name}.onnx"
        ir.save(model, path)
        other = GraphWeights.open(path)
        own = lora_weights(loras, path, component)
        found[name] = {w.parameter: w.unlaid(own[w.name]) for w in other.by_parameter.values() if w.name in own}
        if name != "cuda":  # its operators have no kernels on the CPU
            session = OnnxSession(path, weights=own, optimize=False)
            assert all(np.isfinite(output).all() for output in session(feeds_of(session)).values())
    split = found.pop(PROMPT) | found.pop(CACHED)
    for name, values in {**found, "split": split}.items():
        assert values.keys() == wanted.keys(), name
        for parameter, each in values.items():
            np.testing.assert_array_equal(each, wanted[parameter])


def test_tensorrt_knows_these_weights_by_these_names(bundle: Path) -> None:
    """What can be proven without a GPU: the parser's network takes each name as one of a weight that may be replaced.

    An engine that takes new weights cannot be built without a driver, whatever the flavour; see tests/gpu.
    """
    trt = import_flavour("tensorrt_rtx")
    for component in ("unet", "text_encoder"):
        path = open_bundle(bundle).graph(component, "fp32")
        builder = trt.Builder(logger := trt.Logger(trt.Logger.INTERNAL_ERROR))
        network = builder.create_network(0)
        assert trt.OnnxParser(network, logger).parse_from_file(str(path))
        names = lora_targets(open_bundle(bundle), component, "fp32")
        assert set(names) == changed(bundle, component)[1].keys()
        assert all(network.mark_weights_refittable(name) for name in names)
        assert all(network.are_weights_marked_refittable(name) for name in names)
        # An engine without weights asks for all of them; the graph has each under the network's name.
        floats = [name for name, tensor in read_graph(path).tensors.items() if tensor.data_type == FLOAT]
        assert all(network.mark_weights_refittable(name) for name in floats)
        assert list(stripped_weights(path, floats)) == floats
        assert not network.mark_weights_refittable("unet.none.weight")
