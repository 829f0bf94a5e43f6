"""The networks of a pipeline, opened already, on a clock: the same sessions in another pipeline, every call timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from latentrt.runtime.components import PICTURES, Components
from latentrt.runtime.specs import Array, Session
from latentrt.runtime.text_chunks import TextChunk
from latentrt.runtime.text_encoding import PromptEncoder, TextEncoder
from latentrt.runtime.textual_inversion import TextualInversion
from latentrt.runtime.tokenizer import ClipTokenizer
from latentrt.runtime.wrapped_session import WrappedSession

from .stage_clock import StageClock

if TYPE_CHECKING:
    from latentrt.runtime.engine_host import EngineHost

_STAGE_OF = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
    "unet": "unet",
    "vae_decoder": "vae_decoder",
    PICTURES: "vae_decoder",
}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class _TimedEncoder(TextEncoder):
    """A text encoder that cuts texts into rows of tokens on a clock."""

    clock: StageClock

    def chunks(self, text: str, *, attention: bool = True) -> tuple[TextChunk, ...]:
        return self.clock.time("tokenize", partial(super().chunks, text, attention=attention))


class TimedComponents(Components):
    """Another's networks and tokenizers, timed: by `STAGES` of `results` whatever is one of them.

    Args:
        plain: whose they are. It opens and closes them.
        clock: is told of every call.
    """

    def __init__(self, plain: Components, clock: StageClock) -> None:
        super().__init__(plain.bundle, plain.precision, backend=plain.backend, verify=False)
        self.residency, self.loras, self.gate = plain.residency, plain.loras, plain.gate
        self._plain, self._clock = plain, clock

    def __getitem__(self, component: str) -> Session:
        """The session of a component."""
        session, stage = self._plain[component], _STAGE_OF.get(component)
        if stage is None:
            return session

        def timed(session: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
            return self._clock.time(stage, partial(session, feeds))

        return WrappedSession(session, timed)

    @property
    def host(self) -> EngineHost | None:
        """What its engines share."""
        return self._plain.host

    @property
    def picture_decoder(self) -> str:
        """The component that decodes whole pictures."""
        return self._plain.picture_decoder

    def tokenizer(self, folder: str) -> ClipTokenizer:
        """A tokenizer of the bundle."""
        return self._plain.tokenizer(folder)

    def prompt_encoder(self, inversions: Sequence[TextualInversion] = ()) -> PromptEncoder:
        """The text encoders with their tokenizers, both timed."""
        plain = super().prompt_encoder(inversions)
        timed = [
            _TimedEncoder(
                session=encoder.session,
                tokenizer=encoder.tokenizer,
                layer_norm_eps=encoder.layer_norm_eps,
                words=encoder.words,
                eos_row=encoder.eos_row,
                clock=self._clock,
            )
            for encoder in plain.encoders
        ]
        self._encoder = PromptEncoder(timed)
        return self._encoder
