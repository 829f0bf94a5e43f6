"""A plan for a bundle: memory of its components, which policy fits which card, and what the builds take."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.bundle import Bundle, open_bundle
from latentrt.runtime.cache_folder import cache_folder
from latentrt.runtime.errors import UsageError
from latentrt.runtime.machine import Machine, probe_machine
from latentrt.runtime.residency_plan import ComponentMemory
from latentrt.runtime.trt_flavour import FLAVOURS

from .build_options import BuildOptions, wanted_shapes
from .plan_cards import CONTEXT_SOURCE, Card, card_of, sizes_in_trade
from .plan_components import ComponentPlan, plan_components
from .plan_fit import Fit, Way, fits_on, ways_to_fit

NOT_RUN = "planned; not run on a GPU"
OTHER_FLAVOUR = (
    "activation memory is estimated by the rules of tensorrt_rtx; for tensorrt, which builds on a GPU alone, they were "
    "not compared with a build"
)
STREAMING = "weight streaming: assumed to need twice the largest weight at least; not measured"
# Tensors that are named of those held where the most is.
_HELD_SHOWN = 5


@dataclass(frozen=True)
class BundlePlan:
    """What a bundle takes at a size and a batch.

    Attributes:
        images, height, width: the largest that is asked for.
        card: asked for, or this machine's; None where there is neither.
        fits: every policy on the card; without one, each policy on the smallest card in trade that it fits.
        ways: what would fit where no policy does.
    """

    flavour: str
    images: int
    height: int
    width: int
    components: tuple[ComponentPlan, ...]
    card: Card | None
    fits: tuple[Fit, ...]
    ways: tuple[Way, ...]

    @property
    def build_seconds(self) -> float | None:
        """Of all builds, one after the other; None if one of them cannot be told."""
        seconds = [plan.build_seconds for plan in self.components]
        return None if None in seconds else sum(second for second in seconds if second is not None)

    @property
    def build_peak_bytes(self) -> int | None:
        """The most memory that one of the builds takes."""
        return max((plan.build_peak_bytes for plan in self.components if plan.build_peak_bytes), default=None)

    @property
    def disk_bytes(self) -> int:
        """Of all engines."""
        return sum(plan.engine_bytes for plan in self.components)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the figures rest on."""
        guessed = self.flavour == "tensorrt" and any(plan.stated is None for plan in self.components)
        sides = [
            f"{plan.component} {plan.precision}: up to {plan.estimate.side / 1e6:.0f} MB of its activation is for "
            "kernels that may run side by side; whether they do, the builder decides"
            for plan in self.components
            if plan.estimate.side and plan.stated is None
        ]
        return (f"CUDA: {CONTEXT_SOURCE}", STREAMING, *sides, *((OTHER_FLAVOUR,) if guessed else ()), NOT_RUN)


def plan_bundle(
    path: Path,
    options: BuildOptions,
    *,
    card: Card | None = None,
    machine: Machine | None = None,
    report: Callable[[str], None] = lambda _text: None,
) -> BundlePlan:
    """Plan what `build` would make of a bundle and what running that takes.

    Args:
        card: to fit; by default this machine's GPU, if it has one.
        machine: what this machine has; probed by default.
        report: told what is being planned.

    Raises:
        UsageError: an option is not possible.
        ArtifactError: the bundle or a graph in it is damaged.
        ExportError: a shape in a graph depends on more than the sizes of its inputs.
    """
    machine = probe_machine() if machine is None else machine
    bundle = open_bundle(path)
    flavour = _flavour(options.flavour, machine)
    if card is None and machine.gpus:
        card = card_of(machine.gpus[0])
    sm = None if card is None else card.sm

    @functools.cache
    def components_with(changed: BuildOptions) -> tuple[ComponentPlan, ...]:
        def reported(component: str) -> None:
            report(f"{component}, {changed.size or 'native size'}, batch {changed.batch}")

        return plan_components(bundle, changed, flavour=flavour, sm=sm, cache=cache_folder(), report=reported)

    components = components_with(options)
    memory = [plan.memory for plan in components]
    images, height, width = _largest(bundle, options)
    fits = fits_on(card, memory) if card is not None else _smallest_cards(memory)
    ways: list[Way] = []
    if card is not None and all(fit.spare < 0 for fit in fits):
        ways = ways_to_fit(
            card,
            options,
            (images, height, width),
            lambda changed: [plan.memory for plan in components_with(changed)],
        )
    return BundlePlan(flavour, images, height, width, components, card, tuple(fits), tuple(ways))


