from __future__ import annotations

import ctypes
import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentrt.runtime import doctor, machine
from latentrt.runtime.cli import main
from latentrt.runtime.doctor import conflicts, engine_statuses, examine, onnxruntime_backends, tensorrt_backend
from latentrt.runtime.engine_sidecar import EngineSidecar, PrecisionReadout, sidecar_json
from latentrt.runtime.errors import ArtifactError, BackendError
from latentrt.runtime.machine import Gpu, Machine, Package, read_libcuda
from latentrt.runtime.manifest import Artifact, EngineRecord, Manifest, record_of, save_manifest

ADA = Gpu("RTX 4090", "sm89", 24 << 30)
HOPPER = Gpu("H200", "sm90", 139 << 30)
RTX = {"tensorrt_rtx": Package("1.7.1.116", 13)}
NO_DRIVER = Machine(packages=RTX, why_no_gpu="no NVIDIA driver: libcuda.so.1 is not installed", platform="linux_x86_64")


class FakeCuda:
    """libcuda's functions over a list of (name, major, minor, bytes); `failing` maps a function to its error code."""

    def __init__(self, devices: list[tuple[str, int, int, int]], **failing: int) -> None:
        self.devices = devices
        self.failing = failing

    def __getattr__(self, function: str) -> Any:
        def call(*args: Any) -> int:
            if function in self.failing:
                return self.failing[function]
            if function == "cuDriverGetVersion":
                args[0]._obj.value = 13020
            elif function == "cuDeviceGetCount":
                args[0]._obj.value = len(self.devices)
            elif function == "cuDeviceGet":
                args[0]._obj.value = args[1]
            elif function == "cuDeviceGetName":
                args[0].value = self.devices[args[2].value][0].encode()
            elif function == "cuDeviceGetAttribute":
                args[0]._obj.value = self.devices[args[2].value][{75: 1, 76: 2}[args[1]]]
            elif function == "cuDeviceTotalMem_v2":
                args[0]._obj.value = self.devices[args[1].value][3]
            return 0

        return call


def test_gpus_and_cuda_version_from_the_driver() -> None:
    gpus, cuda = read_libcuda(FakeCuda([("RTX 4090", 8, 9, 24 << 30), ("RTX 5090", 12, 0, 32 << 30)]))
    assert gpus == (ADA, Gpu("RTX 5090", "sm120", 32 << 30))
    assert cuda == (13, 2)


def test_a_driver_without_a_gpu_or_out_of_order_says_so() -> None:
    with pytest.raises(OSError, match="finds no GPU"):
        read_libcuda(FakeCuda([], cuInit=100))
    with pytest.raises(OSError, match="cuInit returned CUDA error 803"):
        read_libcuda(FakeCuda([], cuInit=803))


def test_gpus_hidden_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "load_libcuda", lambda: FakeCuda([]))
    found = machine.probe_machine()
    assert found.gpus == ()
    assert "CUDA_VISIBLE_DEVICES" in str(found.why_no_gpu)


def test_a_driver_library_that_is_something_else_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "load_libcuda", lambda: ctypes.CDLL(None))
    assert "could not be read" in str(machine.probe_machine().why_no_gpu)


