"""The denoising loop: the U-Net's rows, guidance and ControlNets around it, a sampler on top."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .bound_inputs import freeze
from .conditioning import Rows
from .errors import BackendError
from .guidance import Guidance, compose, guidance_embedding, guide
from .parametrisation import Array
from .sampler_loop import Evaluation, Sampler, StepResult, drive
from .specs import Session

Floats = NDArray[np.float32]
Predict = Callable[[Evaluation], Array]


class Told(Protocol):
    """Says what the rows of a step's calls are told, as `conditioning.Conditioning` does."""

    def at(self, position: int, *, guided: bool) -> tuple[Rows, ...]:
        """The calls of a step, counted from 0."""
        ...


@dataclass(frozen=True, eq=False)
class ActiveControl:
    """A ControlNet of a run: its session, the pictures (n, 3, h, w) in [0, 1], and when and how strongly it acts."""

    session: Session
    pictures: Floats
    scale: float
    start: float
    end: float
    _rows: dict[bytes, Floats] = field(default_factory=dict, init=False, repr=False)

    def rows(self, sources: NDArray[np.intp]) -> Floats:
        """The picture of each row's image; for the same rows the same array, which sessions need not copy again."""
        key = sources.tobytes()
        if key not in self._rows:
            self._rows[key] = freeze(np.take(self.pictures, sources, axis=0))
        return self._rows[key]

    def scale_at(self, position: int, count: int) -> float:
        """Its scale at a step; 0 before its start and after its end, as diffusers counts them."""
        active = position / count >= self.start and (position + 1) / count <= self.end
        return self.scale if active else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoiser:
    """The U-Net as the function of an evaluation that samplers ask for.

    Attributes:
        unet: the U-Net.
        conditioning: what its rows are told.
        guidance: how its rows are combined.
        first: index of the run's first step, from which positions are counted.
        count: steps of the run.
        channels: what follows the latents in the U-Net's input, (n, c', h/8, w/8): mask and masked picture, or the
            picture to edit.
        image_guidance: of an editing model, whose third row sees neither prompt nor picture; None for others.
        controls: ControlNets, and
        unet_control: the U-Net that takes their residuals, for the steps at which one of them is active.
        time_cond_width: of a guidance-distilled U-Net, which is told the scale and runs unguided; 0 for others.
        precision: for messages.
    """

    unet: Session
    conditioning: Told
    guidance: Guidance
    first: int
    count: int
    channels: Floats | None = None
    image_guidance: float | None = None
    controls: Sequence[ActiveControl] = ()
    unet_control: Session | None = None
    time_cond_width: int = 0
    precision: str = "unknown"

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The networks that its steps run."""
        others = () if self.unet_control is None else (self.unet_control,)
        return (self.unet, *others, *(control.session for control in self.controls))

    def __call__(self, evaluation: Evaluation) -> Array:
        """The guided prediction (n, c, h/8, w/8).

        Raises:
            BackendError: the U-Net gave NaN or infinity, or the backend failed.
        """
        position = min(max(evaluation.step_index - self.first, 0), self.count - 1)
        calls, scale = self._told(position)
        if len(calls) == 1:
            return self._call(evaluation, calls[0], position, scale)
        result = np.empty(evaluation.sample.shape, np.float32)
        for rows in calls:
            result[rows.images] = self._call(evaluation, rows, position, scale)
        return result

    def encode_texts(self) -> None:
        """Have the texts of all steps encoded now, which the conditioning keeps: no step needs the text encoders then.

        Raises:
            BackendError: a text encoder failed.
        """
        for position in range(self.count):
            self._told(position)

    def _told(self, position: int) -> tuple[tuple[Rows, ...], float]:
        """What the rows of a step's calls are told, and the scale of its guidance."""
        scale = 1.0 if self.time_cond_width else self.guidance.at(position, self.count)
        return self.conditioning.at(position, guided=scale > 1), scale

    def _call(self, evaluation: Evaluation, rows: Rows, position: int, scale: float) -> Array:
        editing = self.image_guidance is not None and rows.negatives > 0
        if editing:
            rows = _with_third_row(rows)
        active = [control for control in self.controls if control.scale_at(position, self.count) != 0]
        unet = self.unet_control if self.unet_control is not None and active else self.unet
        sources = rows.sources
        sample = np.take(evaluation.sample, sources, axis=0)
        feeds: dict[str, Array | NDArray[Any]] = {
            "sample": sample,
            "timestep": _timesteps(unet, evaluation, len(sources)),
            "encoder_hidden_states": rows.hidden,
        }
        if rows.text_embeds is not None and rows.time_ids is not None:
            feeds |= {"text_embeds": rows.text_embeds, "time_ids": rows.time_ids}
        if active:
            feeds |= self._residuals(active, feeds, sources, position)
        if self.time_cond_width:
            row = guidance_embedding(self.guidance.scale, self.time_cond_width)
            feeds["timestep_cond"] = np.broadcast_to(row, (len(sources), len(row)))
        if self.channels is not None:
            extra = np.take(self.channels, sources, axis=0)
            if editing:
                extra[: len(rows.images)] = 0
            feeds["sample"] = np.concatenate([sample, extra], axis=1)
        output = unet(feeds)["out_sample"].astype(np.float32, copy=False)
        self._check(output, evaluation, unet)
        return self._combine(output, rows, scale)

    def _combine(self, output: Array, rows: Rows, scale: float) -> Array:
        images = len(rows.images)
        if self.image_guidance is not None and rows.negatives == 2 * images:
            without, picture, positive = output[:images], output[images : 2 * images], output[2 * images :]
            edited = guide(picture, positive, rows.owner, rows.weights, scale) - picture
            shown: Array = without + edited + np.float32(self.image_guidance) * (picture - without)
            return shown
        if rows.negatives == 0:
            return compose(output, rows.owner, rows.weights, images)
        negative, positive = output[:images], output[images:]
        return guide(negative, positive, rows.owner, rows.weights, scale, rescale=self.guidance.rescale)

    def _residuals(
        self,
        controls: Sequence[ActiveControl],
        feeds: Mapping[str, NDArray[Any]],
        sources: NDArray[np.intp],
        position: int,
    ) -> dict[str, NDArray[Any]]:
        """What the ControlNets add to the U-Net's skip connections, summed."""
        total: dict[str, NDArray[Any]] = {}
        for control in controls:
            scales = np.full(len(sources), control.scale_at(position, self.count), np.float32)
            given = {
                **feeds,
                "controlnet_cond": control.rows(sources),
                "conditioning_scale": scales,
            }
            wanted = {tensor.name for tensor in control.session.spec.inputs}
            outputs = control.session({name: value for name, value in given.items() if name in wanted})
            for name, value in outputs.items():
                target = name.replace("_res_sample", "_additional_residual")
                total[target] = total[target] + value if target in total else value
        return total

    def _check(self, output: Array, evaluation: Evaluation, session: Session) -> None:
        if not np.isfinite(output).all():
            raise BackendError(
                f"{session.spec.name}: expected finite values at step {evaluation.step_index} in {self.precision}, "
                f"got NaN or infinity from {session.backend}. "
                "An fp16 graph may overflow here: use precision fp32, or export again to see where."
            )


def _with_third_row(rows: Rows) -> Rows:
    """Negative prompts twice: once without the picture to edit, once with it."""

    def twice(array: Any) -> Any:
        return None if array is None else np.concatenate([array[: rows.negatives], array])

    return Rows(
        images=rows.images,
        owner=rows.owner,
        weights=rows.weights,
        negatives=2 * rows.negatives,
        hidden=twice(rows.hidden),
        text_embeds=twice(rows.text_embeds),
        time_ids=twice(rows.time_ids),
    )


def _timesteps(session: Session, evaluation: Evaluation, rows: int) -> Floats:
    """The timestep for every row; once where the graph wants it so, as optimum exports it."""
    tensor = session.spec.input("timestep")
    told = np.float32(evaluation.timestep or 0.0)
    if tensor is not None and tensor.shape in ((), (1,)):
        return np.full((1,) * len(tensor.shape), told)
    return np.full((rows,), told)


def denoise(sampler: Sampler, predict: Predict) -> Generator[StepResult, None, Array]:
    """Run a sampler to its end: yields each step's result, returns the final latents.

    Progress, preview, cancellation and calibration capture are consumers of this generator; closing it cancels.
    """
    return (yield from drive(sampler, predict))
