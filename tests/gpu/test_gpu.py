"""What only a GPU shows: `make test-gpu`. On a machine without one all of it is skipped as not run on a GPU.

Engines are built here with whichever flavour of TensorRT is installed and supports the GPU. What stands above the
device seam is tested without one in tests/runtime/test_tensorrt_session.py and its neighbours.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_bundle import make_bundle
from onnx import numpy_helper

from latentrt.export.build_options import BuildOptions
from latentrt.export.engine_jobs import build_engines
from latentrt.runtime.backends import open_session
from latentrt.runtime.bound_inputs import freeze
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.cuda_device import OutOfDeviceMemory
from latentrt.runtime.cuda_driver import CudaDevice, why_no_bindings
from latentrt.runtime.engine_host import EngineHost
from latentrt.runtime.errors import BackendError
from latentrt.runtime.machine import probe_machine
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.trt_flavour import FLAVOURS, import_flavour, installed_flavour, supported_sms

NOT_RUN = "not run on a GPU"
# Of an engine and ONNX Runtime that both compute in half precision, in other orders.
HALF_RELATIVE_L2 = 5e-3


@cache
def why_no_gpu() -> str | None:
    machine = probe_machine()
    return None if machine.gpus else f"{NOT_RUN}: {machine.why_no_gpu}"


@cache
def flavour_here() -> str | None:
    """A flavour of TensorRT that is installed and builds for this machine's GPU."""
    sm = probe_machine().gpus[0].sm
    for flavour in FLAVOURS:
        if installed_flavour(flavour) is not None:
            sms = supported_sms(import_flavour(flavour), flavour)
            if not sms or sm in sms:
                return flavour
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_no_gpu() is not None, reason=str(why_no_gpu()))]


@pytest.fixture
def flavour() -> str:
    if (reason := why_no_bindings()) is not None:
        pytest.skip(f"{NOT_RUN}: {reason}")
    found = flavour_here()
    if found is None:
        pytest.skip(f"{NOT_RUN}: no TensorRT that supports {probe_machine().gpus[0].sm} is installed")
    return found


@pytest.fixture
def refittable(flavour: str) -> str:
    """The flavour, where it takes new weights for all."""
    if flavour == "tensorrt" and import_flavour(flavour).__version__.startswith("11.3."):
        pytest.skip(f"{NOT_RUN}: TensorRT 11.3 may lose a bias when all weights can be refitted, and is refused")
    return flavour


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def build(bundle: Path, flavour: str, **options: Any) -> None:
    build_engines(bundle, BuildOptions(flavour=flavour, target="current", **options))


def opened(bundle: Path, backend: str, component: str = "unet", **settings: Any) -> Any:
    host = EngineHost(**settings)
    return open_session(open_bundle(bundle), component, "fp16", backend=backend, host=host)


def feeds(seed: int = 0, rows: int = 2, side: int = 8) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, 4, side, side), dtype=np.float32),
        "timestep": np.full(rows, 1.0 + seed, np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, 77, 64), dtype=np.float32),
    }


def expected(bundle: Path, given: dict[str, Any]) -> Any:
    return open_session(open_bundle(bundle), "unet", "fp16", backend="onnxruntime")(given)["out_sample"]


def assert_close(found: Any, wanted: Any) -> None:
    difference = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert difference <= HALF_RELATIVE_L2, difference


def test_bytes_go_to_the_device_and_back() -> None:
    if (reason := why_no_bindings()) is not None:
        pytest.skip(f"{NOT_RUN}: {reason}")
    device = CudaDevice()
    free, total = device.memory()
    assert 0 < free <= total
    with pytest.raises(OutOfDeviceMemory, match="cudaErrorMemoryAllocation"):
        device.malloc(1 << 50)
    stream, block = device.create_stream(), device.malloc(1 << 20)
    up, down = device.malloc_host(1 << 20), device.malloc_host(1 << 20)
    sent = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    ctypes.memmove(up, sent.ctypes.data, 1 << 20)
    device.copy_to_device(block, up, 1 << 20, stream)
    device.copy_to_host(down, block, 1 << 20, stream)
    device.synchronize(stream)
    assert ctypes.string_at(down, 1 << 20) == sent.tobytes()
    # What may not be captured ends the capture, and the stream works again.
    device.begin_capture(stream)
    with pytest.raises(BackendError, match="cudaStreamSynchronize"):
        device.synchronize(stream)
    with pytest.raises(BackendError, match="cudaStreamEndCapture"):
        device.end_capture(stream)
    device.synchronize(stream)
    for address in (up, down):
        device.free_host(address)
    device.free(block)
    device.destroy_stream(stream)


