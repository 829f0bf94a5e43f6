"""latentrt as a worker runs it: the same pictures timed and untimed, every part of a run counted once.

What concerns GPUs is on the fake one: none of it was run on a real one.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDevice
from fake_engines import drawing_bundle, edit_sidecar, fake_host
from fake_trt import FakeTensorRT
from PIL import Image

from latentrt.benchmarks import latentrt_handlers
from latentrt.benchmarks.cases import Model, Settings, Subject
from latentrt.benchmarks.results_file import STAGES, Vram
from latentrt.benchmarks.stage_clock import StageClock
from latentrt.benchmarks.workers import open_worker
from latentrt.runtime import cuda_driver, engine_host, engine_loading, residency
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.text_encoding import TextEncoder
from latentrt.runtime.vram import VramPeak

MIB = 1 << 20
SETTINGS = {"sampler": "Heun", "schedule": "karras", "steps": 3, "guidance": 5.0, "guidance_interval": [0.0, 1.0]}
Open = Callable[..., tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_driver, "why_no_bindings", lambda: None)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return drawing_bundle(tmp_path / "tiny.bundle")


@pytest.fixture
def opened(bundle: Path) -> Open:
    def opens(backend: str = "onnxruntime", **options: Any) -> Any:
        subject = {"precision": "fp16", "backend": backend, "width": 64, "height": 64}
        return latentrt_handlers.open_subject(subject, {"bundle": str(bundle), "options": options})

    return opens


def request(**settings: Any) -> dict[str, Any]:
    return {"settings": SETTINGS, "prompts": ["red icon", "blue"], "seed": 3, "timed": True, "keep": None, **settings}


def test_timed_and_untimed_runs_draw_what_the_pipeline_draws(opened: Open, bundle: Path, tmp_path: Path) -> None:
    _, commands = opened()
    with Pipeline.load(bundle, precision="fp16", backend="onnxruntime") as pipeline:
        steps: list[Any] = []
        expected = pipeline(
            ["red icon", "blue"], sampler="heun", schedule="karras", steps=3, guidance=5.0, seed=3, width=64, height=64,
            on_step=lambda step: steps.append(step.latents.copy()),
        )  # fmt: skip
    for timed in (True, False):
        commands["run"](request(timed=timed, keep=str(tmp_path / "kept.npz")))
        with np.load(tmp_path / "kept.npz") as kept:
            assert np.array_equal(kept["images"], expected.images)
            assert np.array_equal(kept["trajectory"], np.stack(steps))
            assert (kept["images"].dtype, kept["trajectory"].dtype) == (np.uint8, np.float32)


def test_a_run_is_its_stages_and_little_else(opened: Open) -> None:
    _, commands = opened()
    answer = commands["run"](request())
    assert list(answer["stages"]) != []
    assert set(answer["stages"]) == set(STAGES)
    assert all(seconds > 0 for seconds in answer["stages"].values())
    assert sum(answer["stages"].values()) < answer["seconds"]
    # Heun's method calls the U-Net twice a step, but for the last.
    assert len(answer["calls"]) == 5
    assert sum(answer["calls"]) == pytest.approx(answer["stages"]["unet"])
    assert answer["gpu_calls"] is None


def test_every_run_pays_for_its_text_encoder(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    _, commands = opened()
    runs: list[str] = []
    plain = OnnxSession.__call__

    def watched(self: OnnxSession, feeds: Any) -> Any:
        runs.append(self.spec.name)
        return plain(self, feeds)

    monkeypatch.setattr(OnnxSession, "__call__", watched)
    for timed in (True, True, False, False):
        runs.clear()
        commands["run"](request(timed=timed))
        # Two prompts, and the negative one that they share.
        assert runs.count("text_encoder") == 3


def test_tokenizers_and_files_are_timed(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of a clock that stands still otherwise is where it was spent."""
    now = [0.0]
    monkeypatch.setattr(StageClock.__init__, "__defaults__", (lambda: now[0],))

    def slower(owner: Any, name: str, seconds: float) -> None:
        plain = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    slower(TextEncoder, "chunks", 1.0)
    slower(latentrt_handlers, "encode_picture", 1000.0)
    slower(Image.Image, "save", 1000000.0)
    _, commands = opened()
    stages = commands["run"](request())["stages"]
    assert 3 <= stages["tokenize"] < 1000
    assert stages["encode"] == 2 * 1001000
    assert (stages["unet"], stages["sampler"], stages["vae_decoder"]) == (0, 0, 0)


def test_files_hold_the_parameters(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[bytes] = []
    plain = latentrt_handlers._encode
    monkeypatch.setattr(latentrt_handlers, "_encode", lambda result: files.extend(plain(result)))
    _, commands = opened()
    commands["run"](request())
    commands["run"](request(timed=False))
    assert files[:2] == files[2:], "timed runs write what others do"
    with Image.open(io.BytesIO(files[1])) as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))
        assert picture.info["parameters"].startswith("blue\n")
        assert "Seed: 4" in picture.info["parameters"]


