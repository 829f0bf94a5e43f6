"""The fp32 graph in int8 by ONNX Runtime's own quantizer, with the options whose result TensorRT takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from latentrt.runtime.specs import Array

_OPERATORS = ["Conv", "MatMul", "Gemm"]
# TensorRT takes symmetric pairs in front of what has weights, and nothing else: no int32 biases, no pairs behind
# operators, no attention products.
_TENSORRT = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "MatMulConstBOnly": True,
    "OpTypesToExcludeOutputQuantization": _OPERATORS,
    "DedicatedQDQPair": False,
    "QDQDisableWeightAdjustForInt32Bias": True,
}


@dataclass(frozen=True)
class Peer:
    """How ONNX Runtime's quantizer is run.

    Attributes:
        method: MinMax, Entropy or Percentile, with the quantizer's own settings of each.
        calls: to calibrate with. MinMax reduces tensors in the graph; the others keep every tensor of every call.
        per_channel: scales of the weights by output channel, not one for each tensor.
        same_layers: quantize the layers that latentrt may, not all.
    """

    method: str
    calls: int
    per_channel: bool = True
    same_layers: bool = True


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
    def __init__(self, feeds: Iterable[Mapping[str, Array]]) -> None:
        self._feeds: Iterator[Mapping[str, Array]] = iter(feeds)

    def get_next(self) -> Mapping[str, Array] | None:
        return next(self._feeds, None)


def quantize_peer(
    graph: Path, path: Path, peer: Peer, feeds: Iterable[Mapping[str, Array]], *, kept: frozenset[str]
) -> Path:
    """Quantize a graph.

    Args:
        graph: in fp32.
        path: of the result.
        peer: how.
        feeds: of the network, as many as the peer is to calibrate with.
        kept: names of the weights whose layers are left as they are where the peer has the same layers.
    """
    nodes = onnx.load(graph, load_external_data=False).graph.node
    excluded = [node.name for node in nodes if peer.same_layers and kept & set(node.input)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # It writes beside the graph that it is given.
        given = Path(folder) / graph.name
        onnx.save(onnx.load(graph), given)
        quantize_static(
            given,
            path,
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            nodes_to_exclude=excluded,
            per_channel=peer.per_channel,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[peer.method],
            extra_options=_TENSORRT,
        )
    return path
