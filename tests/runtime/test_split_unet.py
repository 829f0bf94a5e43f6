"""A U-Net in two graphs draws what the whole one draws, and projects each prompt once."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.testing import assert_array_equal

from latentrt.export.prompt_keys import split_prompt
from latentrt.runtime import ModelSpec, Pipeline, TensorSpec
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.components import Components
from latentrt.runtime.errors import UsageError
from latentrt.runtime.manifest import load_manifest, record_of, save_manifest
from latentrt.runtime.prompt_keys import CACHED, PROMPT, SplitUnet, runs_split
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.specs import Array

TEXT = TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence_length", 2))
KEY = TensorSpec("attn2.key", "float32", ("batch", "sequence_length", 4))
SAMPLE, TIMESTEP = TensorSpec("sample", "float32", ("batch", 4)), TensorSpec("timestep", "float32", ("batch",))
EMBEDS, OUT = TensorSpec("text_embeds", "float32", ("batch", 3)), TensorSpec("out_sample", "float32", ("batch", 4))


class Counted:
    """A session that is a function of its inputs, and counts its calls."""

    backend = "fake"

    def __init__(self, spec: ModelSpec, function: Callable[[Mapping[str, Array]], Array]) -> None:
        self.spec, self._function, self.calls = spec, function, 0

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        assert feeds.keys() == {tensor.name for tensor in self.spec.inputs}
        self.calls += 1
        return {self.spec.outputs[0].name: self._function(feeds)}

    def close(self) -> None:
        """Nothing to give back."""


def sessions() -> tuple[Counted, Counted]:
    """A prompt graph that doubles the text twice over, and a rest that adds the mean of it to the sample."""
    prompt = Counted(ModelSpec(PROMPT, (TEXT,), (KEY,)), lambda feeds: np.tile(feeds["encoder_hidden_states"], 2))
    cached = Counted(
        ModelSpec(CACHED, (SAMPLE, TIMESTEP, EMBEDS, KEY), (OUT,)),
        lambda feeds: feeds["sample"] + feeds["attn2.key"].mean((1, 2))[:, None],
    )
    return prompt, cached


def feeds_for(text: float, rows: int = 2) -> dict[str, Array]:
    return {
        "sample": np.ones((rows, 4), np.float32),
        "timestep": np.ones(rows, np.float32),
        "encoder_hidden_states": np.full((rows, 77, 2), text, np.float32),
        "text_embeds": np.zeros((rows, 3), np.float32),
    }


def test_it_has_the_inputs_and_outputs_of_the_whole_unet() -> None:
    unet = SplitUnet(*sessions())
    assert unet.spec == ModelSpec("unet", (SAMPLE, TIMESTEP, TEXT, EMBEDS), (OUT,))
    assert unet.backend == "fake"


def test_a_text_is_projected_once_however_it_comes_back() -> None:
    prompt, cached = sessions()
    unet = SplitUnet(prompt, cached)
    for text, rows in [(1, 2), (1, 2), (3, 2), (1, 2), (1, 1), (3, 2), (1, 1)]:
        found = unet(feeds_for(text, rows))["out_sample"]
        assert_array_equal(found, np.full((rows, 4), 1 + text, np.float32))
    assert (prompt.calls, cached.calls) == (3, 7)


def test_a_text_that_was_changed_in_place_is_projected_again() -> None:
    unet, feeds = SplitUnet(*sessions()), feeds_for(1)
    unet(feeds)
    feeds["encoder_hidden_states"][:] = 5
    assert_array_equal(unet(feeds)["out_sample"], np.full((2, 4), 6, np.float32))


def test_inputs_that_do_not_fit_are_named_as_those_of_the_unet() -> None:
    prompt, cached = sessions()
    unet, feeds = SplitUnet(prompt, cached), feeds_for(1)
    with pytest.raises(UsageError, match=r"unet: expected inputs .*'encoder_hidden_states'"):
        unet({name: value for name, value in feeds.items() if name != "encoder_hidden_states"})
    with pytest.raises(UsageError, match=r"unet\.encoder_hidden_states: expected shape .*2\), got \(2, 77, 3\)"):
        unet({**feeds, "encoder_hidden_states": np.zeros((2, 77, 3), np.float32)})
    assert prompt.calls == cached.calls == 0


def test_calls_that_are_too_large_to_keep_are_projected_every_step() -> None:
    prompt, cached = sessions()
    size = 2 * 77 * 4 * 4
    for nbytes, expected in ((size, 1), (size - 1, 3)):
        prompt.calls = 0
        unet = SplitUnet(prompt, cached, nbytes=nbytes)
        for _ in range(3):
            unet(feeds_for(1))
        assert prompt.calls == expected


@pytest.fixture(scope="module")
def split_bundle(family_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny SD 1.5 with both graphs beside its U-Net."""
    folder = tmp_path_factory.mktemp("split") / "sd15.bundle"
    shutil.copytree(family_bundle("sd15"), folder)
    manifest = load_manifest(folder)
    whole = manifest.artifact("unet", "fp32")
    assert whole is not None
    files, artifacts = dict(manifest.files), list(manifest.artifacts)
    graphs = split_prompt(ir.load(folder / whole.path))
    for component, graph in zip((PROMPT, CACHED), graphs, strict=True):
        path = f"unet/{component.removeprefix('unet_')}.onnx"
        ir.save(graph, folder / path)
        files[path] = record_of(folder / path)
        artifacts.append(dataclasses.replace(whole, component=component, path=path, files=(path,)))
    save_manifest(folder, dataclasses.replace(manifest, files=files, artifacts=tuple(artifacts)))
    return folder


