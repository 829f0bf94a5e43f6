from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_bundle import make_bundle
from fake_cuda import FakeDevice
from fake_engines import fake_host, put_engine
from fake_trt import FakeContext, FakeTensorRT

from latentrt.runtime import engine_loading
from latentrt.runtime.backends import open_session
from latentrt.runtime.bound_inputs import freeze
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.engine_host import EngineHost
from latentrt.runtime.errors import BackendError, UsageError
from latentrt.runtime.specs import Session


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def trt(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(device)
    monkeypatch.setattr(engine_loading, "import_flavour", lambda flavour: fake)
    return fake


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = make_bundle(tmp_path / "bundle")
    put_engine(path, "unet", "fp16", size="64..128", batch="1..2", weight_bytes=5000, refit="all")
    put_engine(path, "vae_decoder", "fp16", size="64..128", activation_bytes=16384)
    return path


def opened(bundle: Path, host: EngineHost, component: str = "unet", backend: str = "tensorrt_rtx") -> Any:
    return open_session(open_bundle(bundle), component, "fp16", backend=backend, host=host)


def feeds(seed: int = 0, rows: int = 2, side: int = 8) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, 4, side, side), dtype=np.float32),
        "timestep": np.full(rows, 1.0 + seed, np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, 77, 64), dtype=np.float32),
    }


def expected(bundle: Path, given: dict[str, Any], component: str = "unet") -> Any:
    (output,) = open_session(open_bundle(bundle), component, "fp16", backend="onnxruntime")(given).values()
    return output


@pytest.fixture
def session(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> Iterator[Session]:
    session = opened(bundle, fake_host(device))
    yield session
    session.close()
    gc.collect()
    assert not device.leaks()


def test_twenty_steps_upload_the_text_once_and_launch_one_graph_each(
    bundle: Path, session: Session, device: FakeDevice
) -> None:
    text = freeze(feeds()["encoder_hidden_states"])
    for step in range(20):
        given = {**feeds(step), "encoder_hidden_states": text}
        assert np.array_equal(session(given)["out_sample"], expected(bundle, given))
    first = 256 + 2 * 4 * 8 * 8 * 4  # two timesteps take a slot of 256 bytes
    assert device.count("copy_to_device", first) == 19
    assert device.count("copy_to_device", first + text.nbytes) == 1
    assert device.count("copy_to_device") == device.count("copy_to_host") == 20
    assert device.count("launch") == 19
    assert device.count("enqueue") == device.count("capture") == 1
    # One for each step, and one between warm-up and capture.
    assert device.count("synchronize") == 21
    assert device.count("malloc", "device") == 2  # inputs and outputs, activation


def test_the_order_of_the_first_call_and_of_a_step(session: Session, device: FakeDevice) -> None:
    session(feeds(0))
    warm_up = ("malloc", "malloc", "malloc", "copy_to_device", "enqueue", "synchronize")
    capture = ("begin_capture", "capture", "end_capture", "instantiate")
    assert [entry[0] for entry in device.log] == [*warm_up, *capture, "copy_to_host", "synchronize"]
    device.log.clear()
    session(feeds(1))
    assert [entry[0] for entry in device.log] == ["copy_to_device", "launch", "copy_to_host", "synchronize"]


def test_an_input_that_can_change_is_uploaded_every_time(bundle: Path, session: Session) -> None:
    given = feeds()
    session(given)
    given["encoder_hidden_states"] += 1
    assert np.array_equal(session(given)["out_sample"], expected(bundle, given))


def test_every_set_of_shapes_has_a_graph_and_its_own_text(bundle: Path, session: Session, device: FakeDevice) -> None:
    calls = [feeds(0), feeds(1, rows=1), feeds(2, side=16)]
    for given in (*calls, *calls):
        assert np.array_equal(session(given)["out_sample"], expected(bundle, given))
    assert device.count("instantiate") == 3
    assert device.count("launch") == 3


def test_outputs_are_arrays_of_their_own(session: Session) -> None:
    first = session(feeds(0))["out_sample"]
    kept = first.copy()
    session(feeds(1))
    assert np.array_equal(first, kept)


def test_the_set_of_shapes_that_was_not_used_longest_gives_way(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT
) -> None:
    host = fake_host(device)
    session = opened(bundle, host)
    for side in range(8, 17):
        session(feeds(side=side))
    held = device.leaks()
    assert held["executables"] == 8
    session(feeds(side=8))
    assert device.leaks() == held
    assert device.count("instantiate") == 10
    session.close()


def test_engines_share_one_block_and_what_was_captured_with_a_smaller_one_is_captured_again(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT
) -> None:
    host = fake_host(device)
    unet = opened(bundle, host)
    unet(feeds(0))
    latents = {"latent_sample": feeds()["sample"][:1]}
    decoder = opened(bundle, host, "vae_decoder")
    assert np.array_equal(decoder(latents)["sample"], expected(bundle, latents, "vae_decoder"))
    blocks = [entry[2] for entry in device.log if entry[:2] == ("malloc", "device") and entry[2] in (4096, 16384)]
    assert blocks == [4096, 16384]
    for seed in (1, 2):
        assert np.array_equal(unet(feeds(seed))["out_sample"], expected(bundle, feeds(seed)))
    assert device.count("capture", "unet") == 2
    unet.close()
    assert np.array_equal(decoder(latents)["sample"], expected(bundle, latents, "vae_decoder"))
    decoder.close()
    gc.collect()
    assert not device.leaks()


@pytest.mark.parametrize("lanes", [1, 3])
def test_threads_get_their_own_results(bundle: Path, device: FakeDevice, trt: FakeTensorRT, lanes: int) -> None:
    host = fake_host(device, lanes=lanes)
    unet, decoder = opened(bundle, host), opened(bundle, host, "vae_decoder")
    latents = {"latent_sample": feeds()["sample"][:1]}
    wanted = [expected(bundle, feeds(seed)) for seed in range(12)]
    picture = expected(bundle, latents, "vae_decoder")
    ready = threading.Barrier(4)

    def work(thread: int) -> None:
        ready.wait()
        for seed in range(thread, 12, 4):
            assert np.array_equal(unet(feeds(seed))["out_sample"], wanted[seed])
            assert np.array_equal(decoder(latents)["sample"], picture)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert device.leaks()["streams"] <= lanes
    unet.close()
    decoder.close()
    gc.collect()
    assert not device.leaks()


def test_warming_up_prepares_every_lane(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    session = opened(bundle, fake_host(device, lanes=2))
    shapes = {name: value.shape for name, value in feeds().items()}
    session.warm_up([shapes, {**shapes, "sample": (2, 4, 64, 64)}])  # no engine holds the second
    assert device.count("instantiate") == 2
    session(feeds())
    assert device.count("enqueue") == 2
    session.close()


def test_refitting_captures_again_and_the_base_weights_give_the_base_outputs(
    bundle: Path, session: Any, device: FakeDevice
) -> None:
    given = feeds()
    before = session(given)["out_sample"]
    base = {"to_k.weight": _weight(bundle, "to_k.weight")}
    session.refit({"to_k.weight": 2 * base["to_k.weight"]})
    changed = session(given)["out_sample"]
    assert not np.array_equal(changed, before)
    assert np.array_equal(session(given)["out_sample"], changed)
    session.refit(base)
    assert np.array_equal(session(given)["out_sample"], before)
    assert np.array_equal(session(given)["out_sample"], before)
    assert device.count("capture") == 3
    with pytest.raises(UsageError, match=r"to_q\.weight"):
        session.refit({"to_q.weight": base["to_k.weight"]})


def _weight(bundle: Path, name: str) -> Any:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle / "unet" / "model.fp16.onnx")
    return next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)


