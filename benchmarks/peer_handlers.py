"""What `worker_loop` runs for a peer: diffusers as it is, compiled by PyTorch, or optimum's pipeline of ONNX Runtime.

Run by its path, under an interpreter that may not have latentrt, so it imports nothing of it, and libraries only when a
subject is opened. Every system is a pipeline of diffusers' kind with the same parts; a run is timed by putting a clock
around the calls of these parts.

With PyTorch on a GPU calls return before their work is done, and waiting at each border would make the run slower
than it is. The clock's marks are then events in CUDA's stream, read after the run: stages, and calls of the U-Net, are
what passes on the GPU between their borders. End to end is the host's clock in any case, the GPU idle at both ends.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

Handler = Callable[[Mapping[str, Any]], dict[str, Any]]
_TYPES = {"fp32": "float32", "fp16": "float16"}
_TORCH_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")
_OPTIMUM_PACKAGES = ("optimum", "optimum-onnx", "onnxruntime", "onnxruntime-gpu", *_TORCH_PACKAGES)
# Attribute of the pipeline, method of the part, stage.
_PARTS = (
    ("text_encoder", "forward", "text_encoder"),
    ("text_encoder_2", "forward", "text_encoder"),
    ("unet", "forward", "unet"),
    ("vae", "decode", "vae_decoder"),
)
_TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class _System:
    """A pipeline that is open.

    Attributes:
        scheduler: the checkpoint's own.
        subject: as it was asked for.
        events: whether work goes on after the calls of PyTorch that started it.
        taken: of `_gpu_use`, before anything was loaded.
    """

    pipe: Any
    scheduler: Any
    subject: Mapping[str, Any]
    events: bool
    taken: tuple[int | None, int] | None


@dataclass
class _Clock:
    """When the parts of a run began and ended, each mark a moment of the host or an event of the GPU."""

    events: bool
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)
    last_step: Any = None

    def mark(self) -> Any:
        """Now."""
        if not self.events:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls are spans of the stage."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.mark()
            result = function(*args, **kwargs)
            self.spans.append((stage, start, self.mark()))
            return result

        return timed

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; events have to be over."""
        return float(start.elapsed_time(end)) / 1000 if self.events else float(end - start)

    def calls(self) -> list[float]:
        """Seconds of each call of the U-Net."""
        return [self.seconds(start, end) for stage, start, end in self.spans if stage == "unet"]

    def stages(self) -> dict[str, float]:
        """Seconds of each stage, the sampler's among them: the steps but for the U-Net's calls."""
        sums: dict[str, float] = {}
        for stage, start, end in self.spans:
            sums[stage] = sums.get(stage, 0.0) + self.seconds(start, end)
        first = next(start for stage, start, _ in self.spans if stage == "unet")
        return {**sums, "sampler": self.seconds(first, self.last_step) - sums["unet"]}


class _TimedTokenizer:
    """A tokenizer whose calls are timed; in all else the tokenizer."""

    def __init__(self, tokenizer: Any, clock: _Clock) -> None:
        self._tokenizer = tokenizer
        self._call = clock.around("tokenize", tokenizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def open_subject(subject: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Handler]]:
    """Open a peer: the answer to `open`, and the handlers of `run` and `memory`.

    Raises:
        ValueError: optimum's graphs are of another precision.
        RuntimeError: ONNX Runtime does not use the GPU.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    on_gpu, in_torch = subject["backend"] == "cuda", subject["system"] != "optimum"
    began = time.perf_counter()
    pipeline_class = _import(subject, model)
    imported = time.perf_counter()
    taken = _gpu_use() if on_gpu else None
    pipe, notes = (_open_torch if in_torch else _open_optimum)(pipeline_class, subject, model)
    pipe.set_progress_bar_config(disable=True)
    opened = {
        "imports": imported - began,
        "load": time.perf_counter() - imported,
        "backend": f"{'PyTorch' if in_torch else 'onnxruntime'} {'CUDA' if on_gpu else 'CPU'}",
        "on_gpu": on_gpu,
        "precisions": {"all": subject["precision"]},
        "notes": notes,
        "packages": _versions(_TORCH_PACKAGES if in_torch else _OPTIMUM_PACKAGES),
    }
    system = _System(pipe, pipe.scheduler, subject, events=on_gpu and in_torch, taken=taken)
    return opened, {"run": lambda request: _run(system, request), "memory": lambda _: {"vram": _vram(system)}}


def _import(subject: Mapping[str, Any], model: Mapping[str, Any]) -> Any:
    """The pipeline's class, imported with all that it needs."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    name = _index_of(subject, model)["_class_name"].removeprefix("ORT")
    if subject["system"] == "optimum":
        return getattr(importlib.import_module("optimum.onnxruntime"), f"ORT{name}")
    return getattr(diffusers, name)


