from __future__ import annotations

import pytest

from latentrt.runtime.errors import UsageError
from latentrt.runtime.residency_plan import ComponentMemory, residency

TEXT = ComponentMemory("text_encoder", weights=200, activation=10, tensors=1)
TEXT_2 = ComponentMemory("text_encoder_2", weights=600, activation=30, tensors=2)
UNET = ComponentMemory("unet", weights=1700, activation=400, tensors=4, least_weights=60)
DECODER = ComponentMemory("vae_decoder", weights=100, activation=900, tensors=16)
ALL = (TEXT, TEXT_2, UNET, DECODER)


def totals(policy: str, memory: int | None = None) -> list[tuple[tuple[str, ...], int]]:
    plan = residency(policy, ALL, context=250, memory=memory)
    return [(stage.components, stage.total) for stage in plan.stages]


def test_with_everything_resident_each_stage_holds_all_weights_and_one_shared_block() -> None:
    # 250 + (200 + 600 + 1700 + 100) + the largest activation, 900 + (1 + 2 + 4 + 16)
    assert [total for _, total in totals("all")] == [3773, 3773, 3773]
    peak = residency("all", ALL, context=250).peak
    assert (peak.weights, peak.activation, peak.tensors) == (2600, 900, 23)


def test_swapping_holds_the_networks_of_the_stage_alone() -> None:
    assert totals("swap") == [
        (("text_encoder", "text_encoder_2"), 250 + 800 + 30 + 3),
        (("unet",), 250 + 1700 + 400 + 4),
        (("vae_decoder",), 250 + 100 + 900 + 16),
    ]
    assert residency("swap", ALL, context=250).peak.components == ("unet",)


@pytest.mark.parametrize(
    ("memory", "budget", "unet"),
    [
        (None, 60, 714),  # the fewest: 250 + 60 + 400 + 4
        (2000, 1346, 2000),  # what the stage leaves: 2000 - 654
        (5000, 1700, 2354),  # room for all of them: the same as swapping
        (500, 60, 714),  # not enough for the fewest: the total says by how much
    ],
)
def test_streaming_keeps_as_many_weights_as_there_is_room_for(memory: int | None, budget: int, unet: int) -> None:
    plan = residency("stream", ALL, context=250, memory=memory)
    assert (plan.budget, plan.stages[1].total) == (budget, unet)
    assert [stage.total for stage in plan.stages[::2]] == [1083, 1266]


def test_each_policy_takes_at_most_what_the_one_before_takes() -> None:
    peaks = [residency(policy, ALL, context=250).peak.total for policy in ("all", "swap", "stream")]
    assert peaks == sorted(peaks, reverse=True)


def test_without_a_unet_nothing_is_streamed() -> None:
    assert residency("stream", (TEXT, DECODER), context=0).budget is None


def test_what_cannot_be_planned_is_named() -> None:
    with pytest.raises(UsageError, match="all, swap, stream, got 'disk'"):
        residency("disk", ALL, context=0)
    with pytest.raises(UsageError, match="at least one to plan for"):
        residency("all", (), context=0)
