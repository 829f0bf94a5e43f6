"""A bundle's networks, opened when they are first needed, and its tokenizers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .backends import Changes, choose_backend, choose_graph, default_precision, open_session, provider_of
from .bundle import DRAWING, Bundle, open_bundle, pipeline_files
from .errors import UsageError
from .lora_store import ActiveLora, Wanted, open_loras
from .lora_weights import lora_weights, network_of, networks_changed
from .onnx_cuda import PROVIDERS, CudaOptions, cuda_note
from .prompt_keys import CACHED, PROMPT, SplitUnet, runs_split
from .residency import SwappedSession, choose_residency
from .specs import Noting, Refittable, Session, closed_error

if TYPE_CHECKING:
    from .engine_host import EngineHost
    from .text_encoding import PromptEncoder
    from .textual_inversion import TextualInversion
    from .tokenizer import ClipTokenizer

# The VAE's decoder with the U-Net's latents for its input and pictures (b, h, w, 3) uint8 for its output.
PICTURES = "vae_decoder_uint8"


class Components:
    """The sessions of a bundle in one precision.

    Components that a run may do without (the VAE's encoder, ControlNets, the preview decoder) fall back to fp32 if the
    bundle lacks them in that precision. Opening is guarded, so that many threads can share one.

    Args:
        bundle: opened.
        precision: fp32, fp16…; default that of the U-Net's engines, else the first that every component of a run has.
        backend: of `backends.BACKENDS`.
        verify: compare SHA-256 with the manifest before a file is loaded.
        residency: of `residency.CHOICES`: whether a network stays in memory once it was opened, or for its stage only.
        cuda: how ONNX Runtime's CUDA provider is used, where it is.
        host: what its engines share; by default the first GPU, one call at a time.
        loras: of the bundle, by name, with scales or each with its own.

    Raises:
        UsageError: the bundle lacks that precision or LoRA, or no such policy, or not with this backend.
    """

    def __init__(
        self,
        bundle: Bundle,
        precision: str | None,
        *,
        backend: str = "auto",
        verify: bool = True,
        residency: str = "all",
        cuda: CudaOptions | None = None,
        host: EngineHost | None = None,
        loras: Wanted = (),
    ) -> None:
        held = bundle.precisions()
        if precision is None and not held:
            raise UsageError(
                f"{bundle.path}: expected text_encoder, unet and vae_decoder in one precision, found none complete. "
                f"Run: latentrt export CHECKPOINT -o {bundle.path}"
            )
        if host is None and bundle.manifest is not None and bundle.manifest.engines:
            from .engine_host import EngineHost

            host = EngineHost(weight_budget=0 if residency == "stream" else None)
        self.bundle, self.backend, self._host = bundle, backend, host
        if precision is None or bundle.manifest is None:
            precision = default_precision(bundle, backend=backend, host=host)
        self.precision = precision
        self.residency = choose_residency(residency, bundle, self.precision, backend=backend)
        self._cuda = cuda
        self._verify = verify and bundle.manifest is not None
        self.loras = open_loras(bundle, loras, verify=self._verify)
        self._open: dict[str, Session] = {}
        self._tokenizers: dict[str, ClipTokenizer] = {}
        self._checked: set[str] = set()
        self._closed = False
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        path: str | Path,
        precision: str | None,
        *,
        backend: str,
        verify: bool,
        residency: str = "all",
        cuda: CudaOptions | None = None,
        host: EngineHost | None = None,
        loras: Wanted = (),
    ) -> Components:
        """Those of the bundle at a path."""
        return cls(
            open_bundle(Path(path)),
            precision,
            backend=backend,
            verify=verify,
            residency=residency,
            cuda=cuda,
            host=host,
            loras=loras,
        )

    def __contains__(self, component: str) -> bool:
        """Whether the bundle holds a component, in any precision."""
        return bool(self.bundle.held(component))

    def __getitem__(self, component: str) -> Session:
        """The session of a component.

        Raises:
            UsageError: the bundle does not hold it; says how to add it.
            ArtifactError: a file of it is missing, damaged or changed.
            BackendError: the backend cannot be used here.
        """
        with self._lock:
            if component not in self._open:
                if self._closed:
                    raise closed_error(component)
                precision = self._precision_of(component)
                for part in self._parts(component, precision):
                    self._check_files(part, precision)
                self._open[component] = self._resident(component, lambda: self._network(component, precision))
            return self._open[component]

    def _resident(self, component: str, open_session: Callable[[], Session]) -> Session:
        """A session that stays, or one that is there for its stages."""
        return open_session() if self.residency == "all" else SwappedSession(component, open_session)

    def _parts(self, component: str, precision: str) -> tuple[str, ...]:
        """The networks that a component is made of here."""
        split = component == "unet" and runs_split(self.bundle, precision, backend=self.backend)
        return (PROMPT, CACHED) if split and not self._has_engine("unet", precision) else (component,)

    def _network(self, component: str, precision: str) -> Session:
        parts = self._parts(component, precision)
        if parts == (component,):
            return self._session(component, precision)
        # Where networks are swapped, they come and go together.
        prompt, cached = (self[part] if self.residency == "all" else self._session(part, precision) for part in parts)
        return SplitUnet(prompt, cached)

    def _session(self, component: str, precision: str) -> Session:
        session = open_session(
            self.bundle,
            component,
            precision,
            backend=self.backend,
            cuda=self._cuda,
            host=self._host,
            verify=self._verify,
            changes=self._changes(component),
        )
        if isinstance(session, Refittable) and network_of(component) in networks_changed(self.loras):
            session.refit(self._changes(component)(self.bundle.graph(component, precision)))
        return session

    def _changes(self, component: str) -> Changes:
        """What the LoRAs of the moment make of a graph's weights, whenever it is opened."""
        return lambda graph: lora_weights(self.loras, graph, component)

    def set_loras(self, wanted: Wanted) -> set[str]:
        """Put LoRAs in the place of those at work. No run may be under way.

        Networks that are open and change are opened again, or refitted where they run from engines.

        Returns:
            The networks that they change, those at work before included.

        Raises:
            UsageError: the bundle holds none of that name, a scale is not finite, or an engine takes no new weights.
            ArtifactError: a LoRA is damaged, or was added for another model. Those at work before stay.
            BackendError: the backend failed.
        """
        with self._lock:
            before, loras = self.loras, open_loras(self.bundle, wanted, verify=self._verify)
            changed, held = networks_changed((*before, *loras)), dict(self._open)
            mine = [component for component in held if network_of(component) in changed]
            engines = [component for component in mine if isinstance(held[component], Refittable)]
            again = [component for component in mine if component not in engines]
            # Prompt encoders hold theirs: these stay until all went well. The others are too large to be there twice:
            # after an error they are opened when they are needed.
            kept = {component: held[component] for component in again if component.startswith("text_encoder")}
            self.loras = loras
            refitted: list[str] = []
            try:
                for component in engines:
                    self._refit(component, before)
                    refitted.append(component)
                for component in again:
                    session = self._open.pop(component)
                    if component not in kept:
                        session.close()
                for component in again:
                    self[component]
            except BaseException:
                self.loras = before
                for component in refitted:
                    self._refit(component, loras)
                for component in again:
                    if self._open.get(component, held[component]) is not held[component]:
                        self._open.pop(component).close()
                self._open |= kept
                raise
            for session in kept.values():
                session.close()
        return changed

    def _refit(self, component: str, replaced: Iterable[ActiveLora]) -> None:
        """Give an open engine the weights that LoRAs make, and its own where only those that are replaced did."""
        session, graph = self._open[component], self.bundle.graph(component, self._precision_of(component))
        assert isinstance(session, Refittable)
        session.refit(lora_weights(self.loras, graph, component, also=replaced))

    def _check_files(self, component: str, precision: str) -> None:
        """Compare a graph with the manifest before it is read for the first time. Engines look after themselves."""
        if not self._verify or component in self._checked or self._has_engine(component, precision):
            return
        target = choose_graph(self.bundle, component, precision, backend=self.backend).target
        self.bundle.check(pipeline_files(self.bundle, precision, [component], target))
        self._checked.add(component)

    def _has_engine(self, component: str, precision: str) -> bool:
        choice = choose_backend(self.bundle, component, precision, backend=self.backend, host=self._host)
        return bool(choice.engines)

    def notes(self) -> tuple[str, ...]:
        """What of the components that were opened is not as it was to be, and why, for people."""
        with self._lock:
            held = dict(self._open)
        ran = {name: each for name, each in held.items() if not isinstance(each, SwappedSession) or each.has_run}
        found = [note for session in ran.values() if isinstance(session, Noting) for note in session.notes]
        if self.backend == "auto":
            # Engines are built together: what is wrong with the U-Net's is wrong with the others.
            reasons = [self._why_no_engine("unet") if "unet" in ran else None]
            if any(session.backend == "onnxruntime CPU" for session in ran.values()):
                reasons.append(cuda_note())
            found += [reason for reason in reasons if reason is not None]
        return tuple(dict.fromkeys(found))

    def _why_no_engine(self, component: str) -> str | None:
        """Why none of the bundle's engines of a component is used although there is a GPU; None if there is no such."""
        precision = self._precision_of(component)
        engines = self.bundle.manifest.engines if self.bundle.manifest is not None else ()
        built = [engine.precision for engine in engines if engine.component == component]
        if not built or self._host is None or not self._host.machine.gpus:
            return None
        held = precision if precision in built else built[0]
        choice = choose_backend(self.bundle, component, held, backend=self.backend, host=self._host)
        if choice.engines:
            return None if held == precision else f"{component}: its engines are in {held}, and this run in {precision}"
        return f"{component}: {choice.reason}"

    def close(self) -> None:
        """Give back what the networks hold, when the calls under way are done. Components are not opened again."""
        with self._lock:
            self._closed = True
            for session in self._open.values():
                session.close()

    @property
    def picture_decoder(self) -> str:
        """The component that decodes whole pictures.

        `vae_decoder_uint8`, whose output needs no more work, where the bundle holds it just as `vae_decoder`; but not
        where only that one has an engine.
        """
        precision = self.bundle.precision_of("vae_decoder", self.precision)
        if precision is None or precision not in self.bundle.held(PICTURES):
            return "vae_decoder"
        if self._has_engine("vae_decoder", precision) and not self._has_engine(PICTURES, precision):
            return "vae_decoder"
        return PICTURES

    def precisions(self) -> dict[str, str]:
        """Of the components that were opened: the run's, mixed where fp16 would overflow, or what the bundle holds."""
        with self._lock:
            return {component: self._precision_of(component) for component in self._open}

    def _precision_of(self, component: str) -> str:
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

    def prompt_encoder(self, inversions: Sequence[TextualInversion] = ()) -> PromptEncoder:
        """The text encoders with their tokenizers.

        Args:
            inversions: words to add to them; their encoders then run with ONNX Runtime.

        Raises:
            ArtifactError: a tokenizer is missing or damaged.
            UsageError: a textual inversion is for another model.
        """
        from .session import OnnxSession
        from .text_encoding import PromptEncoder, TextEncoder
        from .textual_inversion import with_textual_inversions
        from .tokenizer import load_tokenizer

        providers = PROVIDERS if provider_of(self.backend) == "cuda" else PROVIDERS[1:]
        encoders = []
        for component, folder in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
            if component not in self:
                continue
            config = self.bundle.path / component / "config.json"
            epsilon = self.bundle.config(f"{component}/config.json").get("layer_norm_eps") if config.exists() else None
            session = self[component]
            if folder not in self._tokenizers:
                self._tokenizers[folder] = load_tokenizer(self.bundle.path / folder)
            encoder = TextEncoder(session, self._tokenizers[folder], layer_norm_eps=float(epsilon or 1e-5))
            if inversions:
                graph = self.bundle.graph(component, self._precision_of(component))

                def opened(model: bytes, graph: Path = graph, component: str = component) -> Session:
                    def make() -> Session:
                        weights = self._changes(component)(graph)
                        return OnnxSession(
                            graph, providers=providers, arena=False, model=model, cuda=self._cuda, weights=weights
                        )

                    return self._resident(component, make)

                encoder = with_textual_inversions(encoder, graph, inversions, component=component, open_session=opened)
                session.close()
                self._open[component] = encoder.session
            encoders.append(encoder)
        return PromptEncoder(encoders)


def _remedy(component: str) -> str:
    if component.startswith(("controlnet", "unet_control")):
        return "Export the checkpoint again with --controlnet PATH."
    if component == "taesd_decoder":
        return "Export the checkpoint again with --taesd PATH."
    if component == "safety_checker":
        return "Export a checkpoint that has one, or draw without it."
    return "Export the checkpoint again."
