"""Prompts to pictures: `Pipeline.load(path)(prompt, …)`, a chain of encode_prompt, denoise and decode_latents."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .components import Components
from .decoding import decode_pictures
from .drawing import Pass, StepInfo, prepare, run_pass
from .errors import DeadlineError
from .hires import check_hires, enlarge, larger_size, second_request
from .image import Pictures
from .latents import check_pictures
from .lora_store import Wanted
from .model_facts import read_facts, read_schedules
from .onnx_cuda import CudaOptions
from .opened_model import Model
from .picture_text import infotext, picture_records
from .request import Request, Text, request_of
from .run_start import picture_seeds, request_noise
from .safety_checker import SafetyChecker, open_safety_checker
from .textual_inversion import TextualInversion, load_textual_inversion

if TYPE_CHECKING:
    from .engine_host import EngineHost

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Result:
    """What a call drew.

    Attributes:
        images: (n, h, w, 3) uint8; the pictures of the first prompt come first. Empty if not decoded.
        latents: final latents (n, c, h/8, w/8) float32, in the U-Net's scale.
        seeds: of each picture.
        parameters: of each picture, in the form that web UIs write into files.
        records: of each picture, what `latentrt replay` makes it again from.
        seconds: by stage: prepare (with the text encoders), denoise, decode.
        nsfw_content_detected: of each picture, whether the safety checker has made it black; None if none has looked.
    """

    images: Pictures
    latents: Floats
    seeds: tuple[int, ...]
    parameters: tuple[str, ...]
    records: tuple[dict[str, Any], ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    nsfw_content_detected: tuple[bool, ...] | None = None


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A bundle ready to draw. Make one with `Pipeline.load`; it can be used from many threads at once."""

    name: str
    model: Model

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        precision: str | None = None,
        backend: str = "auto",
        verify: bool = True,
        textual_inversions: Sequence[str | Path | TextualInversion] = (),
        residency: str = "all",
        cuda: CudaOptions | None = None,
        host: EngineHost | None = None,
        loras: Wanted = (),
    ) -> Pipeline:
        """Open a bundle, or a folder that `optimum-cli export onnx` wrote.

        Args:
            precision: fp32, fp16…; default that of engines which can be used, else the first that every component has.
            backend: auto, onnxruntime, cuda, tensorrt or tensorrt_rtx.
            verify: compare the files' SHA-256 with the manifest before they are loaded; sizes are always compared.
            textual_inversions: .safetensors files, each a word for prompts (its file's name), or loaded ones.
            residency: `all` keeps every network in memory, `swap` one stage's at a time, `stream` likewise and the
                U-Net's weights in parts (TensorRT); `auto` swaps where a GPU's memory is too small for all.
            cuda: how ONNX Runtime's CUDA provider is used, where it is.
            host: what its engines share; `EngineHost(lanes=4)` lets four threads run them at the same time.
            loras: of the bundle (`latentrt lora add`), by name, with scales or each with its own.

        Raises:
            ArtifactError: the bundle or a file of it is missing, damaged or changed.
            UsageError: the bundle lacks that precision or LoRA, no such backend or policy, or not together.
            ConfigError: a config holds what is not supported.
            BackendError: the backend cannot be used here.
        """
        components = Components.open(
            path, precision, backend=backend, verify=verify, residency=residency, cuda=cuda, host=host, loras=loras
        )
        inversions = [
            item if isinstance(item, TextualInversion) else load_textual_inversion(item) for item in textual_inversions
        ]
        pipeline = cls.over(components, inversions)
        for component in ("unet", components.picture_decoder):
            components[component]
        return pipeline

    @classmethod
    def over(cls, components: Components, inversions: Sequence[TextualInversion] = ()) -> Pipeline:
        """A pipeline of networks that are there already, or are opened when they are needed.

        Args:
            components: whatever a run asks for is asked of them.
            inversions: words for prompts.

        Raises:
            ArtifactError, UsageError, ConfigError, BackendError: as `load`.
        """
        bundle = components.bundle
        schedules = read_schedules(bundle)
        model = Model(
            components=components,
            prompt_encoder=components.prompt_encoder(inversions),
            facts=read_facts(bundle),
            schedules=schedules,
            default_sampler=str(schedules.own.class_name),
            inversions=tuple(inversions),
        )
        return cls(name=bundle.path.name if bundle.manifest is None else bundle.manifest.name, model=model)

    def with_loras(self, loras: Wanted) -> Pipeline:
        """The pipeline with other LoRAs in the place of its own; with none, as the bundle has its networks.

        Its networks go over: draw with the result from now on, and not with this one. Those that do not change stay
        open; the others are opened again with ONNX Runtime, and refitted where they run from engines built for it
        (`latentrt build --refit lora`). Runs under way in other threads are waited for, and those that begin meanwhile
        wait.

        Args:
            loras: of the bundle, by name, with scales or each with its own.

        Raises:
            UsageError: the bundle holds none of that name, a scale is not finite, an engine takes no new weights, the
                U-Net is quantized and was calibrated with others, or this thread has a run under way.
            ArtifactError: a LoRA is damaged, or was added for another model.
            BackendError: the backend failed.
        """
        model = self.model
        with model.components.gate.alone():
            changed = model.components.set_loras(loras)
            if changed <= {"unet"}:
                return self
            return replace(self, model=replace(model, prompt_encoder=model.components.prompt_encoder(model.inversions)))

    @property
    def precision(self) -> str:
        """Of the run; `precisions` says which of the networks differ."""
        return self.model.components.precision

    @property
    def precisions(self) -> dict[str, str]:
        """Of each network that was opened: mixed in a run in fp16, where it would overflow."""
        return self.model.components.precisions()

    @property
    def backend(self) -> str:
        """Which backend runs the U-Net, for people."""
        return self.model.components["unet"].backend

    @property
    def residency(self) -> str:
        """How networks share the memory: `all`, `swap` or `stream`."""
        return self.model.components.residency

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not as it was to be, and why, for people: a GPU that is not used, a network that is not recorded."""
        return self.model.components.notes()

    def close(self) -> None:
        """Give back what its networks hold, when the runs under way are done. It cannot draw afterwards."""
        self.model.components.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(
        self,
        prompt: Text | Sequence[Text] | Request,
        *,
        on_step: Callable[[StepInfo], None] | None = None,
        deadline: float | None = None,
        **settings: Any,
    ) -> Result:
        """Draw pictures.

        Args:
            prompt: one or several, or a whole `Request`.
            on_step: called after each step; raising from it cancels the run.
            deadline: seconds after which the run is given up, between two steps.
            settings: the attributes of `Request`, such as `negative_prompt`, `steps`, `guidance`, `seed`, `image`.

        Raises:
            UsageError: a setting is unknown, out of its range, or does not fit the bundle.
            BackendError: a network failed, gave NaN or infinity, or a picture came out black.
            DeadlineError: the deadline has passed.
        """
        run = self.stream(prompt, deadline=deadline, **settings)
        while True:
            try:
                step = next(run)
            except StopIteration as done:
                result: Result = done.value
                return result
            if on_step is not None:
                on_step(step)

    def warm_up(
        self, *, width: int | None = None, height: int | None = None, batch: int = 1, guidance: float | None = None
    ) -> None:
        """Have all ready for pictures of a size: networks loaded, kernels compiled, CUDA graphs captured.

        Draws one step and drops the picture. Guided and unguided runs are different calls of the U-Net; so are prompts
        of more than 75 tokens, which are not warmed up.

        Raises:
            UsageError: no such size, or no engine holds it.
            BackendError: as a call.
        """
        self(
            "",
            width=width,
            height=height,
            batch=batch,
            guidance=guidance,
            steps=1,
            sampler="euler",
            safety_checker=False,
        )

    def stream(
        self, prompt: Text | Sequence[Text] | Request, *, deadline: float | None = None, **settings: Any
    ) -> Generator[StepInfo, None, Result]:
        """Draw pictures a step at a time: yields every finished step, returns the `Result`.

        To cancel, stop iterating or close the generator: nothing runs on. Arguments and errors are those of a call;
        the request is checked when the first step is asked for.
        """
        request = request_of(prompt, settings)
        components = self.model.components
        with components.gate.run():
            components.check_encoder(self.model.prompt_encoder)
            return (yield from self._steps(request, deadline))

    def _steps(self, request: Request, deadline: float | None) -> Generator[StepInfo, None, Result]:
        model, began = self.model, time.perf_counter()
        if request.guidance is None:
            request = request.replace(guidance=model.facts.default_guidance)

        def watched(steps: Generator[StepInfo, None, Floats]) -> Generator[StepInfo, None, Floats]:
            left = True
            while True:
                if deadline is not None and left and not time.perf_counter() - began <= deadline:
                    steps.close()
                    raise DeadlineError(
                        f"deadline: expected to be done within {deadline:g} s, got steps left after "
                        f"{time.perf_counter() - began:.1f} s. Take fewer steps or a smaller picture, or allow more."
                    )
                try:
                    step = next(steps)
                except StopIteration as done:
                    latents: Floats = done.value
                    return latents
                left = step.index + 1 < step.total
                yield step

        if request.hires is not None:
            check_hires(request, request.hires, model.facts)
        checker = open_safety_checker(model.components, request.safety_checker) if request.decode else None
        first = prepare(model, request, request_noise(model, request))
        prepared = time.perf_counter()
        latents = yield from watched(run_pass(model, first))
        size = first.size
        if request.hires is not None:
            size = larger_size(size, request.hires, model.facts.vae_factor)
            second = self._second_pass(request, latents, first, size)
            latents = yield from watched(run_pass(model, second, second_pass=True))
        denoised = time.perf_counter()
        images, flags = self._decode(request, latents, size, checker)
        seconds = {
            "prepare": prepared - began,
            "denoise": denoised - prepared,
            "decode": time.perf_counter() - denoised,
        }
        return self._result(request, images, flags, latents, first, seconds)

    def _second_pass(self, request: Request, latents: Floats, first: Pass, size: tuple[int, int]) -> Pass:
        assert request.hires is not None
        clean = enlarge(self.model, request, latents, request.hires, size)
        again = second_request(request, request.hires)
        noise = request_noise(self.model, again)
        steps = len(first.plan.steps)
        return prepare(self.model, again, noise, clean=clean, size=size, first_pass_steps=steps)

    def _decode(
        self, request: Request, latents: Floats, size: tuple[int, int], checker: SafetyChecker | None
    ) -> tuple[Pictures, tuple[bool, ...] | None]:
        """The pictures, and what the safety checker found in them."""
        if not request.decode:
            return np.zeros((0, *size, 3), np.uint8), None
        images = decode_pictures(self.model, request, latents)
        check_pictures(images)
        return (images, None) if checker is None else checker(images)

    def _result(
        self,
        request: Request,
        images: Pictures,
        flags: tuple[bool, ...] | None,
        latents: Floats,
        first: Pass,
        seconds: dict[str, float],
    ) -> Result:
        loras = self.model.components.loras
        return Result(
            images=images,
            latents=latents,
            seeds=tuple(picture_seeds(request)[0]),
            parameters=tuple(
                infotext(request, first.plan, index, size=first.size, model=self.name, loras=loras)
                for index in range(len(latents))
            ),
            records=picture_records(self.model, request, images, self.name),
            seconds=seconds,
            nsfw_content_detected=flags,
        )


def base_and_refiner(
    base: Pipeline,
    refiner: Pipeline,
    prompt: Text | Sequence[Text] | Request,
    *,
    switch: float = 0.8,
    on_step: Callable[[StepInfo], None] | None = None,
    **settings: Any,
) -> Result:
    """Draw with SDXL's two experts: the base down to a share of the noise levels, the refiner from there on.

    As diffusers with `denoising_end=switch` for the base and `denoising_start=switch` for the refiner, which takes the
    base's noisy latents as they are. Both run the same sampler over the same steps.

    Raises:
        UsageError: as in a call, or the two bundles' latents differ.
    """
    request = request_of(prompt, settings)
    # The scores are the refiner's alone.
    plain = request.replace(
        aesthetic_score=Request.aesthetic_score, negative_aesthetic_score=Request.negative_aesthetic_score
    )
    noisy = base(plain.replace(denoising_end=switch, decode=False), on_step=on_step)
    rest = request.replace(
        latents=noisy.latents,
        denoising_start=switch,
        denoising_end=None,
        sampler=request.sampler or base.model.default_sampler,
    )
    return refiner(rest, on_step=on_step)
