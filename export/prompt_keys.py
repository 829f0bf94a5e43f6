"""Cross-attention's keys and values of a prompt as a graph of their own, run once a prompt instead of every step.

A U-Net projects the same text in every step. Here it is split in two:

    unet_prompt    encoder_hidden_states -> <block>.attn2.key and .value of every cross-attention
    unet_cached    sample, timestep, [text_embeds, time_ids, timestep_cond] and those -> out_sample

Both consist of the U-Net's own nodes and weights, and no weight is in both: saved beside it as references to its
external data, they add nothing to it.

What it saves is little, because the text is short: 0.4 % of the operations of a step of SD 1.5 at 512 pixels, 0.9 % of
SDXL's at 1024 pixels, and more for smaller pictures. What is kept for it takes, for each row of a call (two for a
guided picture):

    SD 1.5    7.7 MB in fp32,   3.8 MB in fp16
    SDXL     51.3 MB in fp32,  25.6 MB in fp16

A device that does not share the host's memory has to keep these between steps; sent anew every step they cost more
than they save.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from latentrt.runtime.errors import ExportError
from latentrt.runtime.prompt_keys import CACHED, PROMPT

from .attention_pattern import Projection, find_attention
from .graph_matching import producer

TEXT = "encoder_hidden_states"
# The wrapper that a U-Net is traced in holds it by this name.
_ROOT = "unet."


def split_prompt(model: ir.Model) -> tuple[ir.Model, ir.Model]:
    """The graphs `unet_prompt` and `unet_cached` of a U-Net, which stays as it is.

    Keys and values are (b, 77·k, width of the block), as they are projected, in the type that the graph computes in;
    their names are `down_blocks.0.attentions.0.transformer_blocks.0.attn2.key`… What follows is the U-Net's own, so
    that fusions of attention find what they look for and the result is the U-Net's, bit for bit. Keys that are
    transposed and scaled already would save nothing: ONNX Runtime took as long, TensorRT-RTX as many kernels.

    Raises:
        ExportError: the graph has no attention to the text, or uses the text for something else too.
    """
    if not _text_projections(model):
        raise ExportError(
            f"{model.graph.name}: expected attention to {TEXT}, found none. "
            "Split a graph before its attention is fused, packed or quantized."
        )
    return _prompt_graph(model), _cached_graph(model)


def _text_projections(model: ir.Model) -> dict[str, Projection]:
    """The projections of the text, by the names of what they give."""
    found = {}
    for attention in find_attention(model):
        name = attention.name.removeprefix(_ROOT)
        for kind, operand in (("key", attention.key), ("value", attention.value)):
            if name and _is_text(operand.projection.source):
                found[f"{name}.{kind}"] = operand.projection
    return found


def _is_text(value: ir.Value) -> bool:
    """Whether a value is the text, cast at most."""
    cast = producer(value, "Cast")
    text = value if cast is None else cast.inputs[0]
    return text is not None and text.is_graph_input() and text.name == TEXT


def _text_of(graph: ir.Graph) -> ir.Value:
    return next(value for value in graph.inputs if value.name == TEXT)


def _prompt_graph(model: ir.Model) -> ir.Model:
    """The U-Net with nothing left but the projections."""
    prompt = model.clone()
    graph = prompt.graph
    graph.name = PROMPT
    graph.outputs.clear()
    for name, projection in _text_projections(prompt).items():
        output = projection.output
        output.name, output.shape = name, _shape(_text_of(graph), projection)
        graph.outputs.append(output)
    RemoveUnusedNodesPass()(prompt)
    for value in [value for value in graph.inputs if value.name != TEXT]:
        graph.inputs.remove(value)
    return prompt


def _cached_graph(model: ir.Model) -> ir.Model:
    """The U-Net with keys and values as inputs in the place of the text."""
    cached = model.clone()
    graph = cached.graph
    graph.name = CACHED
    text = _text_of(graph)
    for name, projection in _text_projections(cached).items():
        output = projection.output
        given = ir.Value(name=name, type=output.type, shape=_shape(text, projection))
        graph.inputs.append(given)
        output.replace_all_uses_with(given)
    RemoveUnusedNodesPass()(cached)
    if readers := [str(node.name) for node in text.consumers()]:
        raise ExportError(
            f"{model.graph.name}: expected {TEXT} in cross-attention only, got it read by {', '.join(readers[:3])}. "
            "Export this checkpoint without its prompt's keys."
        )
    graph.inputs.remove(text)
    return cached


def _shape(text: ir.Value, projection: Projection) -> ir.Shape:
    batch, length = list(text.shape)[:2] if text.shape is not None else (None, None)
    return ir.Shape([batch, length, projection.sizes[1]])
