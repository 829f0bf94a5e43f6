"""optimum's folders in our runtime, and our bundles as optimum's pipelines drew them.

The fixtures say what optimum drew; see their README.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.runtime import Pipeline

FIXTURES = Path(__file__).parents[1] / "fixtures" / "optimum"
DRAWINGS: dict[str, dict[str, Any]] = json.loads((FIXTURES / "drawn.json").read_text())["drawings"]
OF_OPTIMUM = [name for name in DRAWINGS if name.startswith("optimum: ")]
OF_OURS = [name for name in DRAWINGS if name not in OF_OPTIMUM]


@pytest.fixture(scope="module")
def drawn() -> Mapping[str, Any]:
    with np.load(FIXTURES / "drawn.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def optimum_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimum") / "sd"
    with zipfile.ZipFile(FIXTURES / "sd.zip") as archive:
        archive.extractall(folder)
    return folder


def check(folder: Path, drawn: Mapping[str, Any], name: str) -> None:
    result = Pipeline.load(folder)(**DRAWINGS[name])
    latents = drawn[f"{name}/latents"]
    # fp32 sums in another order, amplified by six steps with guidance.
    np.testing.assert_allclose(result.latents, latents, rtol=0, atol=1e-4 * latents.std())
    # A value beside one half rounds to either side.
    assert np.abs(result.images[0].astype(int) - drawn[f"{name}/picture"].astype(int)).max() <= 1


@pytest.mark.parametrize("name", OF_OPTIMUM)
def test_a_folder_of_optimum_gives_its_picture(optimum_folder: Path, drawn: Mapping[str, Any], name: str) -> None:
    check(optimum_folder, drawn, name)


@pytest.mark.parametrize("name", OF_OURS)
def test_optimum_drew_our_picture_from_our_bundle(
    family_bundle: Callable[[str], Path], drawn: Mapping[str, Any], name: str
) -> None:
    check(family_bundle(name.split(":")[0]), drawn, name)


def test_the_fixtures_hold_different_pictures(drawn: Mapping[str, Any]) -> None:
    pictures = [drawn[f"{name}/picture"].tobytes() for name in DRAWINGS]
    assert len(OF_OPTIMUM) == 3
    # SDXL's own scheduler and its samplers differ; so do all others.
    assert len(set(pictures)) == len(pictures)


def test_a_folder_of_optimum_has_one_timestep_for_all_rows(optimum_folder: Path) -> None:
    unet = Pipeline.load(optimum_folder).model.components["unet"]
    timestep = unet.spec.input("timestep")
    assert timestep is not None
    assert timestep.shape == ()
    feeds = {"sample": np.ones((2, 4, 8, 8)), "encoder_hidden_states": np.ones((2, 77, 16))}
    early, late = (np.asarray(unet({**feeds, "timestep": np.array(t)})["out_sample"], np.float32) for t in (999, 1))
    assert np.abs(early - late).max() > 0.01
