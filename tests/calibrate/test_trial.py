"""Measuring a plan before there is a graph: the network in PyTorch as a session, and what is measured with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from drawn import picture
from torch import nn

from latentrt.calibrate import trial
from latentrt.calibrate.budget import Budget
from latentrt.calibrate.calls import Call
from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.picture_metrics import BUILT_IN
from latentrt.calibrate.pictures import Drawing
from latentrt.calibrate.trial import Bench, TorchSession, measure_plan
from latentrt.runtime.errors import CalibrationError
from latentrt.runtime.image import Pictures
from latentrt.runtime.specs import ModelSpec, TensorSpec

PROMPTS = tuple(f"{word} {index}" for index in range(3) for word in ("light", "dark"))


class Network(nn.Module):
    """One layer over the channels of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.from_numpy(np.random.default_rng(0).standard_normal((16, 16)) / 4))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.layer(sample) + timestep[:, None]
        return answer


def feeds(rows: int, seed: int = 0) -> dict[str, Any]:
    sample = np.random.default_rng(seed).standard_normal((rows, 16)).astype(np.float32)
    return {"sample": sample, "timestep": np.zeros(rows, np.float32)}


def test_a_network_in_pytorch_is_a_session() -> None:
    network, given = Network(), feeds(3)
    spec = ModelSpec("unet", (), (TensorSpec("out_sample", "float32", ("b", 16)),))
    session = TorchSession(network, spec, device="cpu")
    # What the runtime freezes is taken as it is, and stays.
    for values in given.values():
        values.flags.writeable = False
    (answer,) = session(given).items()
    assert answer[0] == "out_sample"
    expected = given["sample"] @ network.layer.weight.detach().numpy().T
    np.testing.assert_allclose(np.asarray(answer[1], np.float64), expected, rtol=1e-5, atol=1e-6)
    assert (str(answer[1].dtype), session.backend, session.spec) == ("float32", "PyTorch cpu", spec)


class Pictures8(Bench):
    """A bench whose pipeline draws known pictures, with what the network is told at the time."""

    @contextmanager
    def pipeline(self) -> Iterator[Any]:  # type: ignore[override]
        def drawn(prompts: Sequence[str], *, seed: Sequence[int], **settings: Any) -> Any:
            assert settings == {"steps": 3, "safety_checker": False}
            # The network is simulated while it draws: else the plan would be judged by fp32.
            simulated = "forward" in vars(cast(Network, self.network).layer)
            precision = "int8" if simulated else "fp32"
            images = np.stack([picture(prompt, own, precision) for prompt, own in zip(prompts, seed, strict=True)])
            return type("Result", (), {"images": images})

        yield drawn


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    drawing = Drawing(bundle=tmp_path, prompts=PROMPTS, seed=40, settings={"steps": 3}, batch=4)

    def reference(given: Drawing, precision: str, folder: Path, **_: Any) -> None:
        assert (given, precision, folder) == (drawing, "fp32", tmp_path / "pictures")

    def read(_: Path, count: int) -> Iterator[Pictures]:
        return (picture(PROMPTS[index], 40 + index, "fp32") for index in range(count))

    monkeypatch.setattr(trial, "draw", reference)
    monkeypatch.setattr(trial, "read_pictures", read)
    calls = [Call(feeds(2, seed), seed, timestep=float(t), negatives=0, guidance=1.0) for seed, t in enumerate((9, 1))]
    return Pictures8(
        source=cast(Any, None),
        network=Network(),
        device="cpu",
        calls=calls,
        drawing=drawing,
        folder=tmp_path / "pictures",
        metrics=BUILT_IN,
        judge=lambda prompt, image: bool(image.mean() < (64 if "dark" in prompt else 184.5)),
    )


SCALE = 0.03125
QUANTS: Mapping[str, LayerQuant] = {"layer.weight": LayerQuant(SCALE)}


def noise_by_hand(bench: Bench) -> list[float]:
    """Noise over signal by call, of the layer as NumPy rounds it."""
    weight = cast(Network, bench.network).layer.weight.detach().numpy()
    # Rounded up to float16, as scales are.
    steps = (np.abs(weight).max(1) / 127).astype(np.float16)
    steps = np.where(steps.astype(np.float64) * 127 < np.abs(weight).max(1), np.nextafter(steps, np.float16(1)), steps)
    wide = steps.astype(np.float32)[:, None]
    stored = np.clip(np.rint(weight / wide), -127, 127) * wide
    shares = []
    for call in bench.calls:
        x = np.asarray(call.feeds["sample"], np.float32)
        rounded = np.clip(np.rint(x / np.float32(SCALE)), -128, 127) * np.float32(SCALE)
        exact = (x @ weight.T).astype(np.float64)
        shares.append(float(np.square(rounded @ stored.T - exact).sum() / np.square(exact).sum()))
    return shares


def test_noise_is_measured_without_a_picture(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trial, "draw")
    values = measure_plan(bench, QUANTS, [Budget("sqnr", 30)])
    shares = noise_by_hand(bench)
    assert values == {
        "sqnr": pytest.approx(np.mean(-10 * np.log10(shares)), abs=1e-3),
        "noise_db": pytest.approx(-10 * np.log10(np.mean(shares)), abs=1e-3),
    }
    assert 30 < values["noise_db"] < 45


def test_pictures_are_measured_against_those_of_fp32(bench: Bench) -> None:
    values = measure_plan(bench, QUANTS, [Budget("psnr", 30), Budget("accuracy", 0.1)])
    assert values.keys() == {"psnr", "accuracy", "sqnr", "noise_db"}
    # All pixels are 4 levels brighter, in every batch.
    assert values["psnr"] == pytest.approx(20 * np.log10(255 / 4), abs=1e-3)
    shown = [
        [picture(prompt, 40 + index, name).mean() < (64 if "dark" in prompt else 184.5) for name in ("fp32", "int8")]
        for index, prompt in enumerate(PROMPTS)
    ]
    before, after = np.mean(shown, axis=0)
    assert before > after
    assert values["accuracy"] == pytest.approx(before - after)


def test_a_prediction_that_is_not_finite_is_named(bench: Bench) -> None:
    np.asarray(bench.calls[1].feeds["sample"])[0, 3] = np.inf
    with pytest.raises(CalibrationError, match="at timestep 1"):
        measure_plan(bench, QUANTS, [Budget("sqnr", 30)])
