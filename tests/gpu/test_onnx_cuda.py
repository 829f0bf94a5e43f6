"""ONNX Runtime on CUDA: what only a GPU can show. `make test-gpu` runs it; elsewhere it is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bound_graph import expected, feeds_of, graph_bytes, plain_session
from numpy.testing import assert_allclose, assert_array_equal

from latentrt.runtime import Pipeline, io_binding
from latentrt.runtime.bound_inputs import freeze
from latentrt.runtime.cuda_device import OutOfDeviceMemory
from latentrt.runtime.input_checks import checked_input
from latentrt.runtime.onnx_cuda import PROVIDERS, CudaOptions, why_no_cuda
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.specs import Array, TensorSpec
from latentrt.runtime.vram import VramMeter, open_nvml

pytestmark = pytest.mark.gpu

# 256 MiB in between, 4 bytes in and out.
_LARGE = """<ir_version: 10, opset_import: ["" : 20]>
vae_decoder (float[n] x) => (float[n] y) <int64[1] wide = {67108864}, int64[1] axes = {0}>
{ e = Expand (x, wide) s = Sin (e) y = ReduceMean (s, axes) }"""
_BRANCH = """<ir_version: 10, opset_import: ["" : 20]>
unet (float[n] x, bool which) => (float[n] y)
{ y = If (which) <
    then_branch = g () => (float[n] a) { a = Neg (x) },
    else_branch = h () => (float[n] b) { b = Abs (x) }
> }"""
_MIB = 1 << 20


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    """Skip all of it without one, before a bundle is exported for it."""
    if reason := why_no_cuda():
        pytest.skip(f"not run on a GPU: {reason}")


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """Write a graph as the component of a name."""

    def write(component: str, model: bytes) -> Path:
        path = tmp_path / component / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(model)
        return path

    return write


def written(text: str) -> bytes:
    return bytes(onnx.parser.parse_model(text).SerializeToString())


@pytest.fixture
def unet(save: Callable[[str, bytes], Path]) -> Iterator[OnnxSession]:
    session = OnnxSession(save("unet", graph_bytes()), providers=PROVIDERS)
    yield session
    session.close()


def assert_near(found: Array, wanted: Array) -> None:
    """The same but for the order in which a GPU sums."""
    assert_allclose(np.asarray(found, np.float64), np.asarray(wanted, np.float64), rtol=2e-3)


def used() -> int:
    """Bytes in use on the GPU, by whomever."""
    return open_nvml()()[1]


def test_results_are_those_of_the_cpu_also_when_replayed(unet: OnnxSession) -> None:
    """The third call of a bucket replays what the second recorded; inputs that changed must be seen by it."""
    assert unet.why_no_graph is None
    plain = plain_session()
    for seed in range(12):
        feeds = feeds_of(seed, rows=1 + seed % 2, side=4 + 2 * (seed % 3))
        found, wanted = unet(feeds), expected(plain, feeds)
        assert_near(found["out_sample"], wanted["out_sample"])
        assert found["rounded"].dtype == np.uint8
    assert unet.why_no_graph is None


def test_recorded_runs_give_what_plain_ones_do(unet: OnnxSession, save: Callable[[str, bytes], Path]) -> None:
    plain = OnnxSession(save("plain", graph_bytes()), providers=PROVIDERS, cuda=CudaOptions(graphs=False))
    for seed in range(4):
        feeds = feeds_of(seed)
        assert_array_equal(unet(feeds)["out_sample"], plain(feeds)["out_sample"])


def test_a_frozen_text_stays_on_the_device(unet: OnnxSession, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []

    def noted(component: str, tensor: TensorSpec, value: Array) -> Array:
        copied.append(tensor.name)
        return checked_input(component, tensor, value)

    monkeypatch.setattr(io_binding, "checked_input", noted)
    text, plain = freeze(feeds_of(0)["text"]), plain_session()
    for seed in range(5):
        feeds = {**feeds_of(seed), "text": text}
        assert_near(unet(feeds)["out_sample"], expected(plain, feeds)["out_sample"])
    assert copied.count("text") == 1


def test_threads_share_the_recorded_runs(unet: OnnxSession) -> None:
    calls = [feeds_of(seed, rows=1 + seed % 2) for seed in range(40)]
    alone = [unet(feeds)["out_sample"] for feeds in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda feeds: unet(feeds)["out_sample"], calls))
    for one, other in zip(alone, together, strict=True):
        assert_array_equal(one, other)


def test_buckets_beyond_the_limit_lose_their_buffers_and_come_back(unet: OnnxSession) -> None:
    sides = [4 + 2 * index for index in range(10)]
    first = [unet(feeds_of(1, side=side))["out_sample"] for side in sides]
    again = [unet(feeds_of(1, side=side))["out_sample"] for side in sides for _ in range(3)][::3]
    for one, other in zip(first, again, strict=True):
        assert_array_equal(one, other)


def test_control_flow_runs_without_recording(save: Callable[[str, bytes], Path]) -> None:
    session = OnnxSession(save("unet", written(_BRANCH)), providers=PROVIDERS)
    x = np.array([-1.0, 2.0], np.float32)
    assert_array_equal(session({"x": x, "which": np.array(True)})["y"], -x)
    assert_array_equal(session({"x": x, "which": np.array(False)})["y"], np.abs(x))
    (note,) = session.notes
    assert "control flow" in note


def test_what_runs_once_gives_its_memory_back(save: Callable[[str, bytes], Path]) -> None:
    path, feeds = save("vae_decoder", written(_LARGE)), {"x": np.ones(1, np.float32)}
    left = {}
    for arena in (False, True):
        session = OnnxSession(path, providers=PROVIDERS, arena=arena)
        before = used()
        for _ in range(3):
            assert_near(session(feeds)["y"], np.sin(np.ones(1, np.float32)))
        left[arena] = used() - before
        session.close()
    assert left[False] < 128 * _MIB
    assert left[True] > 200 * _MIB, "it is there to be given back"


def test_a_closed_session_gives_all_of_it_back(save: Callable[[str, bytes], Path]) -> None:
    path = save("vae_decoder", written(_LARGE))
    OnnxSession(path, providers=PROVIDERS).close()  # what a process keeps from its first session on
    before = used()
    session = OnnxSession(path, providers=PROVIDERS)
    for _ in range(3):
        session({"x": np.ones(1, np.float32)})
    assert used() - before > 200 * _MIB
    session.close()
    assert used() - before < 64 * _MIB


def test_too_little_memory_is_said_so(save: Callable[[str, bytes], Path]) -> None:
    cuda = CudaOptions(memory_limit=64 * _MIB)
    session = OnnxSession(save("vae_decoder", written(_LARGE)), providers=PROVIDERS, cuda=cuda)
    with pytest.raises(OutOfDeviceMemory, match=r"vae_decoder: expected .* of the GPU's memory.*--residency swap"):
        session({"x": np.ones(1, np.float32)})


def test_a_bundle_draws_as_on_the_cpu_whatever_stays_resident(shapes_bundle: Path) -> None:
    request: dict[str, Any] = {"prompt": "a small red circle on a blue background", "steps": 8, "seed": 7}
    on_cpu = Pipeline.load(shapes_bundle, backend="onnxruntime")(**request)
    found = {}
    for residency in ("all", "swap"):
        with VramMeter() as vram, Pipeline.load(shapes_bundle, backend="cuda", residency=residency) as pipe:
            found[residency] = pipe(**request)
            assert pipe.backend == "onnxruntime CUDA"
            assert pipe.notes == ()
        assert vram.peak.nbytes
    assert_allclose(found["all"].latents, on_cpu.latents, rtol=0, atol=1e-3 * on_cpu.latents.std())
    assert_array_equal(found["swap"].latents, found["all"].latents)
    assert_array_equal(found["swap"].images, found["all"].images)
