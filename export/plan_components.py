"""What each component of a bundle will take when its engine is built and run: from its graph, or from its engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from latentrt.runtime.bundle import Bundle
from latentrt.runtime.engine_sidecar import EngineSidecar, ShapeProfile, read_sidecar
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.manifest import Manifest
from latentrt.runtime.residency_plan import ComponentMemory
from latentrt.runtime.specs import TensorSpec

from .activation_memory import Activation, estimate_activation
from .build_options import BuildOptions, wanted_components, wanted_shapes
from .build_rates import BuildWork
from .engine_forecast import forecast
from .engine_graph import graph_tensors
from .engine_profiles import largest_shapes, profiles_of
from .engine_store import graph_hashes
from .graph_files import weight_bytes

# What streaming needs of the weights at least: one layer's while the next one's are copied.
_LAYERS_AT_ONCE = 2


@dataclass(frozen=True)
class ComponentPlan:
    """One component at the largest shapes that its engine is to serve.

    Attributes:
        shapes: of its inputs.
        estimate: of the activation memory, from the graph.
        engine: the sidecar of an engine in the bundle for just these shapes, or None.
        memory: on the device; the activation is the builder's figure where there is such an engine.
        engine_bytes: size of the engine's file.
        build_seconds, build_peak_bytes: of its build; None where no build has told.
    """

    component: str
    precision: str
    shapes: Mapping[str, tuple[int, ...]]
    estimate: Activation
    engine: EngineSidecar | None
    memory: ComponentMemory
    engine_bytes: int
    build_seconds: float | None
    build_peak_bytes: int | None

    @property
    def stated(self) -> int | None:
        """The builder's figure of the activation memory; None without an engine."""
        return None if self.engine is None else self.engine.activation_bytes

    @property
    def estimate_error(self) -> float | None:
        """How far the estimate is from the builder's figure, as a part of that; None without one.

        Where the builder may do without side streams, 0 from the least of the estimate to the most.
        """
        if not self.stated:
            return None
        least, most = self.estimate.total - self.estimate.side, self.estimate.total
        return min(max(self.stated, least), most) / self.stated - 1


def plan_components(
    bundle: Bundle,
    options: BuildOptions,
    *,
    flavour: str,
    sm: str | None = None,
    cache: Path | None = None,
    report: Callable[[str], None] = lambda _component: None,
) -> tuple[ComponentPlan, ...]:
    """What the components take that a build with these options would make engines of.

    Nothing is built and no weight is read.

    Args:
        flavour: whose engines count and whose builds are forecast.
        sm: compute capability whose engines are preferred where there are several.
        cache: where this machine's build times are kept.
        report: told of each component before it is planned.

    Raises:
        UsageError: an option is not possible.
        ArtifactError: the bundle or a graph in it is damaged.
        ExportError: a shape in a graph depends on more than the sizes of its inputs.
    """
    if bundle.manifest is None:
        raise UsageError(
            f"{bundle.path}: expected a latentrt bundle, got a folder without a manifest. Run: latentrt export"
        )
    requests, factor = wanted_shapes(bundle, options)
    plans = []
    for component, precision in wanted_components(bundle, options).items():
        report(component)
        model = _load(bundle.graph(component, precision))
        inputs = graph_tensors(ir.to_proto(value) for value in model.graph.inputs)
        profiles = profiles_of(component, inputs, requests, factor=factor)
        shapes = largest_shapes(profiles)
        estimate = estimate_activation(model, _sizes(inputs, shapes), fixed=_fixed(profiles))
        engine = _engine_for(bundle, bundle.manifest, component, precision, profiles, flavour, sm)
        tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
        stated = None if engine is None else engine.activation_bytes
        memory = ComponentMemory(
            component,
            weights=weight_bytes(model),
            activation=estimate.total if stated is None else stated,
            tensors=estimate.outside,
            least_weights=_LAYERS_AT_ONCE * max((tensor.nbytes for tensor in tensors), default=0),
        )
        work = BuildWork(
            flavour=flavour,
            component=component,
            parameters=sum(tensor.size for tensor in tensors),
            weight_bytes=memory.weights,
            nodes=len(model.graph),
            profiles=len(profiles),
        )
        expected = forecast(work, cache, stripped=options.strip)
        plans.append(
            ComponentPlan(
                component=component,
                precision=precision,
                shapes=shapes,
                estimate=estimate,
                engine=engine,
                memory=memory,
                engine_bytes=expected.disk_bytes if engine is None else engine.engine_bytes,
                build_seconds=expected.seconds,
                build_peak_bytes=expected.peak_bytes,
            )
        )
    return tuple(plans)


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as err:
        raise ArtifactError(f"{path}: expected an ONNX graph, got {err}. Export the component again.") from err


def _sizes(inputs: tuple[TensorSpec, ...], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {
        name: size
        for tensor in inputs
        for name, size in zip(tensor.shape, shapes[tensor.name], strict=True)
        if isinstance(name, str)
    }


def _fixed(profiles: Iterable[Mapping[str, ShapeProfile]]) -> bool:
    """Whether no profile leaves a size open."""
    return all(shape.min == shape.max for profile in profiles for shape in profile.values())


def _engine_for(
    bundle: Bundle,
    manifest: Manifest,
    component: str,
    precision: str,
    profiles: tuple[Mapping[str, ShapeProfile], ...],
    flavour: str,
    sm: str | None,
) -> EngineSidecar | None:
    """The engine of the graph as it is now with just these profiles; the card's own before others."""
    found = []
    graph = graph_hashes(manifest, component, precision)
    for record in manifest.engines:
        if (record.component, record.precision, record.flavour) == (component, precision, flavour):
            # A damaged sidecar is for verify to report; the plan has its estimate.
            with suppress(ArtifactError):
                sidecar = read_sidecar(bundle.path / record.sidecar)
                if sidecar.onnx == graph and sidecar.profiles == profiles:
                    found.append(sidecar)
    return max(found, key=lambda sidecar: (sm in sidecar.targets, sidecar.activation_bytes or 0), default=None)
