"""Noise for a batch: one generator per image, variations of a seed, and pictures resized from another size.

An image's numbers come from a generator of its own, so that it is the same whatever batch it is made in. The kinds:

- "cpu": `torch.randn` of PyTorch's CPU generator (`torch_rng`): diffusers with CPU generators, ComfyUI, A1111's "CPU".
- "cuda": `torch.randn` on a GPU (`cuda_rng`): A1111's "GPU", and its "NV" for the sizes at which all GPUs agree.
- "numpy": `numpy.random.default_rng(seed).standard_normal`. NumPy may change these numbers from release to release
  (its policy, NEP 19); the other two cannot change.

Variations and the resizing follow AUTOMATIC1111's stable-diffusion-webui, so that its seeds give its noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from .cuda_rng import DEFAULT_GPU, CudaGenerator, Gpu, gpu_of
from .errors import UsageError
from .torch_rng import TorchGenerator, checked_seed

Rng = Literal["cpu", "cuda", "numpy"]
RNGS: tuple[Rng, ...] = get_args(Rng)
NoiseSource = Callable[[tuple[int, ...]], NDArray[np.float32]]

# Below this sine of the angle between two columns they lie on one line, and no arc leads from one to the other.
_PARALLEL = 1e-6


class NoiseGenerator(Protocol):
    """A seeded stream of standard normal numbers."""

    def manual_seed(self, seed: int) -> NoiseGenerator:
        """Start again from this seed."""
        ...

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next numbers of the stream, in this shape."""
        ...


