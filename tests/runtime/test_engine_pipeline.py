"""Whole runs from engines of the fake TensorRT: the pictures of ONNX Runtime, and what it took to make them."""

from __future__ import annotations

import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDevice
from fake_engines import DRAWING, drawing_bundle, edit_sidecar, fake_host, put_engine
from fake_trt import FakeTensorRT

from latentrt.runtime import cuda_driver, engine_host, engine_loading
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.components import PICTURES, Components
from latentrt.runtime.machine import Machine
from latentrt.runtime.manifest import load_manifest, save_manifest
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.prompt_keys import CACHED, PROMPT, SplitUnet


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_driver, "why_no_bindings", lambda: None)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    device = FakeDevice()
    fake = FakeTensorRT(device)
    monkeypatch.setattr(engine_loading, "import_flavour", lambda flavour: fake)
    monkeypatch.setattr(engine_host, "EngineHost", lambda **settings: fake_host(device, **settings))
    return device


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return drawing_bundle(tmp_path / "tiny.bundle")


def draw(pipe: Pipeline, seed: int = 3, **settings: Any) -> Any:
    return pipe("red icon", steps=20, sampler="euler", guidance=5.0, seed=seed, width=64, height=64, **settings)


def test_twenty_steps_give_the_picture_of_onnx_runtime(bundle: Path, device: FakeDevice) -> None:
    expected = draw(Pipeline.load(bundle, precision="fp16", backend="onnxruntime"))
    pipe = Pipeline.load(bundle, precision="fp16", backend="tensorrt_rtx")
    found = draw(pipe)
    assert np.array_equal(found.latents, expected.latents)
    assert np.array_equal(found.images, expected.images)
    assert pipe.backend == "tensorrt_rtx on Fake GPU sm89"
    text = pipe.model.prompt_encoder("red icon").hidden.nbytes * 2
    uploads = [entry[1] for entry in device.log if entry[0] == "copy_to_device"]
    assert sum(1 for nbytes in uploads if nbytes >= text) == 1
    assert device.count("capture", "unet") == 1
    log = [entry[0] for entry in device.log]
    step = ["copy_to_device", "launch", "copy_to_host", "synchronize"]
    assert sum(1 for start in range(len(log)) if log[start : start + 4] == step) >= 19
    again = draw(pipe)
    assert np.array_equal(again.images, expected.images)
    assert device.count("capture", "unet") == 1


def test_after_warming_up_every_call_is_a_replay(bundle: Path, device: FakeDevice) -> None:
    pipe = Pipeline.load(bundle, backend="tensorrt_rtx")
    pipe.warm_up(width=64, height=64, guidance=5.0)
    before = [device.count(call) for call in ("enqueue", "malloc")]
    draw(pipe)
    assert [device.count(call) for call in ("enqueue", "malloc")] == before


def test_pictures_drawn_at_the_same_time_are_those_drawn_alone(bundle: Path, device: FakeDevice) -> None:
    pipe = Pipeline.load(bundle, backend="tensorrt_rtx", host=fake_host(device, lanes=2))
    alone = [draw(pipe, seed=seed).images for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: draw(pipe, seed=seed).images, range(4)))
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))
    pipe.close()
    gc.collect()
    assert not device.leaks()


def test_auto_takes_the_engines_and_onnx_runtime_for_what_they_do_not_hold(bundle: Path, device: FakeDevice) -> None:
    plain = Pipeline.load(bundle, precision="fp16", backend="onnxruntime")
    pipe = Pipeline.load(bundle)
    assert pipe.precision == "fp16"
    request: dict[str, Any] = {"steps": 2, "seed": 1, "width": 96, "height": 64}
    assert np.array_equal(pipe("red icon", **request).images, plain("red icon", **request).images)
    assert any("latentrt build" in note and "--size 64x96" in note for note in pipe.notes)


def test_engines_for_another_gpu_are_a_remark(
    bundle: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for all of them, and none where there is no GPU."""
    for component in DRAWING:
        edit_sidecar(bundle, component, targets=("sm120",))
    with Pipeline.load(bundle, precision="fp16") as pipe:
        (note,) = pipe.notes
        assert note.startswith("unet: ")
        assert "sm120" in note
    bare = Machine(why_no_gpu="none")
    monkeypatch.setattr(engine_host, "EngineHost", lambda **settings: fake_host(device, look=lambda: bare, **settings))
    assert Pipeline.load(bundle, precision="fp16").notes == ()


def test_networks_that_are_swapped_give_their_memory_back(bundle: Path, device: FakeDevice) -> None:
    expected = draw(Pipeline.load(bundle, precision="fp16", backend="onnxruntime"))
    pipe = Pipeline.load(bundle, precision="fp16", backend="tensorrt_rtx", residency="swap")
    seen: set[int] = set()
    found = draw(pipe, on_step=lambda step: seen.add(device.weights))
    assert np.array_equal(found.images, expected.images)
    assert seen == {10_000}
    gc.collect()
    assert not device.leaks()


def test_derived_graphs_stand_back_where_only_the_plain_one_has_an_engine(bundle: Path, device: FakeDevice) -> None:
    manifest = load_manifest(bundle)
    derived = {PICTURES: "vae_decoder", PROMPT: "unet", CACHED: "unet"}
    made = [
        dataclasses.replace(artifact, component=name)
        for name, plain in derived.items()
        if (artifact := manifest.artifact(plain, "fp16")) is not None
    ]
    save_manifest(bundle, dataclasses.replace(manifest, artifacts=(*manifest.artifacts, *made)))
    engines = Components(open_bundle(bundle), "fp16", backend="auto")
    assert engines.picture_decoder == "vae_decoder"
    assert not isinstance(engines["unet"], SplitUnet)
    put_engine(bundle, PICTURES, "fp16")
    assert Components(open_bundle(bundle), "fp16", backend="auto").picture_decoder == PICTURES
    assert Components(open_bundle(bundle), "fp16", backend="onnxruntime").picture_decoder == PICTURES
