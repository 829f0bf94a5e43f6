"""CLIP's text encoder: token ids to the embeddings that the U-Net attends to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from latentrt.runtime.specs import ModelSpec, TensorSpec

from .component import Component


class TextEncoder(nn.Module):
    """The encoder with every hidden state as an output, because clip skip reads an earlier one.

    The causal mask is handed over as a constant. Built by the model itself, it is a boolean expanded to the batch
    at run time, and the exporter guards its softmax against rows without any token, which causal masks do not have.
    """

    causal_mask: torch.Tensor

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        length = text_encoder.config.max_position_embeddings
        mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("causal_mask", mask, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(b, 77) int64 to last_hidden_state (b, 77, d), pooler_output (b, d) and hidden states (b, 77, d)."""
        out = self.text_encoder(input_ids, attention_mask=self.causal_mask, output_hidden_states=True)
        return (out.last_hidden_state, out.pooler_output, *out.hidden_states)


class TextEncoderWithProjection(TextEncoder):
    """The encoder of SDXL whose pooled text conditions the U-Net."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(b, 77) int64 to text_embeds (b, p), last_hidden_state (b, 77, d) and hidden states (b, 77, d)."""
        out = self.text_encoder(input_ids, attention_mask=self.causal_mask, output_hidden_states=True)
        return (out.text_embeds, out.last_hidden_state, *out.hidden_states)


def text_encoder_component(text_encoder: Any) -> Component:
    """Wrap a transformers `CLIPTextModel` (float32, eval).

    hidden_states.0 is the embedding, hidden_states.N the last layer's output before the final LayerNorm.
    """
    width = int(text_encoder.config.hidden_size)
    pooled = TensorSpec("pooler_output", "float32", ("batch", width))
    return _component("text_encoder", TextEncoder(text_encoder), lambda last: (last, pooled))


def text_encoder_2_component(text_encoder: Any) -> Component:
    """Wrap a transformers `CLIPTextModelWithProjection` (float32, eval); hidden states as above."""
    projected = TensorSpec("text_embeds", "float32", ("batch", int(text_encoder.config.projection_dim)))
    return _component("text_encoder_2", TextEncoderWithProjection(text_encoder), lambda last: (projected, last))


def _component(name: str, module: TextEncoder, heads: Callable[[TensorSpec], tuple[TensorSpec, ...]]) -> Component:
    text_encoder = module.text_encoder
    config = text_encoder.config
    length, width = int(config.max_position_embeddings), int(config.hidden_size)
    states = [f"hidden_states.{index}" for index in range(config.num_hidden_layers + 1)]
    ids = torch.arange(2 * length).remainder(config.vocab_size).reshape(2, length)
    return Component(
        module=module.eval(),
        example_inputs={"input_ids": ids},
        spec=ModelSpec(
            name=name,
            inputs=(TensorSpec("input_ids", "int64", ("batch", length)),),
            outputs=(
                *heads(TensorSpec("last_hidden_state", "float32", ("batch", length, width))),
                *(TensorSpec(name, "float32", ("batch", length, width)) for name in states),
            ),
        ),
    )
