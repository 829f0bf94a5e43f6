"""Which engine runs, and what is said of those that cannot: before anything is deserialized where that is possible."""

from __future__ import annotations

import dataclasses
import gc
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_bundle import make_bundle, put_graph, unet_graph
from fake_cuda import FakeDevice
from fake_engines import MACHINE, VERSION, edit_sidecar, fake_host, put_engine
from fake_trt import FakeTensorRT

from latentrt.export.engine_profiles import parse_requests, profiles_of
from latentrt.runtime import cuda_driver, engine_loading
from latentrt.runtime.backends import choose_backend, default_precision, open_session
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.engine_sidecar import covers
from latentrt.runtime.errors import ArtifactError, BackendError, LatentrtError, UsageError
from latentrt.runtime.machine import Gpu, Machine, Package
from latentrt.runtime.manifest import load_manifest, record_of, save_manifest
from latentrt.runtime.specs import TensorSpec

Sizes = dict[str, tuple[int, ...]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_driver, "why_no_bindings", lambda: None)


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
    return make_bundle(tmp_path / "bundle")


def shapes(rows: int = 2, height: int = 8, width: int = 8, chunks: int = 1) -> Sizes:
    return {
        "sample": (rows, 4, height, width),
        "timestep": (rows,),
        "encoder_hidden_states": (rows, 77 * chunks, 64),
    }


def feeds(sizes: Sizes) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in sizes.items()}


def opened(bundle: Path, device: FakeDevice, backend: str = "tensorrt_rtx", **settings: Any) -> Any:
    host = fake_host(device, **settings)
    return open_session(open_bundle(bundle), "unet", "fp16", backend=backend, host=host)


def machine(**changes: Any) -> Machine:
    return dataclasses.replace(MACHINE, **changes)


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (machine(gpus=(Gpu("RTX 3090", "sm86", 1),)), "--target sm86"),
        (machine(gpus=(), why_no_gpu="no NVIDIA driver"), "no NVIDIA driver"),
        (machine(packages={}), "tensorrt_rtx, which is not installed"),
        (machine(packages={"tensorrt_rtx": Package("1.8.0.1", 13)}), f"with tensorrt_rtx {VERSION}, and 1.8.0.1 is"),
    ],
)
def test_engines_for_another_machine(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT, here: Machine, said: str
) -> None:
    put_engine(bundle, "unet", "fp16")
    with pytest.raises(BackendError, match=re.escape(said)):
        opened(bundle, device, look=lambda: here)
    instead = opened(bundle, device, "auto", look=lambda: here)
    assert instead.backend == "onnxruntime CPU"
    choice = choose_backend(open_bundle(bundle), "unet", "fp16", host=fake_host(device, look=lambda: here))
    assert choice.engines == ()
    assert said in choice.reason
    assert trt.deserialized == 0


def test_of_many_engines_the_reason_told_is_that_of_one_for_this_gpu(bundle: Path, device: FakeDevice) -> None:
    put_engine(bundle, "unet", "fp16", targets=("sm120",))
    put_engine(bundle, "unet", "fp16", flavour_version="1.6.0.1")
    with pytest.raises(
        BackendError, match=r"with tensorrt_rtx 1\.6\.0\.1, and .* \(1 more cannot be used either: latentrt"
    ):
        opened(bundle, device)


def of_engine(bundle: Path, suffix: str) -> Path:
    (path,) = (bundle / "unet" / "engines").glob(f"*{suffix}")
    return path


def remove_sidecar(bundle: Path) -> None:
    of_engine(bundle, ".json").unlink()


def edit_sidecar_file(bundle: Path) -> None:
    path = of_engine(bundle, ".json")
    path.write_bytes(path.read_bytes().replace(b"sm89", b"sm86"))


def truncate_engine(bundle: Path) -> None:
    path = of_engine(bundle, ".engine")
    path.write_bytes(path.read_bytes()[:-1])


def change_engine(bundle: Path) -> None:
    path = of_engine(bundle, ".engine")
    path.write_bytes(path.read_bytes().replace(b"unet", b"teun"))


def swap_sidecars(bundle: Path) -> None:
    edit_sidecar(bundle, "unet", engine_sha256="ab" * 32)


