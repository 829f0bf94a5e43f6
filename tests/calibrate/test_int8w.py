"""Weights alone in int8: a precision of its own, for which no range of a tensor has to be known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_bundle import small_plan, small_source, write_bundle

from latentrt.calibrate.layer_costs import layer_costs
from latentrt.calibrate.layers import Layer
from latentrt.calibrate.plan import Plan
from latentrt.calibrate.plan_checks import check_consistent
from latentrt.calibrate.planning import PlanOptions, full_plan
from latentrt.runtime.errors import CalibrationError


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return small_plan(small_source(write_bundle(tmp_path_factory.mktemp("int8w"))))


def bare(plan: Plan, *names: str, **changes: Any) -> Plan:
    """The plan with layers, all by default, that have no scale."""
    layers = tuple(replace(x, scale=None) if not names or x.name in names else x for x in plan.layers)
    return replace(plan, layers=layers, **changes)


def test_a_plan_is_called_by_what_it_rounds(plan: Plan) -> None:
    assert (plan.precision, bare(plan).precision) == ("int8", "int8w")
    # Layers that are kept have no say.
    kept = tuple(replace(layer, quantized=layer.name == "conv1.weight") for layer in plan.layers)
    assert bare(replace(plan, layers=kept), "conv2.weight", "to_k.weight").precision == "int8"
    assert replace(plan, layers=tuple(replace(layer, quantized=False) for layer in kept)).precision == "int8"
    check_consistent(bare(plan))


def test_fp8_weights_alone_are_none(plan: Plan) -> None:
    with pytest.raises(CalibrationError, match="a scale: only int8 weights go without, not fp8 ones, got none"):
        check_consistent(bare(plan, kind="fp8"))


def test_it_saves_weights_and_not_multiplications() -> None:
    layers = [
        Layer("conv", "Conv", "resnet.conv1", "x", "conv", 32, 16, 9, macs=900, share=0.9),
        Layer("product", "MatMul", "attn1.to_q", "y", "product", 16, 96, 1, macs=100, share=0.1),
    ]
    costs = layer_costs(layers, precision="int8w")
    assert costs.gains == pytest.approx({"conv": 4608 / 6144, "product": 1536 / 6144})
    assert costs.basis == "weights"
    assert layer_costs(layers, precision="int8").gains == {"conv": 0.9, "product": 0.1}


def test_statistics_are_wanted_where_something_is_chosen_by_them(tmp_path: Path) -> None:
    options = PlanOptions(weight_only=True)
    assert (options.precision, options.needs_statistics) == ("int8w", False)
    assert PlanOptions().needs_statistics
    assert PlanOptions(weight_only=True, correct=True).needs_statistics
    source = small_source(write_bundle(tmp_path))
    with pytest.raises(CalibrationError, match="expected statistics of what its layers read, got none"):
        full_plan(source, source.layers, None, layer_costs(source.layers), PlanOptions(), made={})