@pytest.mark.parametrize(
    ("settings", "projected"),
    [
        ({"prompt": "a photo of a cat", "negative_prompt": "blurry"}, 1),
        ({"prompt": "a photo of a cat", "guidance": 1.0}, 1),
        ({"prompt": ["a cat", "a dog"], "batch": 2}, 1),
        ({"prompt": "a photo of a [cat:dog:0.5]"}, 2),
        ({"prompt": "a photo of a [cat|dog]"}, 2),
        ({"prompt": "a cat AND a dog :0.5", "guidance_interval": (0.0, 0.5)}, 2),
    ],
    ids=["guided", "unguided", "batch", "switch", "alternation", "composition"],
)
def test_pictures_are_the_whole_unets_bit_for_bit(
    settings: dict[str, Any],
    projected: int,
    split_bundle: Path,
    family_bundle: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: list[str] = []
    plain_call = OnnxSession.__call__

    def counted(self: OnnxSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
        outputs = plain_call(self, feeds)
        runs.extend(name for name in outputs if name.endswith("mid_block.attentions.0.transformer_blocks.0.attn2.key"))
        return outputs

    monkeypatch.setattr(OnnxSession, "__call__", counted)
    request = {"steps": 4, "seed": 3, "width": 64, "height": 64, **settings}
    whole = Pipeline.load(family_bundle("sd15"), backend="onnxruntime")(**request)
    assert not runs
    pipe = Pipeline.load(split_bundle, backend="onnxruntime")
    split = pipe(**request)
    assert isinstance(pipe.model.components["unet"], SplitUnet)
    assert_array_equal(split.latents, whole.latents)
    assert_array_equal(split.images, whole.images)
    assert len(runs) == projected
    pipe(**request)
    assert len(runs) == projected


def test_it_runs_only_where_both_graphs_fit(split_bundle: Path, family_bundle: Callable[[str], Path]) -> None:
    bundle = open_bundle(split_bundle)
    assert bundle.manifest is not None
    assert runs_split(bundle, "fp32", backend="onnxruntime")
    assert not runs_split(bundle, "fp32", backend="cuda")
    assert not runs_split(bundle, "fp32", backend="tensorrt")
    assert not runs_split(bundle, "fp16", backend="onnxruntime")
    assert not runs_split(open_bundle(family_bundle("sd15")), "fp32", backend="onnxruntime")
    whole = bundle.manifest.artifact("unet", "fp32")
    assert whole is not None
    rewritten = dataclasses.replace(whole, target="cpu")
    manifest = dataclasses.replace(bundle.manifest, artifacts=(*bundle.manifest.artifacts, rewritten))
    assert not runs_split(dataclasses.replace(bundle, manifest=manifest), "fp32", backend="onnxruntime")


def test_the_whole_unet_is_not_opened_beside_them(split_bundle: Path) -> None:
    components = Components.open(split_bundle, "fp32", backend="onnxruntime", verify=True)
    assert isinstance(components["unet"], SplitUnet)
    opened = [session for session in components._open.values() if isinstance(session, OnnxSession)]
    assert len(opened) == 2