def _index_of(subject: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Which parts the pipeline has, and its class. Of a single file the bundle that was made of it knows."""
    folder = Path(model["optimum_model"] or model["bundle"] if subject["system"] == "optimum" else model["checkpoint"])
    index = (folder if folder.is_dir() else Path(model["bundle"])) / "model_index.json"
    found: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    return found


def _open_torch(pipeline_class: Any, subject: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[Any, list[str]]:
    import torch

    if model["threads"]:
        torch.set_num_threads(model["threads"])
    notes = [f"PyTorch with {torch.get_num_threads()} threads"] if subject["backend"] == "cpu" else []
    checkpoint = Path(model["checkpoint"])
    options: dict[str, Any] = {"torch_dtype": getattr(torch, _TYPES[subject["precision"]]), "local_files_only": True}
    if (_index_of(subject, model).get("safety_checker") or [None])[0]:
        options |= {"safety_checker": None, "requires_safety_checker": False}
        notes.append("without its safety checker")
    if checkpoint.is_dir():
        half = "diffusion_pytorch_model.fp16.safetensors"
        if (checkpoint / "unet" / half).exists() and not (checkpoint / "unet" / half.replace(".fp16", "")).exists():
            options["variant"] = "fp16"
        pipe = pipeline_class.from_pretrained(checkpoint, **options)
    else:
        with _configs_of(Path(model["bundle"])) as configs:
            pipe = pipeline_class.from_single_file(checkpoint, config=str(configs), **options)
    pipe = pipe.to(subject["backend"])
    if subject["system"] == "torch-compile":
        notes.append(_compile(pipe, torch, on_gpu=subject["backend"] == "cuda"))
    return pipe, notes


@contextmanager
def _configs_of(bundle: Path) -> Iterator[Path]:
    """A bundle's configs and tokenizers in the layout of a checkpoint. diffusers would ask the network for them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for file in (*bundle.glob("*.json"), *bundle.glob("*/*.json"), *bundle.glob("*/*.txt")):
            name = str(file.relative_to(bundle)).replace("vae_decoder", "vae")
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
        yield folder


def _compile(pipe: Any, torch: Any, *, on_gpu: bool) -> str:
    """Have the U-Net and the decoder compiled at their first calls; says how."""
    # Of "max-autotune" CUDA graphs are a part, whose outputs the next call overwrites; samplers keep them.
    mode = "max-autotune" if on_gpu else "default"
    for part, method in ((pipe.unet, "forward"), (pipe.vae, "decode")):
        part.to(memory_format=torch.channels_last)
        compiled = torch.compile(getattr(part, method), mode=mode, dynamic=False)
        vars(part)[method] = _copying(compiled) if on_gpu else compiled
    return f"U-Net and VAE decoder by torch.compile, mode {mode}, dynamic=False, channels_last"


def _copying(compiled: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return tuple(output.clone() for output in compiled(*args, **kwargs))

    return call


def _open_optimum(pipeline_class: Any, subject: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[Any, list[str]]:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    if model["threads"]:
        torch.set_num_threads(model["threads"])
        options.intra_op_num_threads = model["threads"]
    provider = "CUDAExecutionProvider" if subject["backend"] == "cuda" else "CPUExecutionProvider"
    folder = model["optimum_model"] or model["bundle"]
    # With IO binding optimum has the U-Net write over its own input, which samplers read after the call.
    pipe = pipeline_class.from_pretrained(folder, provider=provider, session_options=options, use_io_binding=False)
    session = pipe.unet.session
    if provider not in session.get_providers():
        raise RuntimeError(f"expected ONNX Runtime to use the GPU, got {', '.join(session.get_providers())}.")
    holds = {"tensor(float)": "fp32", "tensor(float16)": "fp16"}.get(session.get_inputs()[0].type)
    if holds != subject["precision"]:
        raise ValueError(
            f"{folder}: expected a U-Net in {subject['precision']}, got {holds}. Export it with optimum-cli."
        )
    graphs = "graphs of optimum-cli" if model["optimum_model"] else "graphs of the latentrt bundle"
    return pipe, [f"{graphs}, without IO binding"]


def _versions(packages: Sequence[str]) -> dict[str, str]:
    installed = {name: next(iter(metadata.Distribution.discover(name=name)), None) for name in packages}
    return {name: found.version for name, found in installed.items() if found is not None}


def _run(system: _System, request: Mapping[str, Any]) -> dict[str, Any]:
    """Draw a picture for each prompt, picture i from seed + i."""
    import torch

    settings, subject, pipe = request["settings"], system.subject, system.pipe
    pipe.scheduler = _scheduler(system.scheduler, settings["scheduler"])
    prompts: Sequence[str] = request["prompts"]
    clock, trajectory = _Clock(system.events), list[Any]()

    def step_ended(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        clock.last_step = clock.mark()
        # Solvers of second order call the U-Net again before a step is complete, but not in the last.
        complete = (index + 1) % pipe.scheduler.order == 0 or index + 1 == pipe.num_timesteps
        if request["keep"] and complete:
            trajectory.append(tensors["latents"].float().cpu().numpy())
        return tensors

    call = {
        "prompt": list(prompts),
        "width": subject["width"],
        "height": subject["height"],
        "num_inference_steps": settings["steps"],
        "guidance_scale": settings["guidance"],
        # PyTorch's own noise of the CPU wherever the pipeline runs: the same as latentrt's.
        "generator": [torch.Generator("cpu").manual_seed(request["seed"] + i) for i in range(len(prompts))],
    }
    encode = clock.around("encode", _png) if request["timed"] else _png
    if request["timed"] or request["keep"]:
        call["callback_on_step_end"] = step_ended
    with _timed_parts(pipe, clock) if request["timed"] else ExitStack():
        if system.events:
            torch.cuda.synchronize()
        began = time.perf_counter()
        pictures = pipe(**call).images
        for picture in pictures:
            encode(picture)
        if system.events:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    if request["keep"]:
        import numpy as np

        np.savez(request["keep"], images=np.stack([np.asarray(p) for p in pictures]), trajectory=np.stack(trajectory))
    if not request["timed"]:
        return {"seconds": seconds}
    calls = clock.calls()
    gpu_calls = calls if system.events else None
    return {"seconds": seconds, "stages": clock.stages(), "calls": calls, "gpu_calls": gpu_calls}


def _png(picture: Any) -> int:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.tell()


def _scheduler(own: Any, wanted: Mapping[str, Any]) -> Any:
    """A fresh scheduler with the checkpoint's noise levels.

    Args:
        own: the checkpoint's.
        wanted: `class` of diffusers, None for the checkpoint's; `options`, and `defaults` for what a config of another
            class does not hold.
    """
    import diffusers

    scheduler_class = getattr(diffusers, wanted["class"]) if wanted["class"] else type(own)
    options = dict(wanted["options"])
    if scheduler_class is not type(own):
        options = {**{n: v for n, v in wanted["defaults"].items() if n not in own.config}, **options}
    if unknown := options.keys() - inspect.signature(scheduler_class).parameters:
        raise ValueError(f"{scheduler_class.__name__} of diffusers has no {', '.join(sorted(unknown))}")
    return scheduler_class.from_config(own.config, **options)


@contextmanager
def _timed_parts(pipe: Any, clock: _Clock) -> Iterator[None]:
    """The pipeline's parts with the clock around their calls, as they were afterwards."""
    with ExitStack() as stack:
        for name, method, stage in _PARTS:
            if part := getattr(pipe, name, None):
                stack.enter_context(_replaced(part, method, clock.around(stage, getattr(part, method))))
        for name in _TOKENIZERS:
            if tokenizer := getattr(pipe, name, None):
                stack.enter_context(_replaced(pipe, name, _TimedTokenizer(tokenizer, clock)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An object's own attribute replaced. Not by setattr, with which pipelines keep a record of their parts."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    vars(owner)[name] = value
    try:
        yield
    finally:
        del vars(owner)[name]
        vars(owner).update(before)


def _gpu_use() -> tuple[int | None, int] | None:
    """Bytes in use on the GPU by this process, where the driver lists it, and by all; None where NVML does not say."""
    import torch

    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        own = [p.usedGpuMemory for p in processes if p.pid == os.getpid() and p.usedGpuMemory is not None]
        return (sum(own) if own else None), int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
    except Exception:  # the module is not installed, or its errors, which are its own
        return None


def _vram(system: _System) -> dict[str, Any]:
    """The answer to `memory`, in the words of `results.Vram`.

    Neither PyTorch nor ONNX Runtime gives memory back that its allocator took, so that what is in use after runs is
    the most that was.
    """
    if system.subject["backend"] != "cuda":
        return {"reason": "runs on the CPU"}
    import torch

    found: dict[str, Any] = {}
    use = _gpu_use()
    if use is None or system.taken is None:
        found["reason"] = "peak not known: nvidia-ml-py is not installed for the peer, or NVML does not answer"
    elif use[0] is not None:
        found |= {"peak": use[0], "peak_of": "process"}
    else:
        found |= {"peak": max(use[1] - system.taken[1], 0), "peak_of": "gpu"}
    if system.events:
        parts = [part for part in system.pipe.components.values() if isinstance(part, torch.nn.Module)]
        found["weights"] = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
        found["activation"] = max(torch.cuda.max_memory_allocated() - found["weights"], 0)
        if "peak" in found:
            found["context"] = max(found["peak"] - torch.cuda.memory_reserved(), 0)
    return found
