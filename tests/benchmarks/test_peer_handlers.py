"""What a peer's process answers, held against diffusers called by hand, and against latentrt."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import ldm_layout
import numpy as np
import pytest
import torch
import transformers

from latentrt.benchmarks import peer_handlers
from latentrt.benchmarks.cases import Settings
from latentrt.benchmarks.peers import peer_settings
from latentrt.benchmarks.results_file import STAGES, Vram
from latentrt.export.checkpoint import open_checkpoint

PROMPTS, SEED, STEPS = ("red cube", "blue"), 11, 4
SUBJECT = {"system": "diffusers", "precision": "fp32", "backend": "cpu", "width": 64, "height": 48, "batch": 2}
LIBRARIES = (diffusers, transformers)
Handlers = Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]
Opened = tuple[dict[str, Any], Handlers]


@pytest.fixture(scope="module", autouse=True)
def undisturbed() -> Iterator[None]:
    """A peer has its process to itself; here it does not."""
    threads, levels = torch.get_num_threads(), [library.utils.logging.get_verbosity() for library in LIBRARIES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
    torch.set_num_threads(threads)
    for library, level in zip(LIBRARIES, levels, strict=True):
        library.utils.logging.set_verbosity(level)
        library.utils.logging.enable_progress_bar()


def model_of(checkpoint: Path, **others: Any) -> dict[str, Any]:
    known = {"bundle": "no bundle", "checkpoint": str(checkpoint), "optimum_model": None, "threads": 1}
    return {**known, **others}


@pytest.fixture(scope="module")
def opened(tiny_checkpoint: Path) -> Opened:
    return peer_handlers.open_subject(SUBJECT, model_of(tiny_checkpoint))


def request(sampler: str = "DPM++ 2M", schedule: str | None = "karras", **others: Any) -> dict[str, Any]:
    settings = Settings(sampler=sampler, schedule=schedule, steps=STEPS, guidance=5.0)
    known = {"settings": peer_settings(settings), "prompts": PROMPTS, "seed": SEED, "timed": True, "keep": None}
    return {**known, **others}


def kept(handlers: Handlers, path: Path, **others: Any) -> dict[str, Any]:
    """The arrays of a keeping run."""
    handlers["run"](request(**others, keep=str(path)))
    with np.load(path) as arrays:
        return dict(arrays)


def by_hand(checkpoint: Path, scheduler: Any, **options: Any) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    return pipe


def drawn_by_hand(pipe: Any, **options: Any) -> Any:
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(len(PROMPTS))]
    call = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "width": 64, "height": 48, "generator": generators}
    return pipe(list(PROMPTS), **call, **options).images


def test_a_peer_says_what_it_is(opened: Opened) -> None:
    answer, handlers = opened
    assert (answer["backend"], answer["on_gpu"], answer["precisions"]) == ("PyTorch CPU", False, {"all": "fp32"})
    assert answer["notes"] == ["PyTorch with 1 threads"]
    assert answer["packages"]["torch"] == importlib.metadata.version("torch")
    assert answer["load"] > 0
    assert handlers["memory"]({}) == {"vram": {"reason": "runs on the CPU"}}


def test_pictures_and_latents_are_those_of_diffusers(opened: Opened, tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = kept(opened[1], tmp_path / "kept.npz")
    pipe = by_hand(tiny_checkpoint, diffusers.DPMSolverMultistepScheduler, use_karras_sigmas=True)
    pictures = [np.asarray(picture) for picture in drawn_by_hand(pipe, output_type="pil")]
    assert found["images"].shape == (2, 48, 64, 3)
    np.testing.assert_array_equal(found["images"], pictures)
    assert found["trajectory"].shape == (STEPS, 2, 4, 6, 8)
    assert found["trajectory"].dtype == np.float32
    np.testing.assert_array_equal(found["trajectory"][-1], drawn_by_hand(pipe, output_type="latent").numpy())
    changes = np.abs(np.diff(found["trajectory"], axis=0)).max(axis=(1, 2, 3, 4))
    assert (changes > 0.01).all()


def test_a_run_is_the_same_with_the_clock_and_without(opened: Opened, tmp_path: Path) -> None:
    timed, plain = (kept(opened[1], tmp_path / f"{timed}.npz", timed=timed) for timed in (True, False))
    np.testing.assert_array_equal(timed["images"], plain["images"])
    assert opened[1]["run"](request(timed=False)).keys() == {"seconds"}


def test_the_stages_are_parts_of_the_run(opened: Opened) -> None:
    run = opened[1]["run"](request())
    assert set(run["stages"]) == set(STAGES)
    assert all(seconds > 0 for seconds in run["stages"].values())
    # What is left are the pipeline's checks, its noise, and the conversion to pictures.
    assert 0.5 * run["seconds"] < sum(run["stages"].values()) < run["seconds"]
    assert len(run["calls"]) == STEPS
    assert math.fsum(run["calls"]) == pytest.approx(run["stages"]["unet"])
    assert run["gpu_calls"] is None


def test_a_solver_of_second_order_calls_twice_a_step(opened: Opened, tmp_path: Path) -> None:
    run = opened[1]["run"](request("Heun"))
    assert len(run["calls"]) == 2 * STEPS - 1
    trajectory = kept(opened[1], tmp_path / "kept.npz", sampler="Heun")["trajectory"]
    assert len(trajectory) == STEPS


def test_the_pipeline_is_left_as_it_was() -> None:
    class Part(torch.nn.Module):
        def forward(self, x: int) -> int:
            return x + 1

        def decode(self, x: int) -> int:
            return x

    part = Part()
    own = vars(part)["decode"] = lambda x: x + 2  # as torch.compile's
    pipe = types.SimpleNamespace(text_encoder=None, unet=part, vae=part, tokenizer=str.upper)
    clock = peer_handlers._Clock(events=False)
    with peer_handlers._timed_parts(pipe, clock):
        assert (pipe.unet(1), pipe.vae.decode(1), pipe.tokenizer("a")) == (2, 3, "A")
        assert pipe.tokenizer.__name__ == "upper"
    assert [stage for stage, _, _ in clock.spans] == ["unet", "vae_decoder", "tokenize"]
    assert vars(part)["decode"] is own
    assert "forward" not in vars(part)
    assert pipe.tokenizer == str.upper
    assert (part(1), len(clock.spans)) == (2, 3)


def test_the_sampler_is_what_passes_between_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two calls of 3 s from 10 to 13 and 15 to 18, and the last step's end at 20, in a run that goes on.
    moments = iter((1.0, 2.0, 10.0, 13.0, 15.0, 18.0, 20.0, 21.0, 25.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    clock = peer_handlers._Clock(events=False)
    for stage in ("tokenize", "unet", "unet"):
        assert clock.around(stage, max)(1, 2) == 2
    clock.last_step = clock.mark()
    clock.around("vae_decoder", max)(1, 2)
    assert clock.stages() == {"tokenize": 1.0, "unet": 6.0, "vae_decoder": 4.0, "sampler": 4.0}
    assert clock.calls() == [3.0, 3.0]


def test_marks_on_a_gpu_are_events_that_are_read_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = itertools.count()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(counter)

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = peer_handlers._Clock(events=True)
    clock.around("unet", max)(1, 2)
    clock.last_step = clock.mark()
    assert clock.calls() == [1.5]
    assert clock.stages() == {"unet": 1.5, "sampler": 1.5}


@pytest.mark.parametrize(("sampler", "schedule"), [("DPM++ 2M", "karras"), ("DDIM", None), ("Euler a", None)])
def test_a_peer_draws_what_latentrt_draws(
    shapes_checkpoint: Path, shapes_bundle: Path, tmp_path: Path, sampler: str, schedule: str | None
) -> None:
    from latentrt.runtime import Pipeline

    # diffusers' class clips where a config is silent, as this one of another class is; latentrt does not.
    assert diffusers.DDIMScheduler().config.clip_sample
    _, handlers = peer_handlers.open_subject(SUBJECT, model_of(shapes_checkpoint))
    found = kept(handlers, tmp_path / "kept.npz", sampler=sampler, schedule=schedule)
    pipe = Pipeline.load(shapes_bundle, precision="fp32")
    for i, prompt in enumerate(PROMPTS):
        settings: dict[str, Any] = {"steps": STEPS, "guidance": 5.0, "sampler": sampler, "schedule": schedule}
        ours = pipe(prompt, seed=SEED + i, width=64, height=48, **settings)
        assert relative_l2(found["trajectory"][-1, i : i + 1], ours.latents) < 1e-4
        assert psnr(found["images"][i], ours.images[0]) > 40


def relative_l2(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def psnr(found: Any, expected: Any) -> float:
    error = np.mean((found.astype(float) - expected.astype(float)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def test_an_option_that_the_scheduler_does_not_have_is_refused() -> None:
    own = diffusers.PNDMScheduler()
    with pytest.raises(ValueError, match=r"^PNDMScheduler of diffusers has no use_karras_sigmas$"):
        peer_handlers._scheduler(
            own, {"class": "PNDMScheduler", "options": {"use_karras_sigmas": True}, "defaults": {}}
        )


def test_defaults_are_for_configs_of_other_classes() -> None:
    defaults = {"clip_sample": False, "set_alpha_to_one": True}
    wanted = {"class": "DDIMScheduler", "options": {}, "defaults": defaults}
    other = peer_handlers._scheduler(diffusers.PNDMScheduler(set_alpha_to_one=False), wanted)
    # What the config says counts, and what is silent in it does not fall to the class.
    assert (other.config.clip_sample, other.config.set_alpha_to_one) == (False, False)
    assert peer_handlers._scheduler(diffusers.DDIMScheduler(), wanted).config.clip_sample


def test_the_safety_checker_is_left_out_and_that_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checked")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    answer, handlers = peer_handlers.open_subject(SUBJECT, model_of(folder))
    assert "without its safety checker" in answer["notes"]
    assert len(handlers["run"](request())["calls"]) == STEPS


def test_weights_in_half_precision_alone_are_found(opened: Opened, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "half")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        (folder / f"{name}.safetensors").rename(folder / f"{name}.fp16.safetensors")
    _, handlers = peer_handlers.open_subject(SUBJECT, model_of(folder))
    found, expected = (kept(each, tmp_path / "kept.npz") for each in (handlers, opened[1]))
    np.testing.assert_array_equal(found["images"], expected["images"])


def test_a_single_file_is_opened_with_the_configs_of_the_bundle(tmp_path: Path) -> None:
    configs = ldm_layout.configs("sd1")
    states = ldm_layout.family_states("sd1", configs)
    state = ldm_layout.single_file_state("sd1", states, configs)
    file = ldm_layout.write_file(tmp_path / "x.safetensors", state, None)
    # What a bundle holds beside graphs, the two halves of the VAE for one.
    for name, content in open_checkpoint(file).copied_files().items():
        (tmp_path / "x.bundle" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x.bundle" / name).write_bytes(content)
    model = model_of(file, bundle=str(tmp_path / "x.bundle"))
    with _pipelines() as made:
        _, handlers = peer_handlers.open_subject(SUBJECT, model)
    assert len(handlers["run"](request())["calls"]) == STEPS
    for name in ("unet", "vae"):
        found = getattr(made[0], name).state_dict()
        assert found.keys() == states[name].keys()
        assert all(torch.equal(found[key], value) for key, value in states[name].items())


@contextmanager
def _pipelines() -> Iterator[list[Any]]:
    """The pipelines that are made from single files within."""
    made: list[Any] = []
    make = diffusers.StableDiffusionPipeline.from_single_file

    def record(*args: Any, **options: Any) -> Any:
        made.append(make(*args, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", record)
        yield made


class _Ort:
    """What of optimum's pipeline is looked at before it draws."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def from_pretrained(self, folder: str, **options: Any) -> Any:
        self.folder, self.options = folder, options
        session = types.SimpleNamespace(
            get_providers=lambda: ["CPUExecutionProvider"], get_inputs=lambda: [types.SimpleNamespace(type=self.dtype)]
        )
        unet = types.SimpleNamespace(session=session)
        return types.SimpleNamespace(unet=unet, scheduler=None, set_progress_bar_config=lambda **_: None)