def test_processor_features_are_those_that_matter_in_order(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu amx_int8 avx512_vnni avx2 sse\n")
    assert machine.cpu_features(info) == ("avx2", "avx512_vnni", "amx_int8")
    info.write_text("Features\t: fp asimddp i8mm\n")
    assert machine.cpu_features(info) == ("asimddp", "i8mm")
    info.write_text("nothing")
    with pytest.raises(OSError, match="no features"):
        machine.cpu_features(info)


def test_memory_is_what_can_be_used() -> None:
    free, total = machine.memory_bytes()
    assert 0 < free <= total


PROBES = ["probe_machine", "memory_bytes", "core_count", "cpu_features", "disk_bytes", "conflicts", "extras"]
PROBES += ["onnxruntime_backends", "tensorrt_backend"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    broken=st.sets(st.sampled_from(PROBES), min_size=1),
    error=st.sampled_from([OSError("odd"), ValueError(), KeyError("x"), RuntimeError("bad"), AttributeError("none")]),
)
def test_any_probe_may_fail_in_any_way_and_becomes_a_line(
    broken: set[str], error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        for name in broken:
            patch.setattr(doctor, name, fail)
        report = examine()
        assert len([p for p in report.problems if type(error).__name__ in p]) >= len(broken)
        assert main(["doctor"]) == (0 if report.can_generate else 1)
        assert main(["doctor", "--json"]) == (0 if report.can_generate else 1)
    capsys.readouterr()


def ort(offered: list[str], started: list[str]) -> Any:
    """A module onnxruntime that offers providers, and that starts some of them."""
    return SimpleNamespace(
        __version__="1.32.0",
        get_available_providers=lambda: [f"{name}ExecutionProvider" for name in offered],
        InferenceSession=lambda *args, **options: SimpleNamespace(
            get_providers=lambda: [f"{name}ExecutionProvider" for name in started]
        ),
    )


@pytest.mark.parametrize(
    ("offered", "started", "here", "cuda", "said", "remedy"),
    [
        (["CPU"], [], NO_DRIVER, False, "no CUDA provider, and no NVIDIA driver", None),
        (["CPU"], [], Machine(gpus=(ADA,)), False, "no CUDA provider", "pip uninstall -y onnxruntime"),
        (["CUDA", "CPU"], ["CUDA", "CPU"], NO_DRIVER, False, "installed, but no NVIDIA driver", None),
        (["CUDA", "CPU"], ["CUDA", "CPU"], Machine(gpus=(ADA,)), True, "on RTX 4090", None),
        (["CUDA", "CPU"], ["CPU"], Machine(gpus=(ADA,)), False, "does not find the libraries of CUDA", None),
    ],
)
def test_onnxruntime(
    offered: list[str],
    started: list[str],
    here: Machine,
    cuda: bool,
    said: str,
    remedy: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "import_onnxruntime", lambda: ort(offered, started))
    on_cpu, on_cuda = onnxruntime_backends(here)
    assert on_cpu.usable
    assert on_cuda.usable == cuda
    assert said in on_cuda.detail
    assert (on_cuda.remedy is None) == (remedy is None)
    assert (remedy or "") in (on_cuda.remedy or "")


def test_without_onnxruntime_nothing_can_generate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Any:
        raise BackendError("onnxruntime: expected an importable package")

    monkeypatch.setattr(doctor, "import_onnxruntime", missing)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "pip install 'latentrt[cpu]'" in out
    assert "No backend here can generate pictures yet." in out


def test_two_onnxruntimes_are_a_problem_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", {"onnxruntime": "1", "onnxruntime-gpu": "1"}.get)
    (problem,) = conflicts()
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in problem
    monkeypatch.setattr(doctor, "installed_version", {"onnxruntime-gpu": "1"}.get)
    assert conflicts() == []


def fake_rtx() -> Any:
    names = {name: object() for name in ("SM75", "SM89", "SM120", "CURRENT")}
    return SimpleNamespace(__version__="1.7.1.116", Builder=object, ComputeCapability=SimpleNamespace(**names))


@pytest.mark.parametrize(
    ("here", "usable", "said", "remedy"),
    [
        (NO_DRIVER, False, "builds ahead of time for sm75, sm89, sm120; runs nothing here: no NVIDIA driver", None),
        (Machine(gpus=(HOPPER,), packages=RTX), False, "H200 is sm90, which tensorrt_rtx", "latentrt[tensorrt]"),
        (Machine(gpus=(Gpu("T", "sm61", 1),), packages=RTX), False, "T is sm61", "pip install -U"),
        (Machine(gpus=(ADA,), packages=RTX, cuda=(12, 4)), False, "needs a driver for CUDA 13", "Update"),
        (Machine(gpus=(ADA,), packages=RTX, cuda=(13, 0)), True, "engines for sm89 can run on RTX 4090", None),
    ],
)
def test_tensorrt_rtx(
    here: Machine, usable: bool, said: str, remedy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "import_flavour", lambda name: fake_rtx())
    monkeypatch.setattr(doctor, "why_no_bindings", lambda: None)
    backend = tensorrt_backend("tensorrt_rtx", here)
    assert backend.usable == usable
    assert said in backend.detail
    assert (backend.remedy is None) == (remedy is None)
    assert (remedy or "") in (backend.remedy or "")


def test_engines_need_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "import_flavour", lambda name: fake_rtx())
    monkeypatch.setattr(doctor, "why_no_bindings", lambda: "it needs cuda-bindings, which is not installed")
    backend = tensorrt_backend("tensorrt_rtx", Machine(gpus=(ADA,), packages=RTX, cuda=(13, 0)))
    assert not backend.usable
    assert "pip install 'cuda-bindings" in str(backend.remedy)


def test_a_flavour_that_is_missing_or_half_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    missing = tensorrt_backend("tensorrt", Machine())
    assert (missing.usable, missing.detail, missing.remedy) == (
        False,
        "not installed",
        "pip install 'latentrt[tensorrt]'",
    )
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    half = tensorrt_backend("tensorrt", Machine(packages={"tensorrt": Package("11")}))
    assert "without its libraries" in half.detail


SIDECAR = EngineSidecar(
    component="unet",
    precision="fp16",
    key="k",
    flavour="tensorrt_rtx",
    flavour_version="1.7.1.116",
    cuda_major=13,
    targets=("sm89",),
    gpu_name=None,
    platform="linux_x86_64",
    onnx={},
    flags=(),
    profiles=(),
    inputs=(),
    outputs=(),
    precisions=PrecisionReadout({}, {}, ""),
    build_seconds=0.0,
    engine_bytes=3,
    engine_sha256="",
    weight_bytes=None,
    activation_bytes=None,
    tensor_bytes=None,
    obtained={},
    made_from={},
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    for name, content in (("g.onnx", b"graph"), ("e.engine", b"abc"), ("e.json", b"")):
        (tmp_path / name).write_bytes(content)
    graph = record_of(tmp_path / "g.onnx")
    engine = record_of(tmp_path / "e.engine")
    sidecar = dataclasses.replace(SIDECAR, onnx={"g.onnx": graph.sha256}, engine_sha256=engine.sha256)
    (tmp_path / "e.json").write_bytes(sidecar_json(sidecar))
    files = {name: record_of(tmp_path / name) for name in ("g.onnx", "e.engine", "e.json")}
    artifact = Artifact("unet", "fp16", "g.onnx", ("g.onnx",), 20, "", {}, {}, 0)
    record = EngineRecord("unet", "fp16", "e.engine", "e.json", "k", "tensorrt_rtx", ("sm89",))
    manifest = Manifest("x", "StableDiffusionPipeline", "0", files=files, artifacts=(artifact,), engines=(record,))
    save_manifest(tmp_path, manifest)
    return tmp_path


def status(bundle: Path, here: Machine = Machine(gpus=(ADA,), packages=RTX, cuda=(13, 0))) -> str | None:  # noqa: B008
    (found,) = engine_statuses(bundle, here)
    assert found.usable == (found.reason is None)
    return found.reason


def test_engines_of_a_bundle(bundle: Path) -> None:
    assert status(bundle) is None
    assert "no NVIDIA driver" in str(status(bundle, NO_DRIVER))


def test_an_engine_for_another_gpu(bundle: Path) -> None:
    other = Machine(gpus=(Gpu("RTX 3090", "sm86", 1),), packages=RTX)
    assert "built for sm89, and this GPU (RTX 3090) is sm86" in str(status(bundle, other))


@pytest.mark.parametrize("name", ["e.engine", "e.json"])
def test_a_truncated_engine_or_sidecar(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"")
    assert f"{name}: expected" in str(status(bundle))


def test_an_engine_of_an_older_graph(bundle: Path) -> None:
    content = json.loads((bundle / "manifest.json").read_text())
    content["files"]["g.onnx"]["sha256"] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps(content))
    assert "older graph" in str(status(bundle))


def test_doctor_of_a_bundle_and_of_a_folder_that_is_none(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", str(bundle), "--json"])
    assert [e["path"] for e in json.loads(capsys.readouterr().out)["engines"]] == ["e.engine"]
    assert main(["doctor", str(tmp_path / "none")]) == 1
    assert "expected a latentrt bundle" in capsys.readouterr().err
    with pytest.raises(ArtifactError):
        examine(tmp_path / "none")
