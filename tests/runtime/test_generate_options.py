"""Options of the command line that are read from text."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.runtime.errors import UsageError
from latentrt.runtime.generate_options import (
    read_control,
    read_hires,
    read_numbers,
    read_pair,
    read_settings,
    read_size,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png", (1.0, 0.0, 1.0, 0)),
        ("a.png@0.5", (0.5, 0.0, 1.0, 0)),
        ("a.png@0.5@0.1-0.6", (0.5, 0.1, 0.6, 0)),
        ("a.png@2@0-1@1", (2.0, 0.0, 1.0, 1)),
    ],
)
def test_control(text: str, expected: tuple[float, float, float, int]) -> None:
    control = read_control(text)
    assert control.image == Path("a.png")
    assert (control.scale, control.start, control.end, control.model) == expected


@pytest.mark.parametrize("text", ["a.png@", "a.png@1@0.5", "a.png@1@0-1@x", "a.png@1@0-1@0@3"])
def test_odd_controls_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^control: expected FILE@SCALE@START-END@MODEL"):
        read_control(text)


def test_settings_are_literals_where_they_can_be() -> None:
    pairs = ["solver_order=3", "s_churn=0.5", "lower_order_final=true", "solver_type=heun", "disable_corrector=[0, 1]"]
    assert read_settings(pairs) == {
        "solver_order": 3,
        "s_churn": 0.5,
        "lower_order_final": True,
        "solver_type": "heun",
        "disable_corrector": [0, 1],
    }
    with pytest.raises(UsageError, match="NAME=VALUE"):
        read_settings(["solver_order"])


def test_numbers_pairs_and_sizes() -> None:
    assert read_numbers("timesteps", "999, 500,1") == [999.0, 500.0, 1.0]
    assert read_numbers("timesteps", None) is None
    assert read_pair("interval", "0.2-0.8", "-") == (0.2, 0.8)
    assert read_size("size", "1024x768") == (768, 1024)
    assert read_hires(None, 0.5, None, "latent") is None
    assert read_hires(1.5, 0.5, 7, "lanczos").steps == 7  # type: ignore[union-attr]
    for call in (lambda: read_numbers("timesteps", "a"), lambda: read_size("size", "1024")):
        with pytest.raises(UsageError, match="expected"):
            call()
