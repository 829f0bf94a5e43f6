"""A bundle's text encoders with their tokenizers, and with words that textual inversions add."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from .text_encoding import PromptEncoder, TextEncoder
from .textual_inversion import TextualInversion, with_textual_inversions

if TYPE_CHECKING:
    from .components import Components


def open_prompt_encoder(components: Components, inversions: Sequence[TextualInversion]) -> PromptEncoder:
    """The text encoders of a bundle. With words to add they run with ONNX Runtime, from a graph that has these.

    Raises:
        ArtifactError: a tokenizer is missing or damaged.
        UsageError: a textual inversion is for another model.
    """
    encoders = []
    for component, folder in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if component not in components:
            continue
        bundle = components.bundle
        has_config = (bundle.path / component / "config.json").exists()
        epsilon = bundle.config(f"{component}/config.json").get("layer_norm_eps") if has_config else None
        session = components[component]
        encoder = TextEncoder(session, components.tokenizer(folder), layer_norm_eps=float(epsilon or 1e-5))
        if inversions:
            encoder = with_textual_inversions(
                encoder,
                components.graph_path(component),
                inversions,
                component=component,
                open_session=partial(components.open_as, component),
            )
            components.replace(component, encoder.session)
        encoders.append(encoder)
    return PromptEncoder(encoders)
