"""The VAE's decoder with the host's work before and after it inside its graph: latents in, uint8 pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from latentrt.runtime.components import PICTURES
from latentrt.runtime.errors import ExportError


class PictureOutputPass(InPlacePass):
    """Let a VAE decoder take the U-Net's latents and give pictures.

        before   latent_sample (b, c, h/8, w/8), unscaled -> ... -> sample (b, 3, h, w) float32 in [-1, 1]
        after    latent_sample, scaled -> Div by scaling_factor -> ... -> picture (b, h, w, 3) uint8
                                                                        -> finite (b,) bool

    Three bytes a pixel leave the device instead of twelve. They are those that the runtime makes of `sample`: the same
    operations in float32, with ties rounded to even. Its division is not folded into the first convolution, nor made
    a multiplication, because neither gives the same bits. `finite` takes the place of the runtime's check of `sample`:
    a uint8 cannot be NaN.

    Works on every precision, since all have float32 inputs and outputs. The weights are not touched, so the graph can
    share the other's external data.

    Args:
        scaling_factor: of the VAE.
        shift_factor: likewise.
        latents_mean: per channel, of VAEs that normalise their latents; it then stands in for shift_factor.
        latents_std: likewise.

    Raises:
        ExportError: the graph is no VAE decoder.
    """

    def __init__(
        self,
        scaling_factor: float,
        shift_factor: float = 0.0,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.scaling, self.shift = scaling_factor, shift_factor
        self.mean, self.std = latents_mean, latents_std

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite; `modified` is always True."""
        graph = model.graph
        names = [value.name for value in graph.inputs], [value.name for value in graph.outputs]
        if names != (["latent_sample"], ["sample"]) or graph.outputs[0].dtype != ir.DataType.FLOAT:
            raise ExportError(
                f"{PICTURES}: expected a decoder from latent_sample to sample in float32, got one from {names[0]} to "
                f"{names[1]} in {graph.outputs[0].dtype}."
            )
        self._unscale(graph)
        _round(graph)
        graph.name = PICTURES
        return PassResult(model, modified=True)

    def _unscale(self, graph: ir.Graph) -> None:
        latents = graph.inputs[0]
        readers = [*latents.uses()]
        tape = Tape()
        plain = latents
        if self.mean is not None and self.std is not None:
            plain = tape.op("Mul", [plain, _constant(tape, _per_channel(self.std), "latents_std")])
        plain = tape.op("Div", [plain, _constant(tape, np.float32(self.scaling), "scaling_factor")])
        if self.mean is not None and self.std is not None:
            plain = tape.op("Add", [plain, _constant(tape, _per_channel(self.mean), "latents_mean")])
        elif self.shift:
            plain = tape.op("Add", [plain, _constant(tape, np.float32(self.shift), "shift_factor")])
        _declare(tape, ir.DataType.FLOAT)
        for node, index in readers:
            node.replace_input_with(index, plain)
        for initializer in tape.initializers:
            graph.register_initializer(initializer)
        graph.insert_before(graph[0], tape.nodes)


def _round(graph: ir.Graph) -> None:
    sample = graph.outputs[0]
    batch, channels, height, width = sample.shape or (None, None, None, None)
    tape = Tape(graph)
    half, one, zero, white, largest = (
        _constant(tape, np.float32(number), f"picture_{name}")
        for name, number in (
            ("half", 0.5),
            ("one", 1),
            ("zero", 0),
            ("white", 255),
            ("largest", np.finfo(np.float32).max),
        )
    )
    unit = tape.op("Clip", [tape.op("Add", [tape.op("Mul", [sample, half]), half]), zero, one])
    last = tape.op("Transpose", [unit], {"perm": [0, 2, 3, 1]})
    rounded = tape.op("Round", [tape.op("Mul", [last, white])])
    within = tape.op("LessOrEqual", [tape.op("Abs", [sample]), largest])
    axes = _constant(tape, np.array([1, 2, 3]), "picture_axes")
    whole = tape.op("ReduceMin", [tape.op("Cast", [within], {"to": ir.DataType.FLOAT}), axes], {"keepdims": 0})
    _declare(tape, ir.DataType.FLOAT)
    within.type = ir.TensorType(ir.DataType.BOOL)
    # The Casts come last: TensorRT has 8-bit numbers at its borders only.
    picture = tape.op("Cast", [rounded], {"to": ir.DataType.UINT8})
    finite = tape.op("Cast", [whole], {"to": ir.DataType.BOOL})
    picture.name, picture.type = "picture", ir.TensorType(ir.DataType.UINT8)
    picture.shape = ir.Shape([batch, height, width, channels])
    finite.name, finite.type, finite.shape = "finite", ir.TensorType(ir.DataType.BOOL), ir.Shape([batch])
    graph.outputs[:] = [picture, finite]


def _declare(tape: Tape, dtype: ir.DataType) -> None:
    for node in tape.nodes:
        node.outputs[0].type = ir.TensorType(dtype)


def _constant(tape: Tape, values: NDArray[Any] | np.generic, name: str) -> ir.Value:
    return tape.initializer(ir.tensor(np.asarray(values), name=name))


def _per_channel(values: Sequence[float]) -> NDArray[np.float32]:
    return np.asarray(values, np.float32).reshape(1, -1, 1, 1)
