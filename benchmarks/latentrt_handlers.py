"""latentrt in a worker's process: what `worker_loop` asks of it.

A run is what `latentrt generate` does for new prompts, from the texts to PNG files with their parameters, in memory.
The pipeline keeps the embeddings of prompts that it has seen; they are forgotten before every run, so that each pays
for its text encoder, as runs of others do. The safety checker is off, here and there.

Timed runs go through the same sessions as untimed ones: `TimedComponents` calls them on a clock. What no stage has is
the run's preparation (noise, plan of the steps), the last touch to pictures, and their records with the digests.

Engines of TensorRT are timed on the GPU, too. ONNX Runtime's CUDA provider shows no stream to record events in; its
calls wait for their results, so that the host's clock has them.

Nothing is imported that a run does not need: the memory of this process is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.runtime.drawing import StepInfo
from latentrt.runtime.image import encode_picture
from latentrt.runtime.pipeline import Pipeline, Result
from latentrt.runtime.session import import_onnxruntime
from latentrt.runtime.trt_flavour import FLAVOURS, installed_version
from latentrt.runtime.vram import VramMeter

from .stage_clock import StageClock, seconds_per_entry
from .timed_components import TimedComponents
from .vram_split import split_vram

Request = Mapping[str, Any]
Answer = dict[str, Any]
_PACKAGES = (
    "latentrt",
    "numpy",
    "pillow",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
    "nvidia-ml-py",
)
# Seconds between two looks at the GPU's memory: what engines take stays, and a look takes the interpreter's time.
_LOOKS = 0.1


def open_subject(subject: Request, model: Request) -> tuple[Answer, Mapping[str, Callable[[Request], Answer]]]:
    """Load a bundle for `cases.Subject` and `cases.Model`, as dicts.

    Raises:
        UsageError, ArtifactError, ConfigError, BackendError: as `Pipeline.load`.
    """
    backend = subject["backend"]
    meter = VramMeter(interval=_LOOKS)
    if backend != "onnxruntime":
        ExitStack().enter_context(meter)  # until the process ends
    began = time.perf_counter()
    if backend not in FLAVOURS:
        import_onnxruntime()
    imported = time.perf_counter()
    plain = Pipeline.load(model["bundle"], precision=subject["precision"], backend=backend, **model["options"])
    loaded = time.perf_counter()
    clock = StageClock()
    timed = Pipeline.over(TimedComponents(plain.model.components, clock))
    size = {"width": subject["width"], "height": subject["height"]}

    def run(request: Request) -> Answer:
        if not request["timed"]:
            return _run(plain, request, size) | _state(plain)
        answer = _timed_run(timed, request, size, clock)
        return answer | {"clock": clock.entries * seconds_per_entry()} | _state(plain)

    def memory(_: Request) -> Answer:
        return {"vram": split_vram(plain.model.components, meter)}

    opened = {
        "imports": imported - began,
        "load": loaded - imported,
        "packages": {name: version for name in _PACKAGES if (version := installed_version(name)) is not None},
    }
    return opened | _state(plain), {"run": run, "memory": memory}


def _state(pipeline: Pipeline) -> Answer:
    """What runs the networks and what is not as it was to be, as far as that is known: engines may not hold a size."""
    return {
        "backend": pipeline.backend,
        "on_gpu": pipeline.backend != "onnxruntime CPU",
        "precisions": pipeline.precisions,
        "notes": list(pipeline.notes),
    }


def _timed_run(pipeline: Pipeline, request: Request, size: Mapping[str, int], clock: StageClock) -> Answer:
    host = pipeline.model.components.host
    clock.restart()
    if host is not None:
        host.times.calls.clear()
        host.times.on = True
    try:
        answer = _run(pipeline, request, size, clock)
    finally:
        if host is not None:
            host.times.on = False
    calls = clock.calls("unet")
    on_gpu = [seconds for component, seconds in host.times.calls if component == "unet"] if host is not None else []
    known = bool(calls) and len(on_gpu) == len(calls)
    return {**answer, "stages": clock.stages(), "calls": calls, "gpu_calls": on_gpu if known else None}


def _run(pipeline: Pipeline, request: Request, size: Mapping[str, int], clock: StageClock | None = None) -> Answer:
    settings, keep = request["settings"], request["keep"]
    trajectory: list[NDArray[np.float32]] = []

    def on_step(step: StepInfo) -> None:
        if clock is not None:
            clock.step_done()
        if keep is not None:
            trajectory.append(step.latents.astype(np.float32))

    pipeline.model.prompt_encoder.cache.clear()
    began = time.perf_counter()
    result = pipeline(
        request["prompts"],
        seed=request["seed"],
        sampler=settings["sampler"],
        schedule=settings["schedule"],
        steps=settings["steps"],
        guidance=settings["guidance"],
        guidance_interval=tuple(settings["guidance_interval"]),
        safety_checker=False,
        on_step=None if clock is None and keep is None else on_step,
        **size,
    )
    if clock is None:
        _encode(result)
    else:
        clock.time("encode", lambda: _encode(result))
    seconds = time.perf_counter() - began
    if keep is not None:
        np.savez(keep, images=result.images, trajectory=np.stack(trajectory))
    return {"seconds": seconds}


def _encode(result: Result) -> list[bytes]:
    """PNG files of a result's pictures, as `latentrt generate` writes them."""
    return [
        encode_picture(picture, parameters=parameters, record=record)
        for picture, parameters, record in zip(result.images, result.parameters, result.records, strict=True)
    ]
