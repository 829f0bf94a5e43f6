"""The safety checker's graph, held to diffusers' own checker."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance
from families import PREPROCESSOR, make_safety_checker
from numpy.typing import NDArray

from latentrt.export.safety_checker import safety_checker_component
from latentrt.export.to_onnx import to_onnx
from latentrt.runtime.safety_checker import ClipProcessor, flagged
from latentrt.runtime.session import OnnxSession


@pytest.fixture(scope="module")
def checker() -> Any:
    return make_safety_checker(seed=0)


@pytest.fixture(scope="module")
def session(checker: Any, tmp_path_factory: pytest.TempPathFactory) -> OnnxSession:
    path = tmp_path_factory.mktemp("checker") / "model.onnx"
    ir.save(to_onnx(safety_checker_component(checker)), path)
    return OnnxSession(path)


def mosaics(count: int) -> NDArray[np.uint8]:
    """Pictures of a few large squares: they differ in what the checker sees."""
    values = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return values.repeat(16, axis=1).repeat(24, axis=2)


def test_the_graph_says_what_it_takes_and_gives(session: OnnxSession) -> None:
    spec = session.spec
    assert [(t.name, t.dtype, t.shape) for t in spec.inputs] == [("clip_input", "float32", ("batch", 3, 224, 224))]
    assert [(t.name, t.dtype, t.shape) for t in spec.outputs] == [
        ("special_scores", "float32", ("batch", 3)),
        ("concept_scores", "float32", ("batch", 17)),
    ]


@pytest.mark.parametrize("count", [1, 5])
def test_scores_are_similarities_less_thresholds(count: int, checker: Any, session: OnnxSession) -> None:
    clip_input = ClipProcessor.from_config(PREPROCESSOR)(mosaics(count))
    with torch.no_grad():
        embeds = checker.visual_projection(checker.vision_model(torch.from_numpy(clip_input))[1])
        wanted = {
            "special_scores": cosine_distance(embeds, checker.special_care_embeds)
            - checker.special_care_embeds_weights,
            "concept_scores": cosine_distance(embeds, checker.concept_embeds) - checker.concept_embeds_weights,
        }
    found = session({"clip_input": clip_input})
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert np.abs(found[name] - value.numpy()).max() <= 1e-6


def test_the_verdicts_are_those_of_diffusers(checker: Any, session: OnnxSession) -> None:
    pictures = mosaics(100)
    clip_input = ClipProcessor.from_config(PREPROCESSOR)(pictures)
    _, wanted = checker(clip_input=torch.from_numpy(clip_input), images=[picture / 255.0 for picture in pictures])
    found = flagged(session({"clip_input": clip_input}))
    assert found.tolist() == wanted
    assert 10 < sum(wanted) < 90
