"""Shape profiles: from `--batch 1..8 --size 64..256` to the smallest, usual and largest shape of every input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from latentrt.runtime.engine_sidecar import ShapeProfile
from latentrt.runtime.errors import BuildError, UsageError
from latentrt.runtime.specs import TensorSpec

TEXT_LENGTH = 77


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


@dataclass(frozen=True)
class ShapeRequest:
    """The shapes an engine is asked to serve: images per call, picture height and width, prompt chunks of 77 tokens."""

    batch: Range
    height: Range
    width: Range
    text_chunks: Range = Range(1, 1, 1)


def _bounds(name: str, text: str, example: str) -> list[str]:
    parts = [part.strip() for part in text.split("..")]
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UsageError(f"{name}: expected {example}, got {text!r}.")
    return parts


def parse_range(name: str, text: str, *, usual: int | None = None) -> Range:
    """A range from `4`, `1..8` or `1..4..8` (min..opt..max).

    Args:
        usual: the optimum where the text names none; the smallest if it is not given or outside.

    Raises:
        UsageError: it is none of these forms, or not rising.
    """
    parts = _bounds(name, text, "a number, min..max or min..opt..max")
    if not all(re.fullmatch(r"\d+", part) for part in parts):
        raise UsageError(f"{name}: expected whole numbers such as 1..8, got {text!r}.")
    low, high = int(parts[0]), int(parts[-1])
    opt = int(parts[1]) if len(parts) == 3 else low if usual is None or not low <= usual <= high else usual
    if not 1 <= low <= opt <= high:
        raise UsageError(f"{name}: expected rising numbers from 1, got {text!r}.")
    return Range(low, opt, high)


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
    pairs = [re.fullmatch(r"(\d+)(?:x(\d+))?", part) for part in parts]
    axes: list[Range] = []
    for axis in (1, 2):
        values = [int(pair[axis] or pair[1]) if pair else 0 for pair in pairs]
        if 0 in values:
            raise UsageError(f"size: expected sizes in pixels such as 512, 64..256 or 512x768, got {text!r}.")
        if odd := [value for value in values if value % factor]:
            below = odd[0] // factor * factor
            near = f"{below} or {below + factor}" if below else f"{factor}"
            raise UsageError(f"size: expected multiples of {factor}, got {odd[0]}. Nearest: {near}.")
        if values != sorted(values):
            raise UsageError(f"size: expected rising sizes, got {text!r}.")
        usual = native if native is not None and values[0] <= native <= values[-1] else values[-1]
        axes.append(Range(values[0], values[1] if len(values) == 3 else usual, values[-1]))
    return axes[0], axes[1]


def profile_of(
    component: str, inputs: Sequence[TensorSpec], request: ShapeRequest, *, factor: int
) -> dict[str, ShapeProfile]:
    """The shapes of every input of a component.

    Guidance runs each image twice in one call, so the U-Net and the text encoder see up to twice the images; with
    guidance off they see them once, so the smallest number of rows is the smallest number of images.

    Args:
        factor: pixels per latent.

    Raises:
        BuildError: the graph has a dynamic input that no rule covers.
        UsageError: the graph fixes a size that the request leaves.
    """
    latents = [
        Range(axis.min // factor, axis.opt // factor, axis.max // factor) for axis in (request.height, request.width)
    ]
    images = request.batch
    guided = Range(images.min, 2 * images.opt, 2 * images.max)
    text = request.text_chunks.times(TEXT_LENGTH)
    chunk_rows = Range(guided.min, guided.opt, guided.max * request.text_chunks.max)
    ids = [chunk_rows, Range(TEXT_LENGTH, TEXT_LENGTH, TEXT_LENGTH)]
    wanted: dict[tuple[str, str], list[Range]] = {
        ("unet", "sample"): [guided, *latents],
        ("unet", "encoder_hidden_states"): [guided, text],
        ("text_encoder", "input_ids"): ids,
        ("text_encoder_2", "input_ids"): ids,
        ("vae_decoder", "latent_sample"): [images, *latents],
        ("vae_encoder", "sample"): [images, request.height, request.width],
    }
    rows = guided if component == "unet" else images
    profiles = {}
    for tensor in inputs:
        # Channels and features are fixed in every graph, so the rule lists the other dimensions in order.
        ranges = wanted.get((component, tensor.name), [rows])
        profiles[tensor.name] = _profile(component, tensor, ranges)
    return profiles


def largest_sizes(request: ShapeRequest, factor: int) -> dict[str, int]:
    """The largest pictures and latents of a request, by the names that exported graphs give those dimensions."""
    height, width = request.height.max, request.width.max
    return {"height": height, "width": width, "latent_height": height // factor, "latent_width": width // factor}


def _profile(component: str, tensor: TensorSpec, ranges: Sequence[Range]) -> ShapeProfile:
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