def test_engines_agree_with_onnx_runtime_at_every_profile(bundle: Path, flavour: str) -> None:
    build(bundle, flavour, components=("unet",), batch="1,2", size="64,128")
    session = opened(bundle, flavour)
    for rows, side in ((1, 8), (2, 8), (4, 16), (2, 8)):
        for seed in range(3):
            given = feeds(seed, rows, side)
            assert_close(session(given)["out_sample"], expected(bundle, given))
    assert session.notes == ()
    session.close()


def test_graphs_change_no_bit(bundle: Path, flavour: str) -> None:
    build(bundle, flavour, components=("unet",), batch="1", size="64")
    replayed, enqueued = opened(bundle, flavour), opened(bundle, flavour, graphs=False)
    text = freeze(feeds()["encoder_hidden_states"])
    for seed in range(5):
        given = {**feeds(seed), "encoder_hidden_states": text}
        assert np.array_equal(replayed(given)["out_sample"], enqueued(given)["out_sample"])
    assert replayed.notes == ()
    replayed.close()
    enqueued.close()


def test_work_takes_part_of_the_time_of_its_call(bundle: Path, flavour: str) -> None:
    build(bundle, flavour, components=("unet",), batch="1", size="64")
    host = EngineHost()
    session = open_session(open_bundle(bundle), "unet", "fp16", backend=flavour, host=host)
    session(feeds())
    host.times.on = True
    for seed in range(5):
        began = time.perf_counter()
        session(feeds(seed))
        component, seconds = host.times.calls[seed]
        assert component == "unet"
        assert 0 < seconds < time.perf_counter() - began
    held = host.memory
    assert held.weights is not None
    assert held.weights > 0
    assert held.io > 0
    session.close()


def test_refitted_weights_change_the_output_and_go_back_to_the_bit(bundle: Path, refittable: str) -> None:
    build(bundle, refittable, components=("unet",), batch="1", size="64", refit="all")
    graph = onnx.load(bundle / "unet" / "model.fp16.onnx").graph
    base = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name == "to_k.weight"}
    session, given = opened(bundle, refittable), feeds()
    before = session(given)["out_sample"]
    session.refit({name: 2 * values for name, values in base.items()})
    changed = session(given)["out_sample"]
    assert np.linalg.norm(changed - before) > 0.01 * np.linalg.norm(before)
    assert np.array_equal(session(given)["out_sample"], changed)
    session.refit(base)
    assert np.array_equal(session(given)["out_sample"], before)
    session.close()


def test_an_engine_without_weights_equals_the_full_one(bundle: Path, refittable: str) -> None:
    build(bundle, refittable, components=("unet",), batch="1", size="64", refit="all")
    full = opened(bundle, refittable)
    wanted = full(feeds())["out_sample"]
    full.close()
    for path in (bundle / "unet" / "engines").iterdir():
        path.unlink()
    build(bundle, refittable, components=("unet",), batch="1", size="64", refit="all", strip=True, force=True)
    stripped = opened(bundle, refittable)
    assert np.array_equal(stripped(feeds())["out_sample"], wanted)
    stripped.close()


def test_threads_on_one_engine_get_their_own_results(bundle: Path, flavour: str) -> None:
    build(bundle, flavour, components=("unet", "vae_decoder"), batch="1..2", size="64..128")
    host = EngineHost(lanes=3)
    unet, decoder = (
        open_session(open_bundle(bundle), component, "fp16", backend=flavour, host=host)
        for component in ("unet", "vae_decoder")
    )
    calls = [feeds(seed, rows, side) for seed, (rows, side) in enumerate([(1, 8), (2, 8), (4, 16), (2, 12)])]
    wanted = [unet(given)["out_sample"] for given in calls]
    latents = {"latent_sample": calls[0]["sample"]}
    picture = decoder(latents)["sample"]

    def work(thread: int) -> None:
        for turn in range(20):
            index = (thread + turn) % len(calls)
            assert np.array_equal(unet(calls[index])["out_sample"], wanted[index])
            assert np.array_equal(decoder(latents)["sample"], picture)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    unet.close()
    decoder.close()


