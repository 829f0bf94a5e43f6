"""Shape profiles: from `--batch 1,2,4 --size 512,768x512` to the smallest, usual and largest shape of every input.

A number is a bucket: a profile of its own, whose kernels are picked for that size alone. A range is one profile that
serves all sizes in between, tuned for its usual one; it takes the memory of its largest.

The user speaks of images. How many rows a network runs for them is what the runtime does:

    U-Net, ControlNet    an image is one row, and two with guidance (three where it edits a picture; always one where
                         the guidance scale is an input, as in LCM). A bucket of b images is one profile of b to 2b
                         rows, tuned for 2b: guidance may end early in a run. Who never changes it says so, and gets
                         profiles in which nothing is left open.
    VAE, text encoders   one row, whatever the batch: the runtime runs them image by image and prompt by prompt. So a
                         change of the batch leaves their engines as they are.
    safety checker       an image is one row.

Measured with tensorrt_rtx 1.7 on a U-Net of 8.7 M parameters: the profile of 1 to 2 rows takes the activation memory
of 2 rows alone (8.9 MB), 3 % more of engine and 17 % more of build time. Two profiles, for 1 row and for 2, take twice
the build time and 41 % more of engine, because kernels are compiled for each; the weights are shared.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from latentrt.runtime.engine_sidecar import PICTURE_READERS, ShapeProfile
from latentrt.runtime.errors import BuildError, UsageError
from latentrt.runtime.specs import TensorSpec
from latentrt.runtime.vae_tiling import auto_tile

TEXT_LENGTH = 77
_TEXT, _EDITING_CHANNELS = "encoder_hidden_states", 8


@dataclass(frozen=True)
class Range:
    """Smallest, usual and largest value of one size."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(f"range: expected 1 <= min <= opt <= max, got {self.min}..{self.opt}..{self.max}.")

    def times(self, factor: int) -> Range:
        """Every value multiplied."""
        return Range(self.min * factor, self.opt * factor, self.max * factor)

    def parts(self, divisor: int) -> Range:
        """Every value divided, rounded up."""
        return Range(-(-self.min // divisor), -(-self.opt // divisor), -(-self.max // divisor))

    @property
    def single(self) -> bool:
        """Whether it is one number."""
        return self.min == self.max


ONE = Range(1, 1, 1)
GUIDANCE = ("both", "on", "off")


@dataclass(frozen=True)
class ShapeRequest:
    """Shapes to serve: images per call, picture height and width in pixels, prompt chunks of 77 tokens.

    `guidance` is `both`, or `on` or `off` where it is so in every step.
    """

    batch: Range
    height: Range
    width: Range
    text_chunks: Range = ONE
    guidance: str = "both"


def _bounds(name: str, text: str, example: str) -> list[str]:
    parts = [part.strip() for part in text.split("..")]
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UsageError(f"{name}: expected {example}, got {text!r}.")
    return parts


def parse_range(name: str, text: str) -> Range:
    """A range from `4`, `1..8` or `1..4..8` (min..opt..max); the usual value is the smallest if none is named.

    Raises:
        UsageError: it is none of these forms, or not rising.
    """
    parts = _bounds(name, text, "a number, min..max or min..opt..max")
    if not all(re.fullmatch(r"[0-9]+", part) for part in parts):
        raise UsageError(f"{name}: expected whole numbers such as 1,2,4 or 1..8, got {text!r}.")
    values = [int(part) for part in parts]
    if values[0] < 1 or values != sorted(values):
        raise UsageError(f"{name}: expected rising numbers from 1, got {text!r}.")
    return Range(values[0], values[1] if len(values) == 3 else values[0], values[-1])


def parse_sizes(text: str, *, factor: int, native: int | None = None) -> tuple[Range, Range]:
    """Ranges of height and width from `512`, `64..256`, `64..128..256` or `512x768..768x1024` (height x width).

    Args:
        factor: pixels per latent, which every size must be a multiple of.
        native: the size the model was trained at: the optimum where the text names none and it lies within;
            otherwise the largest.

    Raises:
        UsageError: it is none of these forms, not rising, or not a multiple of the factor.
    """
    parts = _bounds("size", text, "512, 64..256, 64..128..256 or 512x768..768x1024 (height x width)")
    pairs = [re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", part) for part in parts]
    axes: list[Range] = []
    for axis in (1, 2):
        values = [int(pair[axis] or pair[1]) if pair else 0 for pair in pairs]
        if 0 in values:
            raise UsageError(f"size: expected sizes in pixels such as 512, 768x512 or 64..256, got {text!r}.")
        if odd := [value for value in values if value % factor]:
            below = odd[0] // factor * factor
            near = f"{below} or {below + factor}" if below else f"{factor}"
            raise UsageError(f"size: expected multiples of {factor}, got {odd[0]}. Nearest: {near}.")
        if values != sorted(values):
            raise UsageError(f"size: expected rising sizes, got {text!r}.")
        usual = native if native is not None and values[0] <= native <= values[-1] else values[-1]
        axes.append(Range(values[0], values[1] if len(values) == 3 else usual, values[-1]))
    return axes[0], axes[1]


def parse_requests(
    *, size: str, batch: str, text_chunks: str, factor: int, native: int | None = None, guidance: str = "both"
) -> tuple[ShapeRequest, ...]:
    """Every combination of the sizes, batches and text lengths that a command line lists with commas, in its order.

    Args:
        factor: pixels per latent.
        native: the size the model was trained at.
        guidance: of all requests.

    Raises:
        UsageError: a part is neither a number nor a range, or no such guidance; names its option.
    """
    if guidance not in GUIDANCE:
        raise UsageError(f"guidance: expected {', '.join(GUIDANCE[:-1])} or {GUIDANCE[-1]}, got {guidance!r}.")
    sizes = [parse_sizes(part, factor=factor, native=native) for part in size.split(",")]
    batches = [parse_range("batch", part) for part in batch.split(",")]
    chunks = [parse_range("text-chunks", part) for part in text_chunks.split(",")]
    requests = (
        ShapeRequest(b, *s, text_chunks=c, guidance=guidance) for s, c, b in itertools.product(sizes, chunks, batches)
    )
    return tuple(dict.fromkeys(requests))


def profiles_of(
    component: str, inputs: Sequence[TensorSpec], requests: Iterable[ShapeRequest], *, factor: int
) -> tuple[dict[str, ShapeProfile], ...]:
    """The optimization profiles that serve the requests, without doubles, the first request's first.

    Args:
        factor: pixels per latent.

    Raises:
        BuildError: the graph has a dynamic input that no rule covers.
        UsageError: the graph fixes a size that a request leaves.
    """
    profiles: list[dict[str, ShapeProfile]] = []
    for request in requests:
        profile = _profile(component, inputs, request, factor)
        if profile not in profiles:
            profiles.append(profile)
    return tuple(profiles)


def _rows(component: str, inputs: Sequence[TensorSpec], request: ShapeRequest) -> Range:
    """How many rows a component runs for the images of a request."""
    images = request.batch
    if not component.startswith(("unet", "controlnet")):
        return images if component == "safety_checker" else ONE
    factor = 1 if request.guidance == "off" else _guided_rows(inputs)
    least = images.min * factor if request.guidance == "on" else images.min
    return Range(least, images.opt * factor, images.max * factor)


def _guided_rows(inputs: Sequence[TensorSpec]) -> int:
    """Rows of an image that is drawn with guidance."""
    shapes = {tensor.name: tensor.shape for tensor in inputs}
    if "timestep_cond" in shapes:
        return 1
    return 3 if shapes.get("sample", (0, 0))[1] == _EDITING_CHANNELS else 2


def _profile(
    component: str, inputs: Sequence[TensorSpec], request: ShapeRequest, factor: int
) -> dict[str, ShapeProfile]:
    pixels = (request.height, request.width)
    if component.startswith("vae_") and pixels[0].single and pixels[1].single:
        tiling = auto_tile(pixels[0].max, pixels[1].max, factor=factor)
        if tiling is not None:  # larger pictures go through the VAE in tiles
            sides = [min(axis.max, tiling.tile) for axis in pixels]
            pixels = (Range(*[sides[0]] * 3), Range(*[sides[1]] * 3))
    rows, latents = _rows(component, inputs, request), [axis.parts(factor) for axis in pixels]
    tokens = request.text_chunks.times(TEXT_LENGTH)
    ids = Range(TEXT_LENGTH, TEXT_LENGTH, TEXT_LENGTH)
    found = {}
    for tensor in inputs:
        # Channels and features are fixed in every graph, so a rule lists the other dimensions in order.
        ranges = [rows]
        if tensor.name == "input_ids":
            ranges += [ids]
        elif tensor.name == _TEXT or ".attn" in tensor.name:  # the text, or the keys and values made of it
            ranges += [tokens]
        elif "residual" in tensor.name:
            ranges += [axis.parts(_divisor(tensor)) for axis in latents]
        elif tensor.name in ("sample", "latent_sample", "controlnet_cond"):
            whole = tensor.name == "controlnet_cond" or component in PICTURE_READERS
            ranges += pixels if whole else latents
        found[tensor.name] = _shapes(component, tensor, ranges)
    return found


def _divisor(tensor: TensorSpec) -> int:
    """What the latents' sides are divided by in a ControlNet's residual: 4 of `latent_height_4`."""
    match = re.fullmatch(r"latent_height_([0-9]+)", str(tensor.shape[2]))
    return 1 if match is None else int(match[1])


def _shapes(component: str, tensor: TensorSpec, ranges: Sequence[Range]) -> ShapeProfile:
    channel_axis = 1 if len(tensor.shape) == 4 else 2
    shapes: list[Range] = []
    left = list(ranges)
    for axis, size in enumerate(tensor.shape):
        if isinstance(size, int) and (axis == channel_axis or not left):
            shapes.append(Range(size, size, size))
            continue
        if not left:
            raise BuildError(
                f"{component}.{tensor.name}: expected shape rules for every dynamic size, found none for axis {axis} "
                f"of {tensor.shape}. Export the component with that size fixed."
            )
        wanted = left.pop(0)
        if isinstance(size, int) and not wanted.min == wanted.max == size:
            raise UsageError(
                f"{component}.{tensor.name}: expected sizes {wanted.min}..{wanted.max} on axis {axis}, and the graph "
                f"fixes {size}. Build for that size, or export with dynamic shapes."
            )
        shapes.append(wanted)
    return ShapeProfile(
        min=tuple(r.min for r in shapes), opt=tuple(r.opt for r in shapes), max=tuple(r.max for r in shapes)
    )


def largest_shapes(profiles: Iterable[Mapping[str, ShapeProfile]]) -> dict[str, tuple[int, ...]]:
    """The largest shape of each input over all profiles, dimension by dimension."""
    largest: dict[str, tuple[int, ...]] = {}
    for profile in profiles:
        for name, shapes in profile.items():
            largest[name] = tuple(map(max, largest.get(name, shapes.max), shapes.max))
    return largest
