"""Plans: a choice of layers, why the others are left, and how numbers are chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from drawn import small_plan

from latentrt.calibrate.layers import Layer
from latentrt.calibrate.plan import LayerPlan, Plan
from latentrt.calibrate.planning import (
    NO_GAIN,
    QUANTIZED,
    TOO_NOISY,
    PlanOptions,
    plan_items,
    quantized_share,
    selected,
)
from latentrt.runtime.errors import CalibrationError, UsageError


def row(name: str, group: str, noise: float | None, gain: float, macs: float) -> LayerPlan:
    quantized = noise is not None
    return LayerPlan(name, group, "other", quantized, QUANTIZED if quantized else "too few", 0.1, noise, gain, macs)


@pytest.fixture
def plan() -> Plan:
    """The first cannot be quantized, q and k read one tensor, and the last is slower in int8."""
    layers = (
        row("conv_in", "conv_in", None, 0.0, 0.1),
        row("q", "q", 1e-4, 0.2, 0.2),
        row("k", "q", 2e-4, 0.1, 0.1),
        row("ff", "ff", 5e-4, 0.3, 0.4),
        row("slow", "slow", 1e-6, -0.1, 0.2),
    )
    return dataclasses.replace(small_plan(), layers=layers, made={"seed": 3})


def test_what_is_left_out_stays_with_its_reason(plan: Plan) -> None:
    found = selected(plan, {"q", "k"}, made={"predicted_db": 35.2})
    assert {layer.name: (layer.quantized, layer.reason) for layer in found.layers} == {
        "conv_in": (False, "too few"),
        "q": (True, QUANTIZED),
        "k": (True, QUANTIZED),
        "ff": (False, TOO_NOISY),
        "slow": (False, NO_GAIN),
    }
    assert found.made == {"seed": 3, "predicted_db": 35.2}
    assert list(found.quants()) == ["q", "k"]
    # All but the choice is as before, so that a plan can be edited by hand.
    for before, after in zip(plan.layers, found.layers, strict=True):
        assert dataclasses.replace(after, quantized=before.quantized, reason=before.reason) == before


@pytest.mark.parametrize("name", ["conv_in", "nothing"])
def test_only_what_can_be_is_chosen(plan: Plan, name: str) -> None:
    with pytest.raises(UsageError, match=f"expected some of the 4 that can be quantized, got {name}"):
        selected(plan, {"q", name})


def test_the_share_is_of_the_multiplications_and_not_of_the_gain(plan: Plan) -> None:
    assert quantized_share(plan) == pytest.approx(0.9)
    assert quantized_share(selected(plan, {"ff", "slow"})) == pytest.approx(0.6)


def layer(name: str, group: str) -> Layer:
    return Layer(name, "MatMul", "other", f"{group}.x", group, 32, 32, 1, 1, 0.1)


def test_layers_that_read_one_tensor_are_chosen_together(plan: Plan) -> None:
    items = plan_items(plan, [layer(each.name, each.group) for each in plan.layers])
    assert {item.layers: (round(item.noise, 9), round(item.gain, 9)) for item in items} == {
        ("q", "k"): (3e-4, 0.3),
        ("ff",): (5e-4, 0.3),
        ("slow",): (1e-6, -0.1),
    }


def test_a_noise_that_is_no_number_is_refused(plan: Plan) -> None:
    broken = tuple(dataclasses.replace(each, noise=float("nan")) for each in plan.layers if each.name == "ff")
    with pytest.raises(CalibrationError, match="ff: expected a finite noise"):
        plan_items(dataclasses.replace(plan, layers=broken), [layer("ff", "ff")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method: expected one of minmax, percentile, entropy, mse, output-error for int8"),
        ({"method": "entropy", "kind": "fp8"}, "method: expected one of minmax, percentile, output-error for fp8"),
        ({"method": "percentile", "percent": 0.0}, "percentile: expected more than 0 and at most 100, got 0"),
        ({"percent": float("nan")}, "percentile: expected more than 0"),
    ],
)
def test_options_are_refused_before_anything_is_computed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PlanOptions(**options)