def open_optimum(
    monkeypatch: pytest.MonkeyPatch, dtype: str, model: Mapping[str, Any], **subject: Any
) -> tuple[dict[str, Any], _Ort]:
    pipeline_class = _Ort(dtype)
    module = types.SimpleNamespace(ORTStableDiffusionPipeline=pipeline_class)
    monkeypatch.setitem(sys.modules, "optimum", types.ModuleType("optimum"))
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", module)
    answer, _ = peer_handlers.open_subject({**SUBJECT, "system": "optimum", **subject}, model)
    return answer, pipeline_class


def test_optimum_opens_the_bundle_without_io_binding(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A checkpoint's index is a bundle's.
    model = model_of(Path(), bundle=str(tiny_checkpoint), threads=3)
    answer, pipeline = open_optimum(monkeypatch, "tensor(float)", model)
    assert pipeline.folder == str(tiny_checkpoint)
    assert pipeline.options["use_io_binding"] is False
    assert pipeline.options["session_options"].intra_op_num_threads == torch.get_num_threads() == 3
    assert (answer["backend"], answer["notes"]) == (
        "onnxruntime CPU",
        ["graphs of the latentrt bundle, without IO binding"],
    )


def test_optimums_own_folder_is_preferred_and_its_precision_checked(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(Path(), bundle="no bundle", optimum_model=str(tiny_checkpoint))
    answer, _ = open_optimum(monkeypatch, "tensor(float16)", model, precision="fp16")
    assert answer["notes"] == ["graphs of optimum-cli, without IO binding"]
    with pytest.raises(ValueError, match=r"expected a U-Net in fp32, got fp16"):
        open_optimum(monkeypatch, "tensor(float16)", model)


def test_onnxruntime_that_falls_back_to_the_cpu_is_refused(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_handlers, "_gpu_use", lambda: None)
    with pytest.raises(RuntimeError, match=r"expected ONNX Runtime to use the GPU, got CPUExecutionProvider"):
        open_optimum(monkeypatch, "tensor(float)", model_of(Path(), bundle=str(tiny_checkpoint)), backend="cuda")


def test_packages_that_are_not_installed_have_no_version() -> None:
    assert peer_handlers._versions(("numpy", "no-such-package")) == {"numpy": np.__version__}


@pytest.mark.parametrize(("on_gpu", "mode"), [(False, "default"), (True, "max-autotune")])
def test_what_is_compiled_and_how_is_said(monkeypatch: pytest.MonkeyPatch, on_gpu: bool, mode: str) -> None:
    asked: list[dict[str, Any]] = []

    def compile_(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    held = torch.ones(1, 3, 2, 2)

    class Part(torch.nn.Conv2d):
        def forward(self, *_: Any) -> Any:
            return (held,)

        decode = forward

    pipe = types.SimpleNamespace(unet=Part(3, 3, 3), vae=Part(3, 3, 3))
    note = peer_handlers._compile(pipe, torch, on_gpu=on_gpu)
    assert asked == [{"mode": mode, "dynamic": False}] * 2
    assert mode in note
    assert pipe.unet.weight.is_contiguous(memory_format=torch.channels_last)
    # What the next call may overwrite is not what is handed on.
    for found in (pipe.unet(held)[0], pipe.vae.decode(held)[0]):
        assert (found is held) is not on_gpu
        assert torch.equal(found, held)


@pytest.mark.parametrize(
    ("use", "peak"),
    [
        ((700, 2000), {"peak": 700, "peak_of": "process", "context": 100}),
        # In a container the driver does not know the process: what was taken meanwhile, by whomever.
        ((None, 2000), {"peak": 800, "peak_of": "gpu", "context": 200}),
    ],
)
def test_memory_on_a_gpu(monkeypatch: pytest.MonkeyPatch, use: tuple[int | None, int], peak: dict[str, Any]) -> None:
    monkeypatch.setattr(peer_handlers, "_gpu_use", lambda: use)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 500)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 600)
    parts = {"unet": torch.nn.Linear(10, 5, bias=False).half(), "tokenizer": object()}
    pipe = types.SimpleNamespace(components=parts)
    system = peer_handlers._System(pipe, None, {"backend": "cuda"}, events=True, taken=(None, 1200))
    expected = {"weights": 100, "activation": 400, **peak}
    assert peer_handlers._vram(system) == expected
    assert Vram(**expected).peak == peak["peak"]
    # Of ONNX Runtime only the whole is known.
    assert peer_handlers._vram(replace(system, events=False)).keys() == {"peak", "peak_of"}


def test_memory_without_nvml_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_handlers, "_gpu_use", lambda: None)
    system = peer_handlers._System(None, None, {"backend": "cuda"}, events=False, taken=None)
    assert "peak not known" in peer_handlers._vram(system)["reason"]
