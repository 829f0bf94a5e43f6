"""Making what an export has planned: inputs of a sampling run first, then graph by graph."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from latentrt.runtime.components import PICTURES
from latentrt.runtime.errors import UsageError
from latentrt.runtime.latent_preview import LATENT_RGB_FILE
from latentrt.runtime.manifest import Artifact, Manifest
from latentrt.runtime.safety_checker import ClipProcessor

from .checkpoint import Checkpoint
from .component import Component
from .derived_graphs import build_prompt_split, build_uint8_decoder
from .export_plan import DERIVED, Built, Planned, Report, graph_path, is_compared, made_for
from .finished import finished, note_finished
from .graph_builder import build_graph, components_of
from .latent_colours import fit_colours
from .networks import Network, open_network, weights_at_hand
from .parity import Case
from .proofs import effort_for, note_proven
from .real_inputs import capture_cases
from .reference_pipeline import is_beside, reference_pipeline
from .reference_run import NONE, Effort
from .resources import check_resources, needs_of, release_memory


@dataclass(frozen=True)
class Order:
    """What to make, of what, and where.

    Attributes:
        manifest: of the bundle, None for a new one.
        planned: all graphs asked for; those with a reason are made.
        folder: where the files go; it may hold graphs that an earlier export finished.
        check: how thoroughly to compare, see `export_checkpoint`.
        cache: folder of traced graphs.
    """

    checkpoint: Checkpoint
    bundle: Path
    manifest: Manifest | None
    planned: Sequence[Planned]
    folder: Path
    opset: int
    check: str
    cache: Path
    report: Report


def make_graphs(order: Order) -> Built:
    """Make the graphs that an export has to, and the colours of latents, in its folder.

    Raises:
        UsageError: too little disk or memory.
        ArtifactError, ConfigError: the checkpoint is damaged or not supported.
        ExportError: a component cannot be exported or does not match its model.
    """
    order.report("making the networks", 0.0)
    networks = {name: open_network(part) for name, part in order.checkpoint.parts.items()}
    components = components_of(networks)
    parameters = {name: component.parameters for name, component in components.items()}
    parameters |= {name: parameters[base] for name, base in DERIVED.items()}
    built = finished(order.folder, [plan for plan in order.planned if plan.reason])
    if order.check != "none":
        built = {asked: made for asked, made in built.items() if is_compared(made[0])}
    pending = [plan for plan in order.planned if plan.reason and (plan.component, plan.precision) not in built]
    needs = needs_of([(plan.component, plan.precision) for plan in pending], parameters)
    order.report(f"needs {needs}", 0.0)
    check_resources(needs, order.bundle)
    if order.check == "none" and (derived := [plan.component for plan in pending if plan.component in DERIVED]):
        raise UsageError(
            f"check: expected quick, full or auto with {derived[0]}, got none. It is always compared with the "
            "graph that it is made from."
        )
    bases = [(components[DERIVED.get(plan.component, plan.component)], plan.precision) for plan in pending]
    effort = effort_for(order.check, bases, opset=order.opset, cache=order.cache)
    cases = _sample(order, networks, effort)
    release_memory()
    run = _Run(order, components, parameters, cases, effort, pending, built)
    run.make()
    return run.built


def _sample(order: Order, networks: Mapping[str, Network], effort: Effort) -> dict[str, list[Case]]:
    """Draw with PyTorch: parity cases by component, none without a check, and the preview's colours into the folder."""
    colours = order.folder / LATENT_RGB_FILE
    colours.parent.mkdir(parents=True, exist_ok=True)
    if effort is NONE:
        with weights_at_hand(networks["vae"]):
            colours.write_text(fit_colours(networks["vae"].module).to_json())
        return {}
    order.report("sampling with PyTorch for real inputs", 0.0)
    pipeline = reference_pipeline(order.checkpoint, networks)
    extras: dict[str, Any] = {name: network.module for name, network in networks.items() if is_beside(name)}
    if (config := order.checkpoint.texts.get("feature_extractor/preprocessor_config.json")) is not None:
        extras["preprocess"] = ClipProcessor.from_config(json.loads(config))
    with weights_at_hand(*networks.values()):
        cases = capture_cases(pipeline, extras, effort=effort)
        colours.write_text(fit_colours(pipeline.vae).to_json())
    return cases