def export_again(bundle: Path) -> None:
    save_manifest(bundle, put_graph(bundle, "unet", "fp16", unet_graph(seed=1), load_manifest(bundle)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove_sidecar, r"\.json: expected \d+ bytes, got No such file"),
        (edit_sidecar_file, r"\.json: expected SHA-256 .* The file was changed"),
        (truncate_engine, r"\.engine: expected \d+ bytes, got \d+\. The file is truncated"),
        (change_engine, r"\.engine: expected SHA-256 .* The file was changed"),
        (swap_sidecars, "its sidecar describes another engine"),
        (export_again, "made from an older graph than the bundle holds"),
    ],
)
def test_changed_files_are_refused_before_they_are_read(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT, change: Callable[[Path], None], said: str
) -> None:
    put_engine(bundle, "unet", "fp16")
    change(bundle)
    with pytest.raises(LatentrtError, match=said):
        opened(bundle, device)
    assert trt.deserialized == 0


def test_an_engine_that_is_not_in_the_manifest_is_no_engine(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT
) -> None:
    put_engine(bundle, "unet", "fp16")
    save_manifest(bundle, dataclasses.replace(load_manifest(bundle), engines=()))
    with pytest.raises(BackendError, match="expected a tensorrt_rtx engine for unet in fp16, found none"):
        opened(bundle, device)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"outputs": (TensorSpec("noise", "float32", ("b", 4, "h", "w")),)}, r"\['encoder_hidden_states', 'noise'"),
        ({"outputs": (TensorSpec("out_sample", "float16", ("b", 4, "h", "w")),)}, "out_sample float16"),
        ({"outputs": (TensorSpec("out_sample", "float32", ("b", 8, "h", "w")),)}, "out_sample float32"),
        ({"outputs": (TensorSpec("out_sample", "float32", ("b", 4, "h")),)}, "out_sample float32"),
    ],
)
def test_an_engine_that_is_not_what_its_sidecar_says(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT, fields: dict[str, Any], said: str
) -> None:
    put_engine(bundle, "unet", "fp16", **fields)
    with pytest.raises(ArtifactError, match=f"expected what its sidecar states, .*{said}.*--force"):
        opened(bundle, device)
    gc.collect()
    assert not device.leaks()


