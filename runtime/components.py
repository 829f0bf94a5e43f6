"""A bundle's networks, opened when they are first needed, and its tokenizers."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .backends import default_precision
from .bundle import Bundle, open_bundle
from .component_notes import opened_notes
from .component_opening import ComponentOpening
from .errors import UsageError
from .lora_store import ActiveLora, Wanted
from .lora_weights import network_of, networks_changed
from .onnx_cuda import CudaOptions
from .residency import choose_residency
from .run_gate import RunGate
from .run_loras import lora_note, loras_of_run
from .specs import Refittable, Session, closed_error

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

            host = EngineHost(weight_budget="room" if residency == "stream" else None)
        if precision is None or bundle.manifest is None:
            precision = default_precision(bundle, backend=backend, host=host)
        verify = verify and bundle.manifest is not None
        self.bundle, self.backend, self.precision = bundle, backend, precision
        self.residency = choose_residency(residency, bundle, precision, backend=backend)
        self.loras = loras_of_run(bundle, precision, loras, verify=verify)
        self.gate = RunGate()
        self._opening = ComponentOpening(
            bundle=bundle,
            precision=precision,
            backend=backend,
            residency=self.residency,
            verify=verify,
            cuda=cuda,
            host=host,
            loras=lambda: self.loras,
        )
        self._open: dict[str, Session] = {}
        self._tokenizers: dict[str, ClipTokenizer] = {}
        self._encoder: PromptEncoder | None = None
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

    @property
    def host(self) -> EngineHost | None:
        """What its engines share; None where the bundle has none."""
        return self._opening.host

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
                self._open[component] = self._opening.open(component, self.__getitem__)
            return self._open[component]

    def set_loras(self, wanted: Wanted) -> set[str]:
        """Put LoRAs in the place of those at work. No run may be under way: see `gate`.

        Networks that are open and change are opened again, or refitted where they run from engines.

        Returns:
            The networks that they change, those at work before included.

        Raises:
            UsageError: the bundle holds none of that name, a scale is not finite, an engine takes no new weights, or
                the U-Net is quantized and was calibrated with others.
            ArtifactError: a LoRA is damaged, or was added for another model. Those at work before stay.
            BackendError: the backend failed.
        """
        with self._lock:
            before = self.loras
            loras = loras_of_run(self.bundle, self.precision, wanted, verify=self._opening.verify)
            changed, held = networks_changed((*before, *loras)), dict(self._open)
            mine = [name for name in held if network_of(name) in changed and self._opening.takes_loras(name)]
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
        session, graph = self._open[component], self.bundle.graph(component, self._opening.precision_of(component))
        assert isinstance(session, Refittable)
        session.refit(self._opening.weights(component, graph, also=replaced))

    def notes(self) -> tuple[str, ...]:
        """What of the components that were opened is not as it was to be, and why, for people."""
        with self._lock:
            held = dict(self._open)
        found = opened_notes(self._opening, held)
        loras = lora_note(self.bundle, self.precision)
        return found if loras is None else (*found, loras)

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
        if self._opening.has_engine("vae_decoder", precision) and not self._opening.has_engine(PICTURES, precision):
            return "vae_decoder"
        return PICTURES

    def precisions(self) -> dict[str, str]:
        """Of the components that were opened: the run's, what stands in for it, or what the bundle holds."""
        with self._lock:
            return {component: self._opening.precision_of(component) for component in self._open}

    def tokenizer(self, folder: str) -> ClipTokenizer:
        """A tokenizer of the bundle, read once.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        from .tokenizer import load_tokenizer

        with self._lock:
            if folder not in self._tokenizers:
                self._tokenizers[folder] = load_tokenizer(self.bundle.path / folder)
            return self._tokenizers[folder]

    def graph_path(self, component: str) -> Path:
        """The .onnx file that every runtime takes of a component, in the precision that it has here."""
        return self.bundle.graph(component, self._opening.precision_of(component))

    def open_as(self, component: str, model: bytes) -> Session:
        """A session of a component from another graph with the same external weights; ONNX Runtime's."""
        return self._opening.open_as(component, self.graph_path(component), model)

    def replace(self, component: str, session: Session) -> None:
        """Put a session in the place of the one that is open."""
        with self._lock:
            self[component].close()
            self._open[component] = session

    def prompt_encoder(self, inversions: Sequence[TextualInversion] = ()) -> PromptEncoder:
        """The text encoders with their tokenizers.

        Args:
            inversions: words to add to them; their encoders then run with ONNX Runtime.

        Raises:
            ArtifactError: a tokenizer is missing or damaged.
            UsageError: a textual inversion is for another model.
        """
        from .prompt_encoders import open_prompt_encoder

        self._encoder = open_prompt_encoder(self, inversions)
        return self._encoder

    def check_encoder(self, encoder: PromptEncoder) -> None:
        """Refuse text encoders whose networks went over to others.

        Raises:
            UsageError: LoRAs have changed them since.
        """
        if encoder is not self._encoder:
            raise UsageError(
                "loras: expected the pipeline that the last with_loras returned, got one from before. Its networks "
                "went over: draw with that one."
            )
