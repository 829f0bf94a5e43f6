"""What a run asks of its networks, found by drawing without them.

The pipeline itself draws, with sessions that answer numbers of the right shape and count what they are asked: how
often the text encoder runs, which steps are guided, how many evaluations a sampler takes, how many tiles a picture has.
All of that is the runtime's to decide, and stays so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property

import numpy as np
import onnx_ir as ir

from latentrt.export.engine_graph import graph_tensors
from latentrt.export.export_plan import DERIVED
from latentrt.export.recording import wrapped_pipeline
from latentrt.runtime.bundle import Bundle
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.request import Request
from latentrt.runtime.specs import Array, ModelSpec, Session

from .cases import Case, Settings
from .graph_flops import GraphWork, graph_work
from .results_file import Work

# Bytes of a number, of precisions that a peer can have without the bundle holding a graph in them.
_WIDTHS: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def work_counter(bundle: Bundle, prompts: Sequence[str]) -> Callable[[Case], Mapping[str, Work]]:
    """A function that counts the work of a case's run, by component.

    Graphs are the plain ones of the bundle, whatever runs them: of the case's precision, or where the bundle has none
    of it, as for a peer's, of its best one, with bytes of the case's. Texts are encoded in every run, as in timed ones.

    Where the calls of a run differ, as when guidance ends early, a component's figures are the means of its calls.

    Args:
        prompts: of the runs; a run draws as many as its batch, and begins again where there are fewer.

    Raises (the function):
        UsageError: the settings do not fit the bundle.
        ArtifactError: a graph is damaged.
        ExportError: a graph cannot be counted.
    """

    @cache
    def graph(component: str, precision: str) -> ir.Model:
        path = bundle.graph(component, precision)
        try:
            return ir.load(path)
        except Exception as err:
            raise ArtifactError(f"{path}: expected an ONNX graph, got {err}. Export the component again.") from err

    @cache
    def counted(component: str, precision: str, shapes: Shapes) -> GraphWork:
        return graph_work(graph(component, precision), dict(shapes))

    @cache
    def drawn(precision: str, width: int, height: int, batch: int, settings: Settings) -> Mapping[str, Work]:
        calls: dict[str, list[GraphWork]] = {}

        def wrap(component: str, _opened: Callable[[], Session]) -> Session:
            held = bundle.precision_of(component, precision) or precision

            def count(shapes: Shapes) -> GraphWork:
                work = counted(component, held, shapes)
                calls.setdefault(DERIVED.get(component, component), []).append(work)
                return work

            return _Counting(component, graph(component, held), count)

        pipeline = wrapped_pipeline(bundle, precision, wrap, verify=False)
        pipeline(
            Request(
                prompt=[prompts[index % len(prompts)] for index in range(batch)],
                width=width,
                height=height,
                sampler=settings.sampler,
                schedule=settings.schedule,
                steps=settings.steps,
                guidance=settings.guidance,
                guidance_interval=settings.guidance_interval,
                safety_checker=False,
            )
        )
        return {component: _mean(works) for component, works in calls.items()}

    def count(case: Case) -> Mapping[str, Work]:
        subject, held = case.subject, bundle.precisions()
        if not held:
            raise UsageError(f"{bundle.path}: expected all that a text-to-image run takes, got {bundle.components()}.")
        known = subject.precision in held
        precision = subject.precision if known else held[0]
        work = drawn(precision, subject.width, subject.height, subject.batch, case.settings)
        if known or precision not in _WIDTHS or subject.precision not in _WIDTHS:
            return work
        return {name: _retyped(each, _WIDTHS[precision], _WIDTHS[subject.precision]) for name, each in work.items()}

    return count


class _Counting:
    """A session that computes nothing."""

    backend = "none"

    def __init__(self, component: str, model: ir.Model, count: Callable[[Shapes], GraphWork]) -> None:
        self._component, self._model, self._count = component, model, count

    @cached_property
    def spec(self) -> ModelSpec:
        graph = self._model.graph
        inputs, outputs = (
            graph_tensors(ir.to_proto(value) for value in values) for values in (graph.inputs, graph.outputs)
        )
        return ModelSpec(self._component, inputs, outputs)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        work = self._count(tuple((name, np.shape(value)) for name, value in feeds.items()))
        return {name: _anything(shape, dtype) for name, (shape, dtype) in work.outputs.items()}

    def close(self) -> None:
        """Nothing is held."""


def _anything(shape: tuple[int, ...], dtype: str) -> Array:
    """Finite numbers that differ, so that nobody takes them for a failed run or a black picture."""
    numbers = np.arange(251) if np.dtype(dtype).kind in "iu" else np.linspace(-1, 1, 251)
    return np.resize(numbers, shape).astype(dtype)


def _mean(works: Sequence[GraphWork]) -> Work:
    count = len(works)
    return Work(
        flops=round(sum(work.flops for work in works) / count),
        weight_bytes=round(sum(work.weight_bytes for work in works) / count),
        activation_bytes=round(sum(work.activation_bytes for work in works) / count),
        calls=count,
    )


def _retyped(work: Work, from_width: int, to_width: int) -> Work:
    return Work(
        flops=work.flops,
        weight_bytes=work.weight_bytes * to_width // from_width,
        activation_bytes=work.activation_bytes * to_width // from_width,
        calls=work.calls,
    )