class NumpyGenerator:
    """`numpy.random.default_rng(seed % 2**64).standard_normal(shape, numpy.float32)`.

    Raises:
        UsageError: the seed is no integer or not in [-2^63, 2^64).
    """

    def __init__(self, seed: int) -> None:
        """Seed the stream."""
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> NumpyGenerator:
        """Start again from this seed."""
        self._generator = np.random.default_rng(checked_seed(seed) % 2**64)
        return self

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next standard normal numbers, in this shape."""
        return self._generator.standard_normal(tuple(shape), np.float32)


def noise_generator(seed: int, *, rng: Rng = "cpu", gpu: str | Gpu = DEFAULT_GPU) -> NoiseGenerator:
    """A stream of the given kind; `gpu`, a name in `cuda_rng.GPUS` or a GPU's two numbers, concerns "cuda" only.

    Raises:
        UsageError: the kind or the GPU is not known, or the seed out of range.
    """
    match rng:
        case "cpu":
            return TorchGenerator(seed)
        case "cuda":
            device = gpu_of(gpu) if isinstance(gpu, str) else Gpu(*gpu)
            return CudaGenerator(seed, **device._asdict())
        case "numpy":
            return NumpyGenerator(seed)
    raise UsageError(f"rng: expected one of {', '.join(RNGS)}, got {rng!r}. Choose whose noise to reproduce.")


def batch_seeds(
    seed: int | Sequence[int],
    batch_size: int | None = None,
    *,
    variation_seed: int | Sequence[int] | None = None,
    variation_strength: float = 0.0,
) -> tuple[list[int], list[int]]:
    """The seed and the variation seed of each image of a batch, numbered as A1111 does.

    Without a variation image i has seed + i. With one every image has the seed itself, and the variation seed + i.
    A sequence gives every image's seed and is taken as it is.

    Args:
        seed: of the first image, or of each.
        batch_size: how many images; by default as many as the sequences hold, or one.
        variation_seed: what to vary towards; by default 0, as A1111's is.
        variation_strength: 0 for none.

    Raises:
        UsageError: the sequences and `batch_size` disagree, or a seed is out of range.
    """
    lengths = [len(s) for s in (seed, variation_seed) if isinstance(s, Sequence)]
    size = batch_size if batch_size is not None else max(lengths, default=1)
    if size < 1 or any(length != size for length in lengths):
        raise UsageError(f"seeds: expected one for each of {size} images, got {lengths}. Give one seed an image.")
    seeds = _numbered("seed", seed, size, step=0 if variation_strength else 1)
    return seeds, _numbered("variation_seed", variation_seed or 0, size, step=1)


def _numbered(name: str, seed: int | Sequence[int], size: int, *, step: int) -> list[int]:
    if isinstance(seed, Sequence):
        return [checked_seed(each) for each in seed]
    first = checked_seed(seed)
    if first + step * (size - 1) >= 2**64:
        raise UsageError(
            f"{name}: expected {name} + {size - 1} below 2^64 for {size} images, got {first}. Choose a smaller one."
        )
    return [first + step * i for i in range(size)]


def batch_noise(
    seed: int | Sequence[int],
    batch_size: int | None = None,
    *,
    rng: Rng = "cpu",
    gpu: str | Gpu = DEFAULT_GPU,
    variation_seed: int | Sequence[int] | None = None,
    variation_strength: float = 0.0,
    resize_from: tuple[int, int] | None = None,
    later_seed_delta: int = 0,
    plain_draws: int = 0,
) -> NoiseSource:
    """Noise for a batch, each image's from a generator of its own.

    The first call gives the initial latents; the next ones what a stochastic sampler adds, each image's generator
    drawing on, in the order in which diffusers draws with a list of generators (with one generator for several images
    it draws other numbers). Shapes are (b, c, h/8, w/8).

    Args:
        seed: of the first image, image i having `seed + i`, or a sequence with one for each. See `batch_seeds`.
        batch_size: how many images; by default as many as the sequences hold, or one.
        rng: whose numbers: "cpu", "cuda" or "numpy".
        gpu: for "cuda": a name in `cuda_rng.GPUS`, or a GPU's numbers of multiprocessors and of threads on each.
        variation_seed: the initial latents are turned towards this seed's; later draws stay those of `seed`.
        variation_strength: how far, 0 (not at all) to 1 (all the way). See `variation_noise`.
        resize_from: height and width, in latents, of the picture whose composition to keep at this batch's size:
            its initial latents take the centre, the seed's own noise of this size the rest (A1111's "resize seed
            from", which counts in pixels).
        later_seed_delta: added to the seeds for all but the first draw (A1111's ENSD, "eta noise seed delta").
        plain_draws: how many draws come before the initial latents and are the seeds' own, such as the one that
            samples an image's latents from the VAE's distribution.

    Raises:
        UsageError: an argument is not as described; by the returned function, if a shape's rows are not `batch_size`.
    """
    if not 0.0 <= variation_strength <= 1.0:
        raise UsageError(f"variation_strength: expected 0 to 1, got {variation_strength}. 0 leaves the seed's noise.")
    seeds, variation_seeds = batch_seeds(
        seed, batch_size, variation_seed=variation_seed, variation_strength=variation_strength
    )
    generators = [noise_generator(each, rng=rng, gpu=gpu) for each in seeds]
    draws = 0

    def initial(i: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        own = generators[i].randn(shape)
        smaller = shape if resize_from is None else (*shape[:-2], *resize_from)
        if smaller == shape and not variation_strength:
            return own
        latents = own if smaller == shape else noise_generator(seeds[i], rng=rng, gpu=gpu).randn(smaller)
        if variation_strength:
            variation = noise_generator(variation_seeds[i], rng=rng, gpu=gpu).randn(smaller)
            latents = variation_noise(latents, variation, variation_strength)
        return latents if smaller == shape else _centred(latents, own)

    def draw(shape: tuple[int, ...]) -> NDArray[np.float32]:
        nonlocal draws
        if not shape or shape[0] != len(seeds):
            raise UsageError(f"noise: expected a shape of {len(seeds)} rows, got {shape}. Seed one generator a row.")
        row = (1, *shape[1:])
        draws += 1
        if draws != plain_draws + 1:
            return np.concatenate([generator.randn(row) for generator in generators])
        first = np.concatenate([initial(i, row) for i in range(len(seeds))])
        if later_seed_delta:
            for generator, each in zip(generators, seeds, strict=True):
                generator.manual_seed(each + later_seed_delta)
        return first

    return draw


def variation_noise(noise: NDArray[np.float32], variation: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
    """Noise turned from `noise` towards `variation`: A1111's `slerp`, each image by itself.

    Spherical interpolation keeps the length that normal numbers have, which a straight line would shorten. As in
    A1111 the angle is taken between columns, over the height, one for each channel and column of an image. Columns on
    one line are interpolated along it. (A1111 goes over to a straight line when the mean cosine of an image is above
    0.9995, with the two weights swapped; different seeds never come near that, and equal ones give the same anyway.)

    Args:
        noise: shape (b, c, h, w).
        variation: the same shape.
        strength: 0 gives `noise` itself, 1 `variation`.

    Raises:
        UsageError: the shapes differ or have fewer than two axes.
    """
    if noise.shape != variation.shape or noise.ndim < 2:
        raise UsageError(f"variation: expected the noise's shape {noise.shape}, got {variation.shape}. Draw it alike.")
    if strength == 0.0:
        return noise
    lengths = np.linalg.norm(noise, axis=-2, keepdims=True) * np.linalg.norm(variation, axis=-2, keepdims=True)
    cosine = np.sum(noise * variation, axis=-2, keepdims=True) / lengths
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    straight = np.sin(angle) < _PARALLEL
    sine = np.where(straight, 1.0, np.sin(angle))
    kept = np.where(straight, 1.0 - strength, np.sin((1.0 - strength) * angle) / sine)
    added = np.where(straight, strength, np.sin(strength * angle) / sine)
    return np.asarray(kept * noise + added * variation, np.float32)


def _centred(patch: NDArray[np.float32], background: NDArray[np.float32]) -> NDArray[np.float32]:
    """The background with the patch in its middle, cut to fit where it is larger."""
    into, out_of = zip(
        *(_overlap(inner, outer) for inner, outer in zip(patch.shape[-2:], background.shape[-2:], strict=True)),
        strict=True,
    )
    background[(..., *into)] = patch[(..., *out_of)]
    return background


def _overlap(inner: int, outer: int) -> tuple[slice, slice]:
    # Rounded down in both cases: an odd excess loses one more row, as A1111's arithmetic has it.
    shift = (outer - inner) // 2
    size = inner if shift >= 0 else inner + 2 * shift
    start, skipped = max(shift, 0), max(-shift, 0)
    return slice(start, start + size), slice(skipped, skipped + size)
