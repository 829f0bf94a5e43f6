from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from latentrt.calibrate.calls import Call
from latentrt.calibrate.capture import CaptureOptions, capture
from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.sensitivity import Sensitivities, measured, one_at_a_time, sensitivities
from latentrt.calibrate.source import open_source
from latentrt.export.networks import libraries_quiet, weights_at_hand
from latentrt.export.vae import VaeDecoder
from latentrt.runtime.errors import CalibrationError, UsageError

PROMPTS = ("a small red circle at the top left of a blue background", "a large green triangle on a white background")


@dataclass(frozen=True)
class Case:
    network: nn.Module
    quants: dict[str, LayerQuant]
    calls: list[Call]


def minmax(network: nn.Module, calls: list[Call]) -> dict[str, LayerQuant]:
    """Every layer with at least 16 channels, its scale that of the largest input."""
    modules: dict[str, Any] = {
        f"{path}.weight": module
        for path, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and min(module.weight.shape[:2]) >= 16
    }
    largest = dict.fromkeys(modules, 0.0)

    def look(name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            largest[name] = max(largest[name], float(inputs[0].abs().max()))

        return see

    hooks = [module.register_forward_pre_hook(look(name)) for name, module in modules.items()]
    with torch.inference_mode():
        for call in calls:
            network(**{name: torch.from_numpy(np.array(values)) for name, values in call.feeds.items()})
    for hook in hooks:
        hook.remove()
    return {name: LayerQuant(scale=amax / 127) for name, amax in largest.items()}


@pytest.fixture(scope="module")
def shapes(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    source = open_source(shapes_bundle)
    options = CaptureOptions(prompts=PROMPTS, timesteps=2, steps=4)
    calls = list(capture(source, options, tmp_path_factory.mktemp("capture")).calls())
    with weights_at_hand(source.network):
        yield Case(source.wrapper, minmax(source.wrapper, calls), calls)


def share_db(found: Sensitivities, names: Any) -> float:
    shares = found.shares()
    return float(10 * np.log10(sum(shares[name] for name in names)))


def some(case: Case, count: int, seed: int) -> dict[str, LayerQuant]:
    names = np.random.default_rng(seed).choice(sorted(case.quants), count, replace=False)
    return {str(name): case.quants[str(name)] for name in names}


def test_a_backward_pass_tells_what_each_layer_does_alone(shapes: Case) -> None:
    few = some(shapes, 20, seed=0)
    # Three probes for each of the few calls.
    estimated = sensitivities(shapes.network, few, shapes.calls * 3)
    exact = one_at_a_time(shapes.network, few, shapes.calls)
    np.testing.assert_allclose(estimated.signal, 3 * exact.signal, rtol=1e-5)
    assert estimated.timesteps.tolist() == exact.timesteps.tolist() == sorted({c.timestep for c in shapes.calls})[::-1]
    ours, theirs = estimated.shares(), exact.shares()
    assert spearmanr([ours[name] for name in few], [theirs[name] for name in few])[0] >= 0.98
    errors = [10 * np.log10(ours[name] / theirs[name]) for name in few]
    assert abs(np.mean(errors)) < 1
    assert np.std(errors) < 3


def test_noise_adds(shapes: Case) -> None:
    plans = {"all": shapes.quants, "some": some(shapes, 50, seed=1), "few": some(shapes, 12, seed=2)}
    found = measured(shapes.network, plans, shapes.calls)
    estimated = sensitivities(shapes.network, shapes.quants, shapes.calls)
    for plan, quants in plans.items():
        assert share_db(estimated, quants) == pytest.approx(share_db(found, [plan]), abs=1.5), plan
    for ours, theirs in zip(estimated.together(plans["some"]), found.together(["some"]), strict=True):
        assert ours.timestep == theirs.timestep
        assert ours.sqnr_db == pytest.approx(theirs.sqnr_db, abs=3)


def test_the_same_seed_gives_the_same_numbers_and_the_network_is_left_as_it_was(shapes: Case) -> None:
    few, calls = some(shapes, 3, seed=3), shapes.calls[:2]
    first, again = (sensitivities(shapes.network, few, calls) for _ in range(2))
    other = sensitivities(shapes.network, few, calls, seed=7)
    for name in few:
        np.testing.assert_array_equal(first.noise[name], again.noise[name])
        assert (first.noise[name] != other.noise[name]).all()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in shapes.network.modules())
    assert not any(module._forward_hooks for module in shapes.network.modules())


def test_pictures_of_a_decoder_are_judged_alike() -> None:
    torch.manual_seed(0)
    with libraries_quiet():
        vae = diffusers.AutoencoderKL(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, layers_per_block=1,
        )  # fmt: skip
    network = VaeDecoder(vae).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    calls = [
        Call({"latent_sample": rng.standard_normal((2, 4, 8, 8)).astype(np.float32)}, index, 0.0, 0, 1.0)
        for index in range(4)
    ]
    quants = minmax(network, calls)
    estimated = sensitivities(network, quants, calls)
    assert estimated.timesteps.tolist() == [0.0]
    assert share_db(estimated, quants) == pytest.approx(
        share_db(measured(network, {"all": quants}, calls), ["all"]), abs=1.5
    )


def test_all_rows_are_judged_where_guidance_is_not_asked_for(shapes: Case) -> None:
    found = measured(shapes.network, {"all": shapes.quants}, shapes.calls, metric="raw")
    estimated = sensitivities(shapes.network, shapes.quants, shapes.calls, metric="raw")
    np.testing.assert_allclose(estimated.signal, found.signal, rtol=1e-5)
    assert share_db(estimated, shapes.quants) == pytest.approx(share_db(found, ["all"]), abs=1.5)
    # Guidance makes more of what the rows of a picture do not share.
    assert share_db(estimated, shapes.quants) < share_db(
        sensitivities(shapes.network, shapes.quants, shapes.calls), shapes.quants
    )


def test_shares_are_means_over_the_timesteps_by_their_weights() -> None:
    found = Sensitivities(np.array([9.0, 1.0]), np.array([10.0, 2.0]), {"a": np.array([1.0, 1.0]), "b": np.zeros(2)})
    assert found.shares() == {"a": pytest.approx((0.1 + 0.5) / 2), "b": 0.0}
    assert found.shares(lambda timestep: timestep) == {"a": pytest.approx(0.9 * 0.1 + 0.1 * 0.5), "b": 0.0}


def test_what_cannot_be_judged_is_refused(shapes: Case) -> None:
    few = some(shapes, 1, seed=0)
    call = shapes.calls[0]
    for judge in (sensitivities, one_at_a_time):
        with pytest.raises(CalibrationError, match="sensitivity: expected captured calls, got none"):
            judge(shapes.network, few, [])
        with pytest.raises(UsageError, match="metric: expected one of guided, raw, got mse"):
            judge(shapes.network, few, shapes.calls, metric="mse")  # type: ignore[arg-type]
        with pytest.raises(CalibrationError, match=r"UNet: expected weights of its layers, got conv\.weight"):
            judge(shapes.network, {"conv.weight": LayerQuant(scale=1.0)}, [call])
        spoilt = dataclasses.replace(call, feeds={**call.feeds, "sample": np.full_like(call.feeds["sample"], np.nan)})
        with pytest.raises(CalibrationError, match=rf"expected finite noise, got NaN .* timestep {call.timestep:g}\."):
            judge(shapes.network, few, [spoilt])