def test_a_closed_session_leaves_nothing_on_the_device(bundle: Path, flavour: str) -> None:
    build(bundle, flavour, components=("unet",), batch="1", size="512")
    device = CudaDevice()

    def left() -> int:
        session = opened(bundle, flavour)
        session(feeds(side=64))
        session.close()
        gc.collect()
        return device.memory()[0]

    first = left()  # CUDA and TensorRT keep their own from here on
    assert abs(left() - first) <= 4 << 20
    assert abs(left() - first) <= 4 << 20


def test_kernels_compiled_by_one_process_are_found_by_the_next(bundle: Path, flavour: str, tmp_path: Path) -> None:
    if flavour != "tensorrt_rtx":
        pytest.skip(f"{NOT_RUN}: only tensorrt_rtx compiles kernels on this machine")
    build(bundle, flavour, components=("unet",), batch="1", size="64..512")
    program = (
        "import sys, time, numpy as np\n"
        "from pathlib import Path\n"
        "from latentrt.runtime.backends import open_session\n"
        "from latentrt.runtime.bundle import open_bundle\n"
        "session = open_session(open_bundle(Path(sys.argv[1])), 'unet', 'fp16', backend='tensorrt_rtx')\n"
        "feeds = {'sample': np.ones((2, 4, 64, 64), np.float32), 'timestep': np.ones(2, np.float32),\n"
        "         'encoder_hidden_states': np.ones((2, 77, 64), np.float32)}\n"
        "began = time.perf_counter(); session(feeds); print(time.perf_counter() - began); session.close()\n"
    )
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", program, str(bundle)], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(2)
    ]
    (kept,) = (tmp_path / "cache" / "jit").glob("*/*.bin")
    assert kept.stat().st_size > 0
    assert seconds[1] < seconds[0]


def test_a_picture_from_engines_is_that_of_onnx_runtime(
    flavour: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle = tmp_path / "shapes.bundle"
    # Exported only where it can be built.
    shutil.copytree(request.getfixturevalue("shapes_bundle"), bundle)
    build(bundle, flavour, batch="1", size="128")
    pipe = Pipeline.load(bundle, precision="fp16", backend=flavour)
    plain = Pipeline.load(bundle, precision="fp16", backend="onnxruntime")
    asked: dict[str, Any] = {"steps": 20, "seed": 7, "width": 128, "height": 128}
    found, wanted = (p("a red circle", **asked).images.astype(np.float64) for p in (pipe, plain))
    psnr = 10 * np.log10(255**2 / max(float(np.mean((found - wanted) ** 2)), 1e-12))
    assert psnr >= 30, psnr
    assert pipe.notes == ()


def test_an_int8_engine_rounds_as_the_graph_says(flavour: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The integers of both graphs are the same, so an engine is nearer to ONNX Runtime's int8 than that is to fp32."""
    bundle = quantized_bundle(request.getfixturevalue("shapes_bundle"), tmp_path / "shapes.bundle")
    build(bundle, flavour, precision="int8", batch="1", size="128", components=("unet",))
    given = feeds(side=16)
    found, int8, fp32 = (
        open_session(open_bundle(bundle), "unet", precision, backend=backend)(given)["out_sample"].astype(np.float64)
        for precision, backend in (("int8", flavour), ("int8", "onnxruntime"), ("fp32", "onnxruntime"))
    )
    noise = np.linalg.norm(int8 - fp32)
    assert 0 < np.linalg.norm(found - int8) < noise
    assert np.linalg.norm(found - fp32) < 1.5 * noise


def quantized_bundle(held: Path, path: Path) -> Path:
    """A copy of a bundle with the U-Net in int8, from a calibration of few prompts."""
    from latentrt.calibrate.apply import apply_plan
    from latentrt.calibrate.calibration_options import CalibrateOptions
    from latentrt.calibrate.preparing import prepare

    shutil.copytree(held, path)
    options = CalibrateOptions(
        prompts="shapes", counts=(4, 1, 1), timesteps=4, noise_prompts=1, settings={"steps": 8, "guidance": 5.0}
    )
    prepared = prepare(path, options)
    apply_plan(prepared.source, prepared.plan)
    return path
