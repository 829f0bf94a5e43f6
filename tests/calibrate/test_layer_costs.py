"""What quantizing a layer saves: its multiplications, or what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentrt.calibrate.layer_costs import layer_costs
from latentrt.calibrate.layers import Layer
from latentrt.runtime.errors import CalibrationError, UsageError


def layer(name: str, share: float, operator: str = "Conv", channels: int = 32) -> Layer:
    return Layer(name, operator, "other", f"{name}.x", name, channels, 32, 9, macs=1, share=share)


LAYERS = (layer("first", 0.1, channels=4), layer("a", 0.6), layer("b", 0.2, "MatMul"), layer("time", 0.1, "Gemm"))


def times_in(folder: Path, content: Any) -> Path:
    path = folder / "times.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_without_times_a_layer_costs_its_multiplications() -> None:
    costs = layer_costs(LAYERS)
    assert costs.gains == {"first": 0.1, "a": 0.6, "b": 0.2, "time": 0.1}
    assert costs.basis == "MACs"


def test_times_are_gains_of_all_time_and_may_be_losses(tmp_path: Path) -> None:
    content = {"a": {"fp16": 6e-3, "int8": 2e-3}, "b": {"fp16": 2e-3, "int8": 3e-3}, "no layer": "of ours"}
    path = times_in(tmp_path, content)
    costs = layer_costs(LAYERS, path)
    # Of the 8 ms that both take in fp16; what cannot be quantized gains nothing and need not be timed.
    assert costs.gains == pytest.approx({"first": 0, "a": 0.5, "b": -0.125, "time": 0})
    assert costs.basis == str(path)


def test_times_are_of_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    path = times_in(tmp_path, {name: {"fp16": 2.0, "int8": 1.5, "fp8": 1.0} for name in "ab"})
    assert layer_costs(LAYERS, path, precision="fp8").gains["a"] == 0.25
    assert layer_costs(LAYERS, path, precision="int8").gains["a"] == 0.125
    with pytest.raises(CalibrationError, match="seconds in int8w for a, got None"):
        layer_costs(LAYERS, path, precision="int8w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"fp16": 1, "int8": 1}}, "expected times of all 2 layers that can be quantized, got none of b"),
        ([1, 2], "got none of a, b"),
        ({name: {"fp16": 1, "int8": 0} for name in "ab"}, "expected seconds in int8 for a, got 0"),
        ({name: {"fp16": "1", "int8": 1} for name in "ab"}, "expected seconds in fp16 for a, got '1'"),
        ({name: {"fp16": True, "int8": 1} for name in "ab"}, "expected seconds in fp16 for a, got True"),
        (dict.fromkeys("ab", 3), "expected seconds in fp16 for a, got None"),
        ('{"a": {"fp16": NaN, "int8": 1}, "b": {}}', "expected seconds in fp16 for a, got nan"),
        ('{"a": {"fp16": Infinity, "int8": 1}, "b": {}}', "expected seconds in fp16 for a, got inf"),
    ],
)
def test_times_that_cannot_be(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        layer_costs(LAYERS, times_in(tmp_path, content))
    assert message in str(caught.value)
    assert str(tmp_path / "times.json") in str(caught.value)


@pytest.mark.parametrize("content", ["{", None])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "none.json" if content is None else times_in(tmp_path, content)
    with pytest.raises(UsageError, match="expected a JSON file of layer times, got"):
        layer_costs(LAYERS, path)
