"""ONNX Runtime's CUDA provider without a GPU: a module that stands for onnxruntime-gpu and runs on the CPU."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bound_graph import expected, feeds_of, graph_bytes, plain_session
from numpy.testing import assert_array_equal

from latentrt.runtime import Pipeline, Request, backends, io_binding
from latentrt.runtime import session as session_module
from latentrt.runtime.cuda_device import OutOfDeviceMemory
from latentrt.runtime.errors import ArtifactError, BackendError
from latentrt.runtime.input_checks import checked_input
from latentrt.runtime.io_binding import BoundRuns
from latentrt.runtime.machine import Gpu, Machine
from latentrt.runtime.onnx_cuda import PROVIDER, PROVIDERS, CudaOptions, judge_cuda
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.specs import Array, TensorSpec

REFUSED = (
    "[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature as requested by the user as the "
    "model has control flow nodes which can't be supported by CUDAExecutionProvider"
)
SHAPES = {"sample": (2, 4, 4, 4), "timestep": (2,), "text": (2, 6, 3), "scale": ()}


class CudaSession:
    """A session that says it runs on CUDA."""

    def __init__(self, ort: CudaOrt, source: Any, options: Any) -> None:
        self._ort = ort
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return self._ort.started

    def run(self, names: Any, feeds: Any, options: Any = None) -> Any:
        if self._ort.fails is not None:
            raise self._ort.fails
        self._ort.run_options.append(options)
        return self._session.run(names, feeds)


class CudaOrt:
    """What onnxruntime-gpu offers, as far as the runtime asks for it."""

    SessionOptions, GraphOptimizationLevel = onnxruntime.SessionOptions, onnxruntime.GraphOptimizationLevel
    RunOptions, ExecutionOrder = onnxruntime.RunOptions, onnxruntime.ExecutionOrder
    __version__, cuda_version = "1.32.0", "13.0"

    def __init__(self) -> None:
        self.opened: list[dict[str, str]] = []
        self.run_options: list[Any] = []
        self.started = list(PROVIDERS)
        self.fails: Exception | None = None
        self.refuses: Exception | None = None

    def preload_dlls(self) -> None:
        print("Failed to load libcufft.so.12")

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", *PROVIDERS]

    def InferenceSession(
        self, source: Any, options: Any = None, providers: Any = None, told: Any = None, *, enable_fallback: int
    ) -> Any:
        assert enable_fallback == 0, "it would print an error and run on the CPU"
        if PROVIDER not in providers:
            return onnxruntime.InferenceSession(source, options, providers=providers)
        self.opened.append(dict(zip(providers, told or [{}] * len(providers), strict=True))[PROVIDER])
        if self.refuses is not None and ("enable_cuda_graph" in self.opened[-1] or "capture" not in str(self.refuses)):
            raise self.refuses
        return CudaSession(self, source, options)


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> CudaOrt:
    module = CudaOrt()
    monkeypatch.setattr(session_module, "import_onnxruntime", lambda: module)
    monkeypatch.setattr(session_module, "BoundRuns", partial(BoundRuns, device="cpu"))
    return module


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "unet" / "model.onnx"
    file.parent.mkdir()
    file.write_bytes(graph_bytes())
    return file


def test_what_runs_every_step_is_bound_and_recorded(ort: CudaOrt, path: Path) -> None:
    session = OnnxSession(path, providers=PROVIDERS, cuda=CudaOptions(device=1, memory_limit=5 << 30))
    (told,) = ort.opened
    assert told["enable_cuda_graph"] == "1"
    assert told["gpu_mem_limit"] == str(5 << 30)
    assert told["device_id"] == "1"
    assert told["arena_extend_strategy"] == "kSameAsRequested"
    session.warm_up([SHAPES])
    for seed in range(3):
        feeds = feeds_of(seed)
        assert_array_equal(session(feeds)["out_sample"], expected(plain_session(), feeds)["out_sample"])
    assert not ort.run_options, "all runs were bound"
    assert session.backend == "onnxruntime CUDA"
    assert session.notes == ()


def test_what_runs_once_gives_its_memory_back_after_every_run(ort: CudaOrt, path: Path) -> None:
    session = OnnxSession(path, providers=PROVIDERS, arena=False, cuda=CudaOptions(device=2))
    session.warm_up([SHAPES])
    session(feeds_of(0))
    assert "enable_cuda_graph" not in ort.opened[0], "a recorded run holds on to the memory it was recorded with"
    (options,) = ort.run_options
    assert options.get_run_config_entry("memory.enable_memory_arena_shrinkage") == "gpu:2"


def test_a_graph_that_cannot_be_recorded_runs_plainly_and_says_so(ort: CudaOrt, path: Path) -> None:
    ort.refuses = RuntimeError(REFUSED)
    session = OnnxSession(path, providers=PROVIDERS)
    assert ["enable_cuda_graph" in told for told in ort.opened] == [True, False]
    feeds = feeds_of(1)
    assert_array_equal(session(feeds)["out_sample"], expected(plain_session(), feeds)["out_sample"])
    (note,) = session.notes
    assert note.startswith("unet runs without CUDA graphs: This session cannot use the graph capture feature")
    assert note.endswith("control flow nodes which can't be supported by CUDAExecutionProvider")
    ort.opened.clear()
    OnnxSession(path, providers=PROVIDERS, cuda=CudaOptions(graphs=False))
    assert len(ort.opened) == 1


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        ("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1207959552", "1,152 MiB more"),
        ("Available memory of 1048576 is smaller than requested bytes of 33554432", "32 MiB more"),
        ("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc", "more"),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", "more"),
    ],
)
def test_a_gpu_that_is_too_small_is_an_error_that_says_what_to_do(
    ort: CudaOrt, path: Path, error: str, asked: str
) -> None:
    remedy = r".*--residency swap.*smaller picture or batch.*latentrt plan"
    ort.fails = RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {error}")
    session = OnnxSession(path, providers=PROVIDERS, arena=False)
    with pytest.raises(OutOfDeviceMemory, match=rf"unet: expected {asked} of the GPU's memory on inputs .*{remedy}"):
        session(feeds_of(0))
    ort.refuses = ort.fails
    with pytest.raises(OutOfDeviceMemory, match=rf"unet: expected {asked} of the GPU's memory for its weights{remedy}"):
        OnnxSession(path, providers=PROVIDERS)


def test_a_machine_that_is_too_small_is_not_taken_for_its_gpu(
    ort: CudaOrt, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1207959552")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    wanted = r"unet: expected 1,152 MiB more of memory for its weights.*--residency swap.*fp16\.$"
    with pytest.raises(OutOfDeviceMemory, match=wanted):
        OnnxSession(path)


def test_other_failures_stay_what_they_are(ort: CudaOrt, path: Path) -> None:
    ort.fails = RuntimeError("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED")
    with pytest.raises(BackendError, match=r"unet: onnxruntime CUDA failed on inputs .*EXECUTION_FAILED") as caught:
        OnnxSession(path, providers=PROVIDERS, arena=False)(feeds_of(0))
    assert not isinstance(caught.value, OutOfDeviceMemory)
    ort.refuses = RuntimeError("Load model failed: Protobuf parsing failed.")
    ort.opened.clear()
    with pytest.raises(ArtifactError, match="Protobuf parsing failed"):
        OnnxSession(path, providers=PROVIDERS)
    assert len(ort.opened) == 1, "there is nothing to be had from another attempt"


def test_a_provider_that_was_left_out_silently_is_noticed(ort: CudaOrt, path: Path) -> None:
    ort.started = ["CPUExecutionProvider"]
    with pytest.raises(BackendError, match=f"unet: expected {PROVIDER}, it did not start.*pip install"):
        OnnxSession(path, providers=PROVIDERS)


CARD = Machine(gpus=(Gpu("NVIDIA H200", "sm90", 141 << 30),), cuda=(13, 0))


def test_it_is_used_where_it_starts(ort: CudaOrt, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge_cuda(ort, lambda: CARD) is None
    output = capsys.readouterr()
    assert output.out == "", "stdout is for results"
    assert output.err == "Failed to load libcufft.so.12\n"


def test_why_it_is_not_used(ort: CudaOrt) -> None:
    cpu_build = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])

    def no_look() -> Machine:
        raise AssertionError("a CPU build needs no look at the machine")

    assert "no CUDA provider. Run: pip uninstall -y onnxruntime &&" in str(judge_cuda(cpu_build, no_look))
    bare = Machine(why_no_gpu="no NVIDIA driver: libcuda.so.1 is not installed")
    assert judge_cuda(ort, lambda: bare) == (
        "the CUDA provider is installed, but no NVIDIA driver: libcuda.so.1 is not installed"
    )
    old = Machine(gpus=CARD.gpus, cuda=(12, 4))
    assert judge_cuda(ort, lambda: old) == (
        "onnxruntime-gpu 1.32.0 is built for CUDA 13, and this driver supports 12.4. "
        "Update the driver, or install an onnxruntime-gpu for CUDA 12"
    )
    ort.started = ["CPUExecutionProvider"]
    assert judge_cuda(ort, lambda: CARD) == (
        "the CUDA provider does not find the libraries of CUDA 13 and cuDNN 9. "
        "Run: pip install 'onnxruntime-gpu[cuda,cudnn]==1.32.0'"
    )
    ort.refuses = RuntimeError(
        "CUDA failure 803: system has unsupported display driver / cuda driver combination\nat x"
    )
    assert judge_cuda(ort, lambda: CARD) == (
        "the CUDA provider does not start: "
        "CUDA failure 803: system has unsupported display driver / cuda driver combination"
    )


def test_a_whole_run_through_the_device(ort: CudaOrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text goes up once for the steps with guidance, once for those without, and the pictures are the CPU's."""
    folder = tmp_path / "sd"
    with zipfile.ZipFile(Path(__file__).parents[1] / "fixtures" / "optimum" / "sd.zip") as archive:
        archive.extractall(folder)
    request = Request(prompt="a small red circle", sampler="Euler", steps=6, seed=3, guidance_interval=(0.0, 0.5))
    request = request.replace(width=64, height=64)
    wanted = Pipeline.load(folder, backend="onnxruntime")(request)
    assert ort.opened == [], "that was the CPU's"
    copied: list[tuple[str, str]] = []

    def noted(component: str, tensor: TensorSpec, value: Array) -> Array:
        copied.append((component, tensor.name))
        return checked_input(component, tensor, value)

    monkeypatch.setattr(io_binding, "checked_input", noted)
    monkeypatch.setattr(backends, "why_no_cuda", lambda: None)
    pipe = Pipeline.load(folder, backend="cuda")
    for times in (1, 2):
        found = pipe(request)
        assert_array_equal(found.latents, wanted.latents)
        assert_array_equal(found.images, wanted.images)
        assert copied.count(("unet", "sample")) == 6 * times
        assert copied.count(("unet", "encoder_hidden_states")) == 2 * times
    assert {component for component, _ in copied} == {"unet"}, "what runs once holds nothing on the device"
    assert pipe.backend == "onnxruntime CUDA"
    assert pipe.notes == ()


def test_a_closed_session_says_so(path: Path) -> None:
    session = OnnxSession(path)
    result = session(feeds_of(0))
    session.close()
    session.close()
    with pytest.raises(BackendError, match="unet: expected an open session, got one that was closed"):
        session(feeds_of(0))
    assert np.isfinite(result["out_sample"]).all(), "results outlive their session"


def test_a_closed_session_on_cuda_says_so_too(ort: CudaOrt, path: Path) -> None:
    session = OnnxSession(path, providers=PROVIDERS)
    session(feeds_of(0))
    session.close()
    with pytest.raises(BackendError, match="unet: expected an open session, got one that was closed"):
        session(feeds_of(0))
