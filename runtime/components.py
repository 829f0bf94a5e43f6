"""A bundle's networks, opened when they are first needed, and its tokenizers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .backends import choose_graph, open_session
from .bundle import DRAWING, Bundle, open_bundle, pipeline_files
from .errors import UsageError
from .prompt_keys import CACHED, PROMPT, SplitUnet, runs_split
from .specs import Session

if TYPE_CHECKING:
    from .text_encoding import PromptEncoder
    from .textual_inversion import TextualInversion

# The VAE's decoder with the U-Net's latents for its input and pictures (b, h, w, 3) uint8 for its output.
PICTURES = "vae_decoder_uint8"


class Components:
    """The sessions of a bundle in one precision.

    Components that a run may do without (the VAE's encoder, ControlNets, the preview decoder) fall back to fp32 if the
    bundle lacks them in that precision. Opening is guarded, so that many threads can share one.

    Args:
        bundle: opened.
        precision: fp32, fp16…; default the first that every component of a run has.
        backend: of `backends.BACKENDS`.
        verify: compare SHA-256 with the manifest before a file is loaded.

    Raises:
        UsageError: the bundle lacks that precision.
    """

    def __init__(self, bundle: Bundle, precision: str | None, *, backend: str = "auto", verify: bool = True) -> None:
        held = bundle.precisions()
        if precision is None and not held:
            raise UsageError(
                f"{bundle.path}: expected text_encoder, unet and vae_decoder in one precision, found none complete. "
                f"Run: latentrt export CHECKPOINT -o {bundle.path}"
            )
        self.bundle, self.backend = bundle, backend
        self.precision = held[0] if precision is None or bundle.manifest is None else precision
        self._verify = verify and bundle.manifest is not None
        self._open: dict[str, Session] = {}
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: str | Path, precision: str | None, *, backend: str, verify: bool) -> Components:
        """Those of the bundle at a path."""
        return cls(open_bundle(Path(path)), precision, backend=backend, verify=verify)

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
                precision = self._precision_of(component)
                if component == "unet" and runs_split(self.bundle, precision, backend=self.backend):
                    self._open[component] = SplitUnet(self[PROMPT], self[CACHED])
                else:
                    self._open[component] = self._session(component, precision)
            return self._open[component]

    def _session(self, component: str, precision: str) -> Session:
        if self._verify:
            target = choose_graph(self.bundle, component, precision, backend=self.backend).target
            self.bundle.check(pipeline_files(self.bundle, precision, [component], target))
        return open_session(self.bundle, component, precision, backend=self.backend)

    @property
    def picture_decoder(self) -> str:
        """The component that decodes whole pictures.

        `vae_decoder_uint8`, whose output needs no more work, where the bundle holds it just as `vae_decoder`.
        """
        precision = self.bundle.precision_of("vae_decoder", self.precision)
        return PICTURES if precision in self.bundle.held(PICTURES) else "vae_decoder"

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

        encoders = []
        for component, folder in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
            if component not in self:
                continue
            config = self.bundle.path / component / "config.json"
            epsilon = self.bundle.config(f"{component}/config.json").get("layer_norm_eps") if config.exists() else None
            session = self[component]
            encoder = TextEncoder(
                session,
                load_tokenizer(self.bundle.path / folder),
                layer_norm_eps=float(epsilon or 1e-5),
            )
            if inversions:
                graph = self.bundle.graph(component, self._precision_of(component))
                providers = session.providers if isinstance(session, OnnxSession) else ("CPUExecutionProvider",)
                encoder = with_textual_inversions(encoder, graph, inversions, component=component, providers=providers)
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
