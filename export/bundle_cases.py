"""Inputs of a real sampling run from a bundle alone: what its networks are given, and what they answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from latentrt.runtime.bundle import Bundle
from latentrt.runtime.components import Components
from latentrt.runtime.manifest import Manifest
from latentrt.runtime.model_facts import ModelFacts
from latentrt.runtime.request import Control, Request
from latentrt.runtime.specs import Array, ModelSpec

from .parity import Case
from .recording import watched_pipeline

_PROMPT = "a small red circle at the top left of a blue background"
# Pixels along a side: enough for every layer, and seconds on a CPU at any checkpoint's width.
_SIDE, _SHORTER = 256, 192


def bundle_cases(path: Path, manifest: Manifest) -> dict[str, list[Case]]:
    """Draw with a bundle and return parity cases by component.

    The graphs for every runtime draw, in the most exact precision that the bundle holds: their answers are the
    reference. One run is square with guidance, one is not, with a long prompt and without; a network that neither
    calls (a preview decoder) is given random numbers.
    """
    plain = dataclasses.replace(manifest, artifacts=tuple(a for a in manifest.artifacts if not a.target))
    bundle = Bundle(path, plain)
    cases: dict[str, list[Case]] = {component: [] for component in bundle.components()}

    def keep(component: str, feeds: Mapping[str, Array], answer: Mapping[str, Array]) -> None:
        own = cases[component]
        own.append(Case(f"call {len(own) + 1}", dict(feeds), answer))

    with watched_pipeline(bundle, bundle.precisions()[0], keep) as pipeline:
        components = pipeline.model.components
        for request in _requests(components, pipeline.model.facts):
            pipeline(request)
        for component in bundle.components():
            session = components[component]
            if not cases[component]:
                session(_random_feeds(session.spec))
    return cases


def _requests(components: Components, facts: ModelFacts) -> list[Request]:
    """What to draw so that every network of the family is called."""
    side = min(facts.default_size, _SIDE)
    shorter = side * _SHORTER // _SIDE // 16 * 16 or side
    picture = _picture(side)
    controls = tuple(
        Control(image=picture, model=index)
        for index in range(sum(name.startswith("controlnet") for name in components.bundle.components()))
    )
    mask = (np.arange(side) < side // 2).astype(np.uint8)[None].repeat(side, 0) * 255 if facts.is_inpainting else None
    first = Request(prompt=_PROMPT, steps=4, width=side, height=side, image=picture, mask=mask, controls=controls)
    return [first, first.replace(prompt=" and ".join([_PROMPT] * 8), steps=2, width=shorter, guidance=1.0, controls=())]


def _picture(side: int) -> Array:
    """A disc before two gradients, (side, side, 3) uint8: flat and smooth areas, and an edge."""
    ramp = np.linspace(0, 1, side)
    down, across = np.meshgrid(ramp, ramp, indexing="ij")
    disc = ((down - 0.4) ** 2 + (across - 0.6) ** 2 < 0.06).astype(float)
    return (255 * np.stack([disc, down, across * (1 - disc)], axis=-1)).astype(np.uint8)


def _random_feeds(spec: ModelSpec) -> dict[str, Array]:
    """Standard normal numbers for every input, a size for every name of a dynamic dimension."""
    generator = np.random.default_rng(0)
    sizes = {"batch": 2, "sequence_length": 77, "height": 64, "width": 64}
    return {
        tensor.name: generator.standard_normal(
            [size if isinstance(size, int) else sizes.get(size, 8) for size in tensor.shape]
        ).astype(tensor.dtype)
        for tensor in spec.inputs
    }