def test_networks_that_go_stay_for_their_stage(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    _, commands = opened(residency="swap")
    opens: list[str] = []
    plain = residency.SwappedSession._opened

    def watched(self: Any) -> Any:
        if not self.is_open:
            opens.append(self._name)
        return plain(self)

    monkeypatch.setattr(residency.SwappedSession, "_opened", watched)
    commands["run"](request())
    assert sorted(opens) == ["text_encoder", "unet", "vae_decoder"]


def test_on_a_cpu_nothing_is_said_of_a_gpu(opened: Open) -> None:
    answer, commands = opened()
    assert (answer["backend"], answer["on_gpu"]) == ("onnxruntime CPU", False)
    assert answer["precisions"] == {"text_encoder": "fp16", "unet": "fp16", "vae_decoder": "fp16"}
    assert answer["packages"]["numpy"] == np.__version__
    assert commands["memory"]({}) == {"vram": {"reason": "runs on the CPU"}}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeDevice, FakeTensorRT]:
    device = FakeDevice()
    trt = FakeTensorRT(device)
    monkeypatch.setattr(engine_loading, "import_flavour", lambda flavour: trt)
    monkeypatch.setattr(engine_host, "EngineHost", lambda **settings: fake_host(device, **settings))
    return device, trt


class Meter:
    """A look at the fake GPU, where CUDA itself takes 50 MiB and was once 20 MiB more in use."""

    device: FakeDevice

    def __init__(self, *, interval: float) -> None:
        pass

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def now(self) -> VramPeak:
        free, total = self.device.memory()
        return VramPeak(total - free + 50 * MIB, "process")

    @property
    def peak(self) -> VramPeak:
        nbytes = self.now.nbytes
        assert nbytes is not None
        return VramPeak(nbytes + 20 * MIB, "process")


def test_calls_of_engines_are_timed_on_the_gpu_too(opened: Open, gpu: tuple[FakeDevice, FakeTensorRT]) -> None:
    device, trt = gpu
    answer, commands = opened("tensorrt_rtx")
    assert (answer["backend"], answer["on_gpu"]) == ("tensorrt_rtx on Fake GPU sm89", True)
    one = {"prompts": ["red icon"], "settings": {**SETTINGS, "sampler": "Euler"}}
    for trt.seconds in (0.25, 0.5):
        assert commands["run"](request(**one))["gpu_calls"] == [trt.seconds] * 3
    device.log.clear()
    assert commands["run"](request(**one, timed=False)).keys() == {
        "seconds", "backend", "on_gpu", "precisions", "notes",
    }  # fmt: skip
    assert device.count("record") == 0


def test_the_gpus_memory_is_told_apart(
    opened: Open, gpu: tuple[FakeDevice, FakeTensorRT], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, _ = gpu
    monkeypatch.setattr(latentrt_handlers, "VramMeter", Meter)
    monkeypatch.setattr(Meter, "device", device, raising=False)
    _, commands = opened("tensorrt_rtx")
    commands["run"](request(prompts=["red icon"]))
    found = Vram(**commands["memory"]({})["vram"])
    free, total = device.memory()
    assert (found.weights, found.activation) == (111000, 4096)
    assert found.io == total - free - 111000 - 4096
    assert (found.context, found.peak, found.peak_of) == (50 * MIB, total - free + 70 * MIB, "process")
    assert found.reason is None


def test_what_is_not_known_of_the_gpus_memory_has_a_reason(
    opened: Open, bundle: Path, gpu: tuple[FakeDevice, FakeTensorRT], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latentrt_handlers, "VramMeter", Meter)
    monkeypatch.setattr(Meter, "device", gpu[0], raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(Meter, "now", VramPeak(None, reason="NVML does not answer"))
        patch.setattr(Meter, "peak", VramPeak(None, reason="NVML does not answer"))
        found = Vram(**opened("tensorrt_rtx")[1]["memory"]({})["vram"])
        assert (found.weights, found.context, found.peak) == (111000, None, None)
        assert found.reason == "NVML does not answer"
    edit_sidecar(bundle, "unet", weight_bytes=None)
    found = Vram(**opened("tensorrt_rtx")[1]["memory"]({})["vram"])
    assert (found.weights, found.context, found.peak_of) == (None, None, "process")
    assert found.reason is not None
    assert "sidecar" in found.reason


def test_in_a_process_of_its_own_it_imports_what_it_needs(bundle: Path, tmp_path: Path) -> None:
    handlers = tmp_path / "telling.py"
    handlers.write_text(
        "import sys\n"
        "from latentrt.benchmarks import latentrt_handlers\n"
        "def open_subject(subject, model):\n"
        "    opened, commands = latentrt_handlers.open_subject(subject, model)\n"
        "    def run(request):\n"
        "        return {**commands['run'](request), 'notes': [name.split('.')[0] for name in sys.modules]}\n"
        "    return opened, {**commands, 'run': run}\n"
    )
    subject = Subject(system="latentrt", precision="fp16", backend="onnxruntime", width=64, height=64, batch=2)
    settings = Settings(sampler="Euler", schedule=None, steps=2, guidance=5.0)
    model = Model(bundle=str(bundle), threads=1)
    with open_worker(subject, model, python=sys.executable, handlers=str(handlers)) as worker:
        run = worker.run(settings, ["red icon", "blue"], 1)
        assert len(run.calls) == 2
        assert {"onnxruntime", "numpy", "PIL"} <= set(worker.opened.notes)
        lean = {"torch", "diffusers", "transformers", "onnx", "scipy", "matplotlib", "pydantic", "tensorrt", "typer"}
        assert lean & set(worker.opened.notes) == set()
        assert worker.memory().vram == Vram(reason="runs on the CPU")
