"""New weights for a loaded engine, with a Refitter that keeps what it is given in the place of TensorRT's.

Not run on a GPU: that an engine then computes with these weights is left to tests/gpu.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from engine_bundle import unet_graph
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, save

from latentrt.runtime.engine_refit import check_refittable, fill, refit
from latentrt.runtime.errors import ArtifactError, BackendError, UsageError
from latentrt.runtime.specs import Array

KERNEL, TEXT = "conv_in.weight", "to_k.weight"


class FakeWeights:
    """TensorRT's Weights: a type, an address and a count."""

    def __init__(self, dtype: Any, pointer: int, count: int) -> None:
        self.dtype, self.size = dtype, count
        self.content = ctypes.string_at(pointer, count * dtype.itemsize)


class FakeEngine:
    """An engine that holds some weights by name; `merged` ones are taken only together."""

    def __init__(self, weights: Mapping[str, Array], merged: Sequence[str] = ()) -> None:
        self.types = {name: values.dtype for name, values in weights.items()}
        self.weights = {name: values.tobytes() for name, values in weights.items()}
        self.merged = set(merged)
        self.takes = True


class FakeRefitter:
    """Checks what TensorRT's checks; weights are in the engine when it was refitted, not before."""

    NAMES: ClassVar[dict[str, str]] = {
        "float32": "FLOAT",
        "float16": "HALF",
        "uint16": "BF16",
        "int8": "INT8",
        "uint8": "FP8",
    }

    def __init__(self, engine: FakeEngine, logger: Any) -> None:
        self.engine, self.given = engine, dict[str, bytes]()

    def get_all_weights(self) -> list[str]:
        return list(self.engine.weights)

    def get_missing_weights(self) -> list[str]:
        touched = self.engine.merged & self.given.keys()
        return sorted(self.engine.merged - self.given.keys()) if touched else []

    def get_weights_prototype(self, name: str) -> Any:
        dtype = self.engine.types[name]
        kind = SimpleNamespace(name=self.NAMES[dtype.name], itemsize=dtype.itemsize)
        return SimpleNamespace(dtype=kind, size=len(self.engine.weights[name]) // dtype.itemsize)

    def set_named_weights(self, name: str, weights: FakeWeights) -> bool:
        self.given[name] = weights.content
        return True

    def refit_cuda_engine(self) -> bool:
        if self.engine.takes and not self.get_missing_weights():
            self.engine.weights |= self.given
            return True
        return False


TRT = SimpleNamespace(Refitter=FakeRefitter, Weights=FakeWeights)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    save(unet_graph(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def base(*names: str) -> dict[str, NDArray[np.float16]]:
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in unet_graph().graph.initializer}
    return {name: held[name] for name in names or (KERNEL, "conv_out.weight", TEXT)}


def test_a_b_base_restores_every_bit(graph: Path) -> None:
    engine = FakeEngine(base())
    before = dict(engine.weights)
    for factor in (2, 3):
        refit(TRT, engine, {TEXT: base()[TEXT] * np.float16(factor)}, None, graph=graph)
        assert engine.weights[TEXT] == (base()[TEXT] * np.float16(factor)).tobytes()
        assert engine.weights[KERNEL] == before[KERNEL]
    refit(TRT, engine, base(TEXT), None, graph=graph)
    assert engine.weights == before


def test_an_engine_without_weights_is_filled_from_its_graph(graph: Path) -> None:
    engine = FakeEngine({name: np.zeros_like(values) for name, values in base().items()})
    fill(TRT, engine, graph, None)
    assert engine.weights == {name: values.tobytes() for name, values in base().items()}


def test_the_graph_of_another_engine(graph: Path) -> None:
    engine = FakeEngine({**base(), "mid.weight": np.zeros(3, np.float16)})
    with pytest.raises(ArtifactError, match=r"found 3 of 4; mid\.weight is none.*another graph"):
        fill(TRT, engine, graph, None)


def test_what_tensorrt_has_merged_comes_from_the_graph(graph: Path) -> None:
    """Queries, keys and values in one product: one of them is new, TensorRT asks for the others."""
    engine = FakeEngine(base(), merged=[TEXT, KERNEL])
    new = base()[TEXT] + np.float16(1)
    engine.weights[KERNEL] = bytes(len(engine.weights[KERNEL]))
    with pytest.raises(BackendError, match=r"merged with the new ones.*conv_in\.weight"):
        refit(TRT, engine, {TEXT: new}, None)
    refit(TRT, engine, {TEXT: new}, None, graph=graph)
    assert engine.weights == {**{name: values.tobytes() for name, values in base().items()}, TEXT: new.tobytes()}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({TEXT: np.ones((64, 8), np.float32)}, "512 weights of type half.*got 512 of float32"),
        ({TEXT: np.ones((64, 4), np.float16)}, "got 256 of float16"),
        ({"conv_out.bias": np.ones(4, np.float16)}, "conv_out.bias.*takes new weights for 3 others.*--refit lora"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(weights: dict[str, Array], message: str) -> None:
    engine = FakeEngine(base())
    before = dict(engine.weights)
    with pytest.raises(UsageError, match=message):
        refit(TRT, engine, {KERNEL: base()[KERNEL] * np.float16(2), **weights}, None)
    assert engine.weights == before


def test_an_engine_that_was_built_without_refit() -> None:
    with pytest.raises(UsageError, match=r"unet: .*to_k.weight.*without refit.*latentrt build .*unet --refit lora"):
        refit(TRT, FakeEngine({}), base(TEXT), None, component="unet")


def test_a_refitter_that_fails() -> None:
    engine = FakeEngine(base())
    engine.takes = False
    with pytest.raises(BackendError, match="open the bundle again"):
        refit(TRT, engine, base(TEXT), None)


def test_bfloat16_as_its_bits() -> None:
    engine = FakeEngine({TEXT: np.zeros(4, np.uint16)})
    refit(TRT, engine, {TEXT: np.arange(4, dtype=np.uint16)}, None)
    assert engine.weights[TEXT] == np.arange(4, dtype=np.uint16).tobytes()


@pytest.mark.parametrize(("onnx_type", "stored"), [(TensorProto.INT8, np.int8), (TensorProto.FLOAT8E4M3FN, np.uint8)])
def test_a_quantized_engine_without_weights_is_filled_bit_for_bit(onnx_type: int, stored: Any, tmp_path: Path) -> None:
    content = bytes(range(0, 256, 2))
    tensor = TensorProto(name=TEXT, dims=[16, 8], data_type=onnx_type, raw_data=content)
    save(helper.make_model(helper.make_graph([], "quantized", [], [], [tensor])), tmp_path / "model.onnx")
    engine = FakeEngine({TEXT: np.zeros((16, 8), stored)})
    fill(TRT, engine, tmp_path / "model.onnx", None)
    assert engine.weights[TEXT] == content


def test_a_sidecar_tells_before_anything_is_loaded() -> None:
    def sidecar(refit: str, *names: str, precision: str = "fp16") -> Any:
        return SimpleNamespace(component="unet", precision=precision, refit=refit, refittable=names)

    check_refittable(sidecar("individual", TEXT, KERNEL), [TEXT], bundle=Path("b"))
    check_refittable(sidecar("all"), [TEXT], bundle=Path("b"))
    with pytest.raises(UsageError, match=r"without refit.*latentrt build b --components unet --refit lora"):
        check_refittable(sidecar("none"), [TEXT], bundle=Path("b"))
    with pytest.raises(UsageError, match=r"unet: .*got int8.*new scales.*latentrt calibrate b --precision int8 --lora"):
        check_refittable(sidecar("all", precision="int8"), [TEXT], bundle=Path("b"))
    check_refittable(sidecar("none", precision="int8"), [], bundle=Path("b"))
    with pytest.raises(UsageError, match=r"conv_in.weight.*for 1 others"):
        check_refittable(sidecar("individual", TEXT), [TEXT, KERNEL], bundle=Path("b"))