@pytest.mark.parametrize("how", ["refuses", "end_capture", "instantiate", "not capturable"])
def test_what_cannot_be_captured_runs_without(
    bundle: Path, session: Any, device: FakeDevice, trt: FakeTensorRT, how: str
) -> None:
    if how == "refuses":
        trt.refuses_capture = True
    elif how == "not capturable":
        trt.capturable = False
    else:
        device.failing.add(how)
    for seed in range(3):
        assert np.array_equal(session(feeds(seed))["out_sample"], expected(bundle, feeds(seed)))
    assert device.count("enqueue") == 3
    assert device.count("begin_capture") == (0 if how == "not capturable" else 1)
    (note,) = session.notes
    assert note.startswith("unet: no CUDA graph: ")


def test_without_graphs_every_call_is_enqueued(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    session = opened(bundle, fake_host(device, graphs=False))
    for seed in range(2):
        assert np.array_equal(session(feeds(seed))["out_sample"], expected(bundle, feeds(seed)))
    assert device.count("enqueue") == 2
    assert device.count("begin_capture") == 0
    assert session.notes == ()
    session.close()


@pytest.mark.parametrize("how", ["launch", "synchronize"])
def test_after_a_failure_everything_is_uploaded_again(
    bundle: Path, session: Session, device: FakeDevice, how: str
) -> None:
    session(feeds())
    given = {name: freeze(value) for name, value in feeds(1).items()}
    device.failing.add(how)
    with pytest.raises(BackendError, match=f"{how}: expected success"):
        session(given)
    device.failing.clear()
    assert np.array_equal(session(given)["out_sample"], expected(bundle, given))


def test_kernels_that_were_compiled_are_there_in_the_next_process(
    bundle: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, trt: FakeTensorRT
) -> None:
    def process(version: str = "1.7.1.116") -> int:
        fake = FakeTensorRT(device, version=version)
        monkeypatch.setattr(engine_loading, "import_flavour", lambda flavour: fake)
        session = opened(bundle, fake_host(device))
        session(feeds())
        session.close()
        return fake.compiled

    assert process() == 1
    assert process() == 0
    assert process("1.7.2.0") == 1


def test_a_damaged_or_unwritable_kernel_cache_is_done_without(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT, tmp_path: Path
) -> None:
    def draw() -> int:
        before = trt.compiled
        session = opened(bundle, fake_host(device))
        session(feeds())
        session.close()
        return trt.compiled - before

    draw()
    (kept,) = (tmp_path / "cache" / "jit").glob("*/*.bin")
    assert kept.parent.name == "1.7.1.116-Fake-GPU-sm89"
    kept.write_bytes(b"damaged")
    assert (draw(), draw()) == (1, 0)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder was to be")
    assert draw() == 1


def test_a_thread_keeps_its_lane_and_the_text_on_it(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    session = opened(bundle, fake_host(device, lanes=2))
    text = freeze(feeds()["encoder_hidden_states"])
    for seed in range(4):
        session({**feeds(seed), "encoder_hidden_states": text})
    assert device.count("capture") == 1
    assert sum(entry[1] >= text.nbytes for entry in device.log if entry[0] == "copy_to_device") == 1
    session.close()


def test_each_profile_of_an_engine_runs_its_shapes(tmp_path: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    bundle = make_bundle(tmp_path / "other")
    assert len(put_engine(bundle, "unet", "fp16", size="64,128", batch="1,4").profiles) >= 4
    session = opened(bundle, fake_host(device))
    for rows, side in ((2, 8), (8, 8), (2, 16), (8, 16), (2, 8)):
        given = feeds(rows, rows, side)
        assert np.array_equal(session(given)["out_sample"], expected(bundle, given))
    session.close()


def test_without_page_locked_memory_nothing_is_kept(bundle: Path, session: Session, device: FakeDevice) -> None:
    device.failing.add("malloc_host")
    with pytest.raises(BackendError, match="malloc_host"):
        session(feeds())
    assert device.leaks()["device"] == 0
    device.failing.clear()
    session(feeds())


def test_an_output_whose_shape_depends_on_values_is_refused(
    session: Session, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape_of = FakeContext.get_tensor_shape
    known = {"sample", "timestep", "encoder_hidden_states"}
    monkeypatch.setattr(
        FakeContext, "get_tensor_shape", lambda self, name: shape_of(self, name) if name in known else (-1, 4, 8, 8)
    )
    with pytest.raises(BackendError, match=r"depends on their values\. Run it with --backend onnxruntime"):
        session(feeds())


def test_engines_that_are_loaded_later_get_the_new_weights_too(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT
) -> None:
    put_engine(bundle, "unet", "fp16", size="256", refit="all")
    session = opened(bundle, fake_host(device), backend="auto")
    session(feeds())
    session.refit({"to_k.weight": 2 * _weight(bundle, "to_k.weight")})
    for given in (feeds(), feeds(side=32)):
        assert not np.array_equal(session(given)["out_sample"], expected(bundle, given))
    session.close()


def test_one_engine_that_takes_no_new_weights_leaves_all_as_they_are(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT
) -> None:
    """Before any is loaded: with what the sidecars say."""
    put_engine(bundle, "unet", "fp16", size="256", refit="individual", refittable=("conv_in.weight",))
    session = opened(bundle, fake_host(device), backend="auto")
    with pytest.raises(UsageError, match=r"to_k\.weight.*latentrt build .* --components unet --refit lora"):
        session.refit({"to_k.weight": _weight(bundle, "to_k.weight")})
    np.testing.assert_array_equal(session(feeds())["out_sample"], expected(bundle, feeds()))
    session.close()


def test_a_closed_session_says_so(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    session = opened(bundle, fake_host(device))
    session(feeds())
    session.close()
    session.close()
    gc.collect()
    assert not device.leaks()
    with pytest.raises(BackendError, match="closed"):
        session(feeds())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: given.pop("timestep"), "expected inputs"),
        (lambda given: given.update(timestep=np.zeros(1, np.float32)), r"unet\.timestep: expected b = 2 as in sample"),
        (lambda given: given.update(sample=np.zeros((2, 4, 32, 32), np.float32)), "--size 256x256"),
    ],
)
def test_feeds_that_do_not_fit(
    session: Session, device: FakeDevice, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    given = feeds()
    change(given)
    with pytest.raises(UsageError, match=said):
        session(given)
