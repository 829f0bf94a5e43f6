"""A thin engine file is opened like a whole one; how it is made and unmade is tested with the export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from engine_bundle import make_bundle
from fake_cuda import FakeDevice
from fake_engines import fake_host, put_engine, write_sidecar
from fake_trt import FakeTensorRT

from latentrt.runtime import engine_loading
from latentrt.runtime.backends import open_session
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.engine_sidecar import read_sidecar
from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.manifest import record_of
from latentrt.runtime.specs import Array, Session
from latentrt.runtime.thin_engine import is_thin, pack


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    path = make_bundle(tmp_path / "bundle")
    sidecar = put_engine(path, "unet", "fp16")
    (engine,) = (path / "unet/engines").glob("*.engine")
    whole = np.frombuffer(engine.read_bytes(), np.uint8)
    engine.write_bytes(pack(whole, (), ((0, len(whole)),)))
    record = record_of(engine)
    write_sidecar(
        path,
        engine,
        dataclasses.replace(sidecar, thin=True, engine_bytes=record.size, engine_sha256=record.sha256),
    )
    return path


def opened(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    device = FakeDevice()
    monkeypatch.setattr(engine_loading, "import_flavour", lambda flavour: FakeTensorRT(device))
    return open_session(open_bundle(bundle), "unet", "fp16", backend="tensorrt_rtx", host=fake_host(device))


def test_it_is_made_whole_before_tensorrt_sees_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (engine,) = (bundle / "unet/engines").glob("*.engine")
    assert is_thin(memoryview(engine.read_bytes()))
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {
        "sample": rng.standard_normal((2, 4, 8, 8), dtype=np.float32),
        "timestep": np.full(2, 7.0, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, 64), dtype=np.float32),
    }
    wanted = open_session(open_bundle(bundle), "unet", "fp16", backend="onnxruntime")(feeds)
    assert np.array_equal(opened(bundle, monkeypatch)(feeds)["out_sample"], wanted["out_sample"])


def test_a_whole_file_that_is_said_to_be_thin_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (engine,) = (bundle / "unet/engines").glob("*.engine")
    engine.write_bytes(b"{}" * engine.stat().st_size)
    (side,) = (bundle / "unet/engines").glob("*.json")
    record = record_of(engine)
    sidecar = dataclasses.replace(read_sidecar(side), engine_bytes=record.size, engine_sha256=record.sha256)
    write_sidecar(bundle, engine, sidecar)
    with pytest.raises(ArtifactError, match="expected an engine without weights"):
        opened(bundle, monkeypatch)
