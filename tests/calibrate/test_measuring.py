"""Plans are measured once, whatever they are measured for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from small_bundle import small_plan, small_source, write_bundle

from latentrt.calibrate import measuring
from latentrt.calibrate.budget import Budget
from latentrt.calibrate.calibration_options import CalibrateOptions
from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.measuring import Measuring
from latentrt.calibrate.preparing import Prepared
from latentrt.calibrate.search import best

NOISES = {"conv1.weight": 1e-4, "conv_shortcut.weight": 2e-4, "conv2.weight": 4e-4, "to_k.weight": 8e-4}


class Bench:
    """In the place of a network: pictures as good as the prediction, and a note of every plan."""

    def __init__(self) -> None:
        self.measured: list[tuple[frozenset[str], frozenset[str]]] = []

    def measure(
        self, _bench: Any, quants: Mapping[str, LayerQuant], budgets: Any, *, on_progress: Any
    ) -> dict[str, float]:
        wanted = frozenset(budget.metric for budget in budgets)
        self.measured.append((frozenset(quants), wanted))
        db = -10 * math.log10(sum(NOISES.get(name, 0.0) for name in quants) or 1e-10)
        values = {"psnr": db, "ssim": 1 - 10 ** (-db / 10)}
        return {"sqnr": db, "noise_db": db} | {name: values[name] for name in wanted - {"sqnr"}}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench()
    monkeypatch.setattr(measuring, "measure_plan", bench.measure)
    return bench


@pytest.fixture
def means(tmp_path: Path, bench: Bench) -> Measuring:
    source = small_source(write_bundle(tmp_path / "small.bundle"))
    plan = small_plan(source)
    # What has no noise is not up for decision.
    layers = tuple(dataclasses.replace(layer, noise=NOISES.get(layer.name)) for layer in plan.layers)
    prepared = Prepared(
        source=source,
        options=CalibrateOptions(solver="greedy", rounds=6),
        split=cast(Any, None),
        layers=source.layers,
        calibration=cast(Any, None),
        search=cast(Any, None),
        plan=dataclasses.replace(plan, layers=layers),
        stage=cast(Any, None),
    )
    quiet = lambda *_: None  # noqa: E731
    return Measuring(prepared, cast(Any, bench), tmp_path / "trials.json", quiet, quiet)


def test_a_second_budget_measures_only_what_is_not_known(means: Measuring, bench: Bench) -> None:
    first = best(means.search([Budget("psnr", 32.5)]))
    assert first is not None
    assert first.choice.chosen == {"conv1.weight", "conv_shortcut.weight"}
    count = len(bench.measured)
    assert count == len({chosen for chosen, _ in bench.measured}) > 1
    # Of the same metric at the same bound: nothing.
    assert best(means.search([Budget("psnr", 32.5)])) == first
    assert len(bench.measured) == count
    # sqnr is measured whatever is asked for.
    found = best(means.search([Budget("sqnr", 32.5)]))
    assert found is not None
    assert found.choice == first.choice
    assert len(bench.measured) == count


def test_a_metric_that_was_not_measured_is(means: Measuring, bench: Bench) -> None:
    means.search([Budget("sqnr", 20)])
    (everything,) = {chosen for chosen, _ in bench.measured}
    means.search([Budget("ssim", 0.9)])
    assert bench.measured[1:] == [(everything, frozenset({"ssim"}))]
    # What was known stays.
    (values,) = json.loads(means.file.read_text()).values()
    assert values.keys() == {"sqnr", "noise_db", "ssim"}


def test_another_process_finds_what_was_measured_and_a_damaged_file_is_made_anew(
    means: Measuring, bench: Bench
) -> None:
    means.search([Budget("psnr", 20)])
    again = dataclasses.replace(means)
    again.search([Budget("psnr", 20)])
    assert len(bench.measured) == 1
    for damage in ("{", "[1]"):
        means.file.write_text(damage)
        means.search([Budget("psnr", 20)])
    assert len(bench.measured) == 3


def test_no_plan_is_beyond_a_limit_of_noise(means: Measuring, bench: Bench) -> None:
    (trial,) = means.search([Budget("psnr", 20)], limit=3.5e-4)
    assert trial.choice.chosen == {"conv1.weight", "conv_shortcut.weight"}
    means.search([Budget("psnr", 36)], limit=3.5e-4)
    assert all(sum(NOISES[name] for name in chosen) <= 3.5e-4 for chosen, _ in bench.measured)
