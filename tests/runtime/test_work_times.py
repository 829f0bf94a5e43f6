"""GPU times of engines' calls and the memory that engines take, on the fake GPU: none of it was run on a real one."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_bundle import make_bundle
from fake_cuda import FakeDevice
from fake_engines import edit_sidecar, fake_host, put_engine
from fake_trt import FakeTensorRT

from latentrt.runtime import engine_loading
from latentrt.runtime.backends import open_session
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.engine_host import EngineHost, EngineMemory
from latentrt.runtime.errors import BackendError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


def trt_of(device: FakeDevice, monkeypatch: pytest.MonkeyPatch, name: str = "tensorrt_rtx") -> FakeTensorRT:
    fake = FakeTensorRT(device, name)
    monkeypatch.setattr(engine_loading, "import_flavour", lambda flavour: fake)
    return fake


@pytest.fixture
def trt(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return trt_of(device, monkeypatch)


def bundle_of(path: Path, flavour: str = "tensorrt_rtx") -> Path:
    make_bundle(path)
    put_engine(path, "unet", "fp16", size="64..128", batch="1..2", weight_bytes=5000, flavour=flavour)
    put_engine(path, "vae_decoder", "fp16", size="64..128", weight_bytes=700, activation_bytes=16384, flavour=flavour)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundle_of(tmp_path / "bundle")


def opened(bundle: Path, host: EngineHost, component: str = "unet", flavour: str = "tensorrt_rtx") -> Any:
    return open_session(open_bundle(bundle), component, "fp16", backend=flavour, host=host)


def feeds(rows: int = 2, side: int = 8) -> dict[str, Any]:
    return {
        "sample": np.ones((rows, 4, side, side), np.float32),
        "timestep": np.ones(rows, np.float32),
        "encoder_hidden_states": np.ones((rows, 77, 64), np.float32),
    }


def taken(device: FakeDevice) -> int:
    """Bytes of the GPU that are not free."""
    free, total = device.memory()
    return total - free


def test_every_call_is_timed_the_first_too(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    host = fake_host(device)
    session, decoder = opened(bundle, host), opened(bundle, host, "vae_decoder")
    host.times.on = True
    for trt.seconds in (0.5, 0.25, 2.0):
        session(feeds())
    trt.seconds = 4.0
    decoder({"latent_sample": np.ones((1, 4, 8, 8), np.float32)})
    assert host.times.calls == [("unet", 0.5), ("unet", 0.25), ("unet", 2.0), ("vae_decoder", 4.0)]
    session.close()
    decoder.close()
    del session, decoder
    gc.collect()
    assert not device.leaks()


def test_events_lie_around_the_work_alone(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    host = fake_host(device)
    session = opened(bundle, host)
    host.times.on = True
    session(feeds())
    first = ["copy_to_device", "record", "enqueue", "record", "synchronize"]
    capture = ["begin_capture", "capture", "end_capture", "instantiate", "copy_to_host", "synchronize"]
    assert [entry[0] for entry in device.log if entry[0] != "malloc"] == first + capture
    device.log.clear()
    session(feeds())
    assert [entry[0] for entry in device.log] == [
        "copy_to_device", "record", "launch", "record", "copy_to_host", "synchronize",
    ]  # fmt: skip
    assert device.leaks()["events"] == 2


def test_off_nothing_is_recorded(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    host = fake_host(device)
    session = opened(bundle, host)
    session(feeds())
    assert (device.count("record"), device.leaks()["events"], host.times.calls) == (0, 0, [])
    host.times.on = True
    session(feeds())
    host.times.on = False
    session(feeds())
    assert (device.count("record"), len(host.times.calls)) == (2, 1)


def test_a_call_that_fails_has_no_time(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    host = fake_host(device)
    session = opened(bundle, host)
    session(feeds())
    host.times.on = True
    for failing in ("launch", "synchronize"):
        device.failing = {failing}
        with pytest.raises(BackendError):
            session(feeds())
        device.failing = set()
    assert host.times.calls == []
    trt.seconds = 1.5
    session(feeds())
    assert host.times.calls == [("unet", 1.5)]


def test_the_memory_that_engines_take_is_what_the_gpu_has_less(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT
) -> None:
    host = fake_host(device)
    assert host.memory == EngineMemory(0, 0, 0)
    session, decoder = opened(bundle, host), opened(bundle, host, "vae_decoder")
    for given in (feeds(), feeds(rows=1), feeds(side=16)):
        session(given)
    decoder({"latent_sample": np.ones((1, 4, 8, 8), np.float32)})
    held = host.memory
    assert (held.weights, held.activation) == (5700, 16384)
    assert 5700 + 16384 + held.io == taken(device)
    kept = list(decoder._sessions.values())
    decoder.close()
    assert host.memory.weights == 5000
    assert kept[0].io_bytes == 0
    session.close()
    assert host.memory == EngineMemory(0, 0, 0)


def test_streamed_weights_count_as_far_as_they_are_on_the_gpu(
    tmp_path: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt_of(device, monkeypatch, "tensorrt")
    bundle = bundle_of(tmp_path / "bundle", "tensorrt")
    host = fake_host(device, weight_budget=2000)
    session = opened(bundle, host, flavour="tensorrt")
    session(feeds())
    held = host.memory
    assert held.weights == 2000
    assert 2000 + held.activation + held.io == taken(device)


def test_weights_of_an_engine_that_does_not_say_are_unknown(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT
) -> None:
    edit_sidecar(bundle, "vae_decoder", weight_bytes=None)
    host = fake_host(device)
    sessions = opened(bundle, host), opened(bundle, host, "vae_decoder")
    assert host.memory.weights is None
    assert len(sessions) == 2