def _flavour(wanted: str, machine: Machine) -> str:
    """The flavour that `build` would take; a plan needs none installed."""
    if wanted not in ("auto", *FLAVOURS):
        raise UsageError(f"flavour: expected auto, {' or '.join(FLAVOURS)}, got {wanted!r}.")
    if wanted != "auto":
        return wanted
    return "tensorrt" if machine.gpus and "tensorrt" in machine.packages else "tensorrt_rtx"


def _largest(bundle: Bundle, options: BuildOptions) -> tuple[int, int, int]:
    requests, _ = wanted_shapes(bundle, options)
    images, heights, widths = zip(*((one.batch.max, one.height.max, one.width.max) for one in requests), strict=True)
    return max(images), max(heights), max(widths)


def _smallest_cards(components: Sequence[ComponentMemory]) -> list[Fit]:
    """Each policy on the smallest of the sizes in trade that it fits; on the largest, if it fits none."""
    sizes = [fits_on(card, components) for card in sizes_in_trade()]
    return [next((fit for fit in column if fit.spare >= 0), column[-1]) for column in zip(*sizes, strict=True)]


def plan_as_json(plan: BundlePlan) -> dict[str, Any]:
    """The plan as the command's JSON has it; sizes in bytes."""
    return {
        "flavour": plan.flavour,
        "images": plan.images,
        "height": plan.height,
        "width": plan.width,
        "card": None if plan.card is None else _card_as_json(plan.card),
        "components": [_component_as_json(component) for component in plan.components],
        "policies": [_fit_as_json(fit) for fit in plan.fits],
        "fits": next((fit.residency.policy for fit in plan.fits if fit.spare >= 0), None),
        "ways_to_fit": [{"what": way.what, **_fit_as_json(way.fit)} for way in plan.ways],
        "build_seconds": plan.build_seconds,
        "build_peak_bytes": plan.build_peak_bytes,
        "disk_bytes": plan.disk_bytes,
        "notes": list(plan.notes),
    }


def _card_as_json(card: Card) -> dict[str, Any]:
    return {"name": card.name, "memory_bytes": card.memory, "context_bytes": card.context_bytes}


def _component_as_json(plan: ComponentPlan) -> dict[str, Any]:
    return {
        "component": plan.component,
        "precision": plan.precision,
        "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
        "weight_bytes": plan.memory.weights,
        "activation_bytes": plan.memory.activation,
        "activation_source": "estimate" if plan.stated is None else "builder",
        "estimated_activation_bytes": plan.estimate.total,
        "estimated_side_bytes": plan.estimate.side,
        "estimate_error": plan.estimate_error,
        "fullest_at": plan.estimate.at,
        "held_there": dict(itertools.islice(plan.estimate.held.items(), _HELD_SHOWN)),
        "tensor_bytes": plan.memory.tensors,
        "engine_bytes": plan.engine_bytes,
        "build_seconds": plan.build_seconds,
        "build_peak_bytes": plan.build_peak_bytes,
    }


def _fit_as_json(fit: Fit) -> dict[str, Any]:
    return {
        "policy": fit.residency.policy,
        "card": fit.card.name,
        "fits": fit.spare >= 0,
        "spare_bytes": fit.spare,
        "peak_bytes": fit.residency.peak.total,
        "peak_at": list(fit.residency.peak.components),
        "streaming_budget_bytes": fit.residency.budget,
        "stages": [{**dataclasses.asdict(stage), "total": stage.total} for stage in fit.residency.stages],
    }
