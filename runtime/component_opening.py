"""How one network of a bundle is opened in a run: in which precision, from which files, with what weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .backends import choose_backend, choose_graph, open_session, provider_of
from .bundle import DRAWING, Bundle, pipeline_files
from .errors import UsageError
from .lora_store import ActiveLora
from .lora_weights import lora_weights, network_of, networks_changed
from .onnx_cuda import PROVIDERS, CudaOptions
from .precisions import QUANTIZED
from .prompt_keys import CACHED, PROMPT, SplitUnet, runs_split
from .residency import SwappedSession
from .session import OnnxSession
from .specs import Array, Refittable, Session

if TYPE_CHECKING:
    from .engine_host import EngineHost


@dataclass(frozen=True, eq=False, kw_only=True)
class ComponentOpening:
    """What all networks of a run are opened with.

    Attributes:
        precision: of the run.
        residency: of `residency_plan.POLICIES`.
        verify: compare SHA-256 with the manifest before a file is read for the first time.
        cuda: how ONNX Runtime's CUDA provider is used, where it is.
        host: what its engines share.
        loras: those at work at the moment that a network is opened.
    """

    bundle: Bundle
    precision: str
    backend: str
    residency: str
    verify: bool
    cuda: CudaOptions | None
    host: EngineHost | None
    loras: Callable[[], Sequence[ActiveLora]]
    _checked: set[str] = field(default_factory=set, init=False, repr=False)

    def precision_of(self, component: str) -> str:
        """The precision of a network: the run's, what stands in for it, or of one that a run may do without any.

        Raises:
            UsageError: the bundle does not hold it; says how to add it.
        """
        precision = self.bundle.precision_of(component, self.precision)
        if precision is not None or component in DRAWING:
            return precision or self.precision
        held = self.bundle.held(component)
        if not held:
            raise UsageError(
                f"{self.bundle.path}: expected {component}, found {', '.join(self.bundle.components())}. "
                f"{_remedy(component)}"
            )
        return held[0]

    def has_engine(self, component: str, precision: str) -> bool:
        """Whether an engine runs it."""
        return bool(choose_backend(self.bundle, component, precision, backend=self.backend, host=self.host).engines)

    def open(self, component: str, opened: Callable[[str], Session]) -> Session:
        """A session of a network, its files compared with the manifest.

        Args:
            opened: gives the session of a network that is a part of this one, where all stay.

        Raises:
            UsageError: the bundle does not hold it; says how to add it.
            ArtifactError: a file of it is missing, damaged or changed.
            BackendError: the backend cannot be used here.
        """
        precision = self.precision_of(component)
        parts = self._parts(component, precision)
        for part in parts:
            self._check_files(part, precision)

        def session() -> Session:
            if parts == (component,):
                return self._session(component, precision)
            # Where networks are swapped, they come and go together.
            stay = self.residency == "all"
            prompt, cached = (opened(part) if stay else self._session(part, precision) for part in parts)
            return SplitUnet(prompt, cached)

        return self._resident(component, session)

    def open_as(self, component: str, graph: Path, model: bytes) -> Session:
        """A session of a network from another graph, given as bytes, with the same external weights; ONNX Runtime's."""
        providers = PROVIDERS if provider_of(self.backend) == "cuda" else PROVIDERS[1:]

        def session() -> Session:
            weights = self.weights(component, graph)
            return OnnxSession(graph, providers=providers, arena=False, model=model, cuda=self.cuda, weights=weights)

        return self._resident(component, session)

    def _resident(self, component: str, open_session: Callable[[], Session]) -> Session:
        """A session that stays, or one that is there for its stages."""
        return open_session() if self.residency == "all" else SwappedSession(component, open_session)

    def changed(self, component: str) -> bool:
        """Whether the LoRAs at work change its weights when it is opened. Quantized ones have theirs in them."""
        return self.takes_loras(component) and network_of(component) in networks_changed(self.loras())

    def takes_loras(self, component: str) -> bool:
        """Whether its weights can be changed."""
        return self.precision_of(component) not in QUANTIZED

    def weights(self, component: str, graph: Path, *, also: Iterable[ActiveLora] = ()) -> Mapping[str, Array]:
        """What LoRAs make of a graph's weights: those at work, and as they are without them where others did."""
        return lora_weights(self.loras(), graph, component, also=also) if self.takes_loras(component) else {}

    def _parts(self, component: str, precision: str) -> tuple[str, ...]:
        """The networks that a component is made of here."""
        split = component == "unet" and runs_split(self.bundle, precision, backend=self.backend)
        return (PROMPT, CACHED) if split and not self.has_engine("unet", precision) else (component,)

    def _session(self, component: str, precision: str) -> Session:
        session = open_session(
            self.bundle,
            component,
            precision,
            backend=self.backend,
            cuda=self.cuda,
            host=self.host,
            verify=self.verify,
            changes=lambda graph: self.weights(component, graph),
        )
        if isinstance(session, Refittable) and self.changed(component):
            session.refit(self.weights(component, self.bundle.graph(component, precision)))
        return session

    def _check_files(self, component: str, precision: str) -> None:
        """Compare a graph with the manifest before it is read for the first time. Engines look after themselves."""
        if not self.verify or component in self._checked or self.has_engine(component, precision):
            return
        target = choose_graph(self.bundle, component, precision, backend=self.backend).target
        self.bundle.check(pipeline_files(self.bundle, precision, [component], target))
        self._checked.add(component)


def _remedy(component: str) -> str:
    if component.startswith(("controlnet", "unet_control")):
        return "Export the checkpoint again with --controlnet PATH."
    if component == "taesd_decoder":
        return "Export the checkpoint again with --taesd PATH."
    if component == "safety_checker":
        return "Export a checkpoint that has one, or draw without it."
    return "Export the checkpoint again."