@dataclass
class _Run:
    """The graphs of an order being made."""

    order: Order
    components: Mapping[str, Component]
    parameters: Mapping[str, int]
    cases: Mapping[str, Sequence[Case]]
    effort: Effort
    pending: Sequence[Planned]
    built: Built
    done: float = field(default=0.0, init=False)

    def make(self) -> None:
        """All that is pending, those first that others are made from."""
        for plan in self.pending:
            if plan.component not in DERIVED:
                self._export(plan)
        derived = [plan for plan in self.pending if plan.component in DERIVED]
        for _, plans in groupby(sorted(derived, key=_base_of), key=_base_of):
            self._derive(list(plans))

    def _export(self, plan: Planned) -> None:
        order, component = self.order, self.components[plan.component]
        order.report(f"{plan.component}: {plan.precision}", self.done)
        started = time.perf_counter()
        graph = build_graph(
            component,
            lambda precision: order.folder / graph_path(plan.component, precision),
            self.cases.get(plan.component, ()),
            precision=plan.precision,
            opset=order.opset,
            cache=order.cache,
            holder_of=self._unet if plan.component == "unet_control" else lambda precision: None,
            plain=self.effort.plain,
        )
        note_proven(component, graph.precision, self.effort, opset=order.opset, cache=order.cache)
        self._finish(plan, graph.precision, graph.files, graph.parity, time.perf_counter() - started)

    def _derive(self, plans: Sequence[Planned]) -> None:
        """The graphs that are made from one other."""
        component, precision = _base_of(plans[0])
        base = self._held()[component, precision]
        self.order.report(f"{' and '.join(plan.component for plan in plans)}: {base.precision}", self.done)
        started = time.perf_counter()
        source, folder, cases = self._at_hand(base), self.order.folder, self.cases[component]
        paths = {name: folder / graph_path(name, base.precision) for name, of in DERIVED.items() if of == component}
        if component == "unet":
            made = build_prompt_split(source, paths, cases, precision=base.precision)
        else:
            config = self.order.checkpoint.parts["vae"].config
            made = {PICTURES: build_uint8_decoder(source, paths[PICTURES], config, cases, precision=base.precision)}
        seconds = (time.perf_counter() - started) / len(plans)
        for plan in plans:
            graph = made[plan.component]
            self._finish(plan, base.precision, graph.files, graph.parity, seconds)

    def _finish(
        self, plan: Planned, precision: str, files: Sequence[Path], parity: Mapping[str, Any], seconds: float
    ) -> None:
        artifact = Artifact(
            component=plan.component,
            precision=precision,
            path=graph_path(plan.component, precision),
            files=tuple(path.relative_to(self.order.folder).as_posix() for path in files),
            opset=self.order.opset,
            key=plan.key,
            inputs=plan.inputs,
            parity={**parity, "check": self.effort.name},
            parameters=self.parameters[plan.component],
        )
        self.built[plan.component, plan.precision] = artifact, seconds
        note_finished(self.order.folder, plan, artifact)
        total = sum(_cost(self.parameters[other.component]) for other in self.pending)
        self.done += _cost(self.parameters[plan.component]) / total

    def _held(self) -> dict[tuple[str, str], Artifact]:
        """By component and the precision asked for: the graphs made, and those of the bundle that are up to date."""
        current = {
            (plan.component, plan.precision): made_for(self.order.manifest, plan.component, plan.precision)
            for plan in self.order.planned
            if plan.reason is None
        }
        held = {asked: artifact for asked, artifact in current.items() if artifact is not None}
        return held | {asked: artifact for asked, (artifact, _) in self.built.items()}

    def _unet(self, precision: str) -> Path | None:
        """The U-Net's graph, if it is made in that precision."""
        unets = [a for a in self._held().values() if (a.component, a.precision) == ("unet", precision)]
        return self._at_hand(unets[0]) if unets else None

    def _at_hand(self, artifact: Artifact) -> Path:
        """A graph in the folder: made there, or copied from the bundle, since external data may not be links."""
        for name in artifact.files:
            target = self.order.folder / name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.order.bundle / name, target)
        return self.order.folder / artifact.path


def _base_of(plan: Planned) -> tuple[str, str]:
    """Component and precision that a derived graph is made from."""
    return DERIVED[plan.component], plan.precision


def _cost(parameters: int) -> float:
    """How long a graph takes, in arbitrary units: tracing costs as much as some forty million weights."""
    return parameters + 4e7