def test_an_engine_with_other_profiles_than_its_sidecar(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    sidecar = put_engine(bundle, "unet", "fp16", batch="1,2")
    edit_sidecar(bundle, "unet", profiles=sidecar.profiles[::-1])
    with pytest.raises(ArtifactError, match="shapes ShapeProfile"):
        opened(bundle, device)
    edit_sidecar(bundle, "unet", profiles=sidecar.profiles[:1])
    with pytest.raises(ArtifactError, match=r"1 profiles, got \d"):
        opened(bundle, device)


def test_an_engine_that_tensorrt_cannot_read(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    put_engine(bundle, "unet", "fp16")
    of_engine(bundle, ".engine").write_bytes(b"not JSON")
    edit_sidecar(bundle, "unet", engine_sha256=record_of(of_engine(bundle, ".engine")).sha256)
    with pytest.raises(ArtifactError, match=r"the engine is corrupt\. Run: latentrt build"):
        opened(bundle, device)


@pytest.mark.parametrize(
    ("megabytes", "what", "asked"),
    [
        (1, "weights", r"4\.0 MiB"),
        (4.001, "inputs and outputs", r"0\.\d MiB"),
        (6, "activation memory of the engines", r"3\.0 MiB"),
    ],
)
def test_too_little_device_memory(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT, megabytes: float, what: str, asked: str
) -> None:
    put_engine(bundle, "unet", "fp16", activation_bytes=3 << 20, weight_bytes=4 << 20)
    device.total = int(megabytes * 2**20)
    said = rf"unet: {what}: expected {asked} of free memory on Fake GPU sm89, got .* of .*latentrt plan BUNDLE"
    session = None
    with pytest.raises(BackendError, match=said):
        (session := opened(bundle, device))(feeds(shapes()))
    device.total = 1 << 30
    session = session or opened(bundle, device)
    session(feeds(shapes()))
    session.close()
    gc.collect()
    assert not device.leaks()


@pytest.mark.parametrize("wanted", [shapes(8), shapes(1, 16, 24), shapes(3), shapes(2, chunks=3)])
def test_shapes_that_no_engine_holds_name_the_command_that_builds_one(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT, wanted: Sizes
) -> None:
    sidecar = put_engine(bundle, "unet", "fp16")
    session = opened(bundle, device)
    with pytest.raises(UsageError, match=r"64x64 pixels, [\d.]+ rows of 77 tokens") as caught:
        session(feeds(wanted))
    words = shlex.split(str(caught.value).split("Run: ")[1])
    assert words[:3] == ["latentrt", "build", str(bundle)]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options.pop("--components") == "unet"
    assert options.pop("--flavour") == "tensorrt_rtx"
    assert options.pop("--target") == "sm89"
    assert options.pop("--precision") == "fp16"
    requests = parse_requests(
        size=options["--size"], batch=options["--batch"], text_chunks=options["--text-chunks"], factor=8
    )
    built = profiles_of("unet", session.spec.inputs, requests, factor=8)
    assert covers(dataclasses.replace(sidecar, profiles=built), wanted) is not None


def test_auto_takes_onnx_runtime_for_other_shapes_and_says_so(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT
) -> None:
    put_engine(bundle, "unet", "fp16")
    session = opened(bundle, device, "auto")
    plain = open_session(open_bundle(bundle), "unet", "fp16", backend="onnxruntime")
    for sizes, backend in ((shapes(), "tensorrt_rtx on Fake GPU sm89"), (shapes(1, 16, 16), "onnxruntime CPU")):
        given = feeds(sizes)
        assert np.array_equal(session(given)["out_sample"], plain(given)["out_sample"])
        assert session.backend == backend
    (note,) = session.notes
    assert note.startswith("onnxruntime CPU in the place of an engine: unet: expected shapes that its engines hold")
    session.close()
    gc.collect()
    assert not device.leaks()


def test_of_several_engines_the_tightest_runs_and_only_that_is_loaded(
    bundle: Path, device: FakeDevice, trt: FakeTensorRT
) -> None:
    put_engine(bundle, "unet", "fp16", size="64..256", weight_bytes=10)
    put_engine(bundle, "unet", "fp16", size="64", weight_bytes=20)
    session = opened(bundle, device)
    session(feeds(shapes()))
    assert device.weights == 20
    session(feeds(shapes(2, 16, 16)))
    assert device.weights == 30
    session.close()


def test_a_stripped_engine_is_filled_from_the_graph(bundle: Path, device: FakeDevice, trt: FakeTensorRT) -> None:
    put_engine(bundle, "unet", "fp16", stripped=True, refit="all")
    given = feeds(shapes())
    plain = open_session(open_bundle(bundle), "unet", "fp16", backend="onnxruntime")
    session = opened(bundle, device)
    assert np.array_equal(session(given)["out_sample"], plain(given)["out_sample"])
    session.close()


def test_weights_are_streamed_by_full_tensorrt_alone(
    bundle: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = FakeTensorRT(device, name="tensorrt", version=VERSION)
    monkeypatch.setattr(engine_loading, "import_flavour", lambda flavour: full)
    put_engine(bundle, "unet", "fp16", flavour="tensorrt", weight_bytes=4 << 20, activation_bytes=1 << 16)
    device.total = 3 << 20
    with pytest.raises(BackendError, match="unet: weights: expected"):
        opened(bundle, device, "tensorrt")
    session = opened(bundle, device, "tensorrt", weight_budget=1 << 20)
    session(feeds(shapes()))
    assert device.weights == 1 << 20
    session.close()
    # As the plan has it: what the activations of every lane leave of the free memory.
    session = opened(bundle, device, "tensorrt", weight_budget="room", lanes=2)
    session(feeds(shapes()))
    assert device.weights == (3 << 20) - 2 * (1 << 16)
    session.close()
    device.total = 64 << 20
    session = opened(bundle, device, "tensorrt", weight_budget="room")
    session(feeds(shapes()))
    assert device.weights == 4 << 20
    session.close()
    put_engine(bundle, "unet", "fp16", size="128")
    with pytest.raises(BackendError, match="full TensorRT to stream weights, got tensorrt_rtx"):
        opened(bundle, device, "tensorrt_rtx", weight_budget=1 << 20)


def test_the_default_precision_is_that_of_an_engine_that_can_be_used(bundle: Path, device: FakeDevice) -> None:
    manifest = load_manifest(bundle)
    for component in ("text_encoder", "unet", "vae_decoder"):
        (artifact,) = (a for a in manifest.artifacts if a.component == component)
        again = dataclasses.replace(artifact, precision="fp32")
        manifest = dataclasses.replace(manifest, artifacts=(again, *manifest.artifacts))
    save_manifest(bundle, manifest)
    host, elsewhere = fake_host(device), fake_host(device, look=Machine)
    assert default_precision(open_bundle(bundle), backend="auto", host=host) == "fp32"
    assert default_precision(open_bundle(bundle), backend="tensorrt", host=host) == "fp16"
    put_engine(bundle, "unet", "fp16")
    assert default_precision(open_bundle(bundle), backend="auto", host=host) == "fp16"
    assert default_precision(open_bundle(bundle), backend="onnxruntime", host=host) == "fp32"
    assert default_precision(open_bundle(bundle), backend="auto", host=elsewhere) == "fp32"
    assert default_precision(open_bundle(bundle), backend="tensorrt_rtx", host=elsewhere) == "fp16"
