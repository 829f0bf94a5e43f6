"""Words from files: against diffusers' load_textual_inversion on the real graph, and on a small one of known sums."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_text_graph import WIDTH, write_encoder

from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.text_encoding import PromptEncoder, TextEncoder
from latentrt.runtime.textual_inversion import TextualInversion, load_textual_inversion, with_textual_inversions
from latentrt.runtime.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(Path(__file__).parents[2] / "examples" / "shapes" / "tokenizer")


def vectors(count: int, width: int = WIDTH, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def inversion(name: str, count: int = 2, width: int = WIDTH) -> TextualInversion:
    return TextualInversion((name,), {"": vectors(count, width)}, "")


@pytest.mark.parametrize(
    ("stem", "tensors", "names", "tables"),
    [
        ("easy", {"emb_params": vectors(3)}, ("easy",), {"": vectors(3)}),
        ("cat", {"<cat-toy>": vectors(1)[0]}, ("<cat-toy>", "cat"), {"": vectors(1)}),
        ("learned_embeds", {"<x>": vectors(2)}, ("<x>",), {"": vectors(2)}),
        (
            "xl",
            {"clip_l": vectors(2), "clip_g": vectors(2, 8)},
            ("xl",),
            {"clip_l": vectors(2), "clip_g": vectors(2, 8)},
        ),
    ],
)
def test_layouts(
    tmp_path: Path, stem: str, tensors: dict[str, Any], names: tuple[str, ...], tables: dict[str, Any]
) -> None:
    path = tmp_path / f"{stem}.safetensors"
    save_file(tensors, path, metadata={"made": "by a test"})
    loaded = load_textual_inversion(path)
    assert loaded.names == names
    assert len(loaded.sha256) == 64
    assert loaded.tables.keys() == tables.keys()
    for key, table in tables.items():
        np.testing.assert_array_equal(loaded.tables[key], table)
    assert load_textual_inversion(path, name="other").names == ("other",)


def test_dtypes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.from_numpy(vectors(2)).to(dtype)
        save_torch({"emb_params": tensor}, tmp_path / "x.safetensors")
        np.testing.assert_array_equal(
            load_textual_inversion(tmp_path / "x.safetensors").tables[""], tensor.float().numpy()
        )


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".PT"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UsageError, match=r"pickle.*save_file"):
        load_textual_inversion(tmp_path / f"missing{suffix}")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png"):
        load_textual_inversion(tmp_path / "x.png")
    with pytest.raises(ArtifactError, match="Check the path"):
        load_textual_inversion(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": vectors(1), "b": vectors(1)},
        {"emb_params": np.zeros((0, 4), np.float32)},
        {"emb_params": np.zeros((1, 2, 3), np.float32)},
        {"emb_params": np.full((1, 4), np.nan, np.float32)},
        {"emb_params": np.zeros((1, 4), np.int64)},
    ],
)
def test_what_is_no_textual_inversion(tmp_path: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError):
        load_textual_inversion(tmp_path / "x.safetensors")


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.binary(max_size=40), st.data()))
def test_damaged_files_are_one_error(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    if not isinstance(content, bytes):
        offsets = content.draw(st.one_of(st.none(), st.lists(st.integers(-4, 40) | st.none(), max_size=3)))
        entry = {"dtype": "F32", "shape": content.draw(st.lists(st.integers(-2, 4))), "data_offsets": offsets}
        header = json.dumps({"emb_params": content.draw(st.sampled_from([entry, [], None, 1]))}).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(32)
    path.write_bytes(content)
    try:
        loaded = load_textual_inversion(path)
    except ArtifactError:
        return
    assert loaded.tables[""].ndim == 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_encoder(tmp_path / "text_encoder" / "model.onnx", tokens=49408, length=77)
    return tmp_path


def opened(folder: Path) -> tuple[TextEncoder, Path]:
    path = folder / "text_encoder" / "model.onnx"
    return TextEncoder(OnnxSession(path, threads=1), TOKENIZER), path


def embedded(encoder: TextEncoder, text: str) -> np.ndarray[Any, Any]:
    """Token embeddings of a text, the positions of the small graph taken off."""
    (chunk,) = encoder.chunks(text)
    rng = np.random.default_rng(0)
    rng.standard_normal((49408, WIDTH))
    return encoder.run(chunk.input_ids)["last_hidden_state"] - rng.standard_normal((200, WIDTH))[:77].astype(np.float32)


def test_vectors_stand_where_the_word_does(folder: Path) -> None:
    encoder, path = opened(folder)
    easy, toy = inversion("easynegative", 3), TextualInversion(("<Cat-Toy>",), {"": vectors(1, seed=5)}, "")
    extended = with_textual_inversions(encoder, path, [easy, toy], threads=1)
    found = embedded(extended, "a EasyNegative, <cat-toy>, x")
    np.testing.assert_allclose(found[2:5], easy.tables[""], atol=1e-6)
    np.testing.assert_allclose(found[6], toy.tables[""][0], atol=1e-6)
    np.testing.assert_allclose(found[:2], embedded(encoder, "a")[:2], atol=1e-6)
    np.testing.assert_allclose(found[7:], embedded(encoder, ", x")[1:71], atol=1e-6)
    # Another word that only starts alike is no match.
    np.testing.assert_array_equal(embedded(extended, "easy"), embedded(encoder, "easy"))


def test_pooling_finds_eos_in_spite_of_higher_ids(folder: Path) -> None:
    """CLIP configs with eos_token_id 2 pool at the largest id, which a new word's must not be."""
    encoder, path = opened(folder)
    extended = with_textual_inversions(encoder, path, [inversion("zebra")], threads=1)
    outputs = extended.run(extended.chunks("a zebra, here")[0].input_ids)
    np.testing.assert_array_equal(outputs["text_embeds"], outputs["last_hidden_state"][6])
    assert extended.eos_row == 49410


def test_pooling_at_eos_stays(folder: Path) -> None:
    write_encoder(folder / "text_encoder" / "model.onnx", tokens=49408, length=77, argmax=False)
    encoder, path = opened(folder)
    extended = with_textual_inversions(encoder, path, [inversion("zebra")], threads=1)
    outputs = extended.run(extended.chunks("a zebra, here")[0].input_ids)
    np.testing.assert_array_equal(outputs["text_embeds"], outputs["last_hidden_state"][6])
    assert extended.eos_row is None


def test_external_data_is_found(tmp_path: Path) -> None:
    write_encoder(tmp_path / "text_encoder" / "model.onnx", tokens=49408, length=77, external=True)
    encoder, path = opened(tmp_path)
    extended = with_textual_inversions(encoder, path, [inversion("zebra")], threads=1)
    np.testing.assert_allclose(embedded(extended, "zebra")[1:3], vectors(2), atol=1e-6)


def test_a_cache_does_not_mix_encoders(folder: Path) -> None:
    encoder, path = opened(folder)
    plain = PromptEncoder([encoder])
    extended = PromptEncoder([with_textual_inversions(encoder, path, [inversion("zebra")])], cache=plain.cache)
    assert np.abs(plain("zebra").hidden - extended("zebra").hidden).max() > 0.1
    np.testing.assert_array_equal(plain("a horse").hidden, extended("a horse").hidden)


def test_none_is_the_same_encoder(folder: Path) -> None:
    encoder, path = opened(folder)
    extended = with_textual_inversions(encoder, path, [], threads=1)
    np.testing.assert_array_equal(embedded(extended, "zebra"), embedded(encoder, "zebra"))


def test_sdxl_files_serve_both_encoders() -> None:
    xl = TextualInversion(("xl",), {"clip_l": vectors(2, 768), "clip_g": vectors(2, 1280)}, "")
    assert xl.vectors("text_encoder", 768).shape == (2, 768)
    assert xl.vectors("text_encoder_2", 1280).shape == (2, 1280)
    with pytest.raises(UsageError, match="expected vectors 1024 wide for text_encoder"):
        xl.vectors("text_encoder", 1024)


def test_the_wrong_model_is_named(folder: Path) -> None:
    encoder, path = opened(folder)
    with pytest.raises(UsageError, match=r"6 wide for text_encoder, got 768\. .* for Stable Diffusion 1\.x"):
        with_textual_inversions(encoder, path, [inversion("old", width=768)])


def test_what_cannot_be_added(folder: Path) -> None:
    encoder, path = opened(folder)
    with pytest.raises(UsageError, match="at most 75 vectors"):
        with_textual_inversions(encoder, path, [inversion("long", 76)])
    with pytest.raises(UsageError, match="taken"):
        with_textual_inversions(encoder, path, [inversion("cat"), inversion("Cat")])
    with pytest.raises(UsageError, match="empty"):
        with_textual_inversions(encoder, path, [inversion(" ")])


@pytest.mark.parametrize("precision", ["model.onnx", "model.fp16.onnx"])
def test_the_shapes_bundle_against_diffusers(
    tmp_path: Path, shapes_bundle: Path, shapes_checkpoint: Path, precision: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import torch

        reference = diffusers.StableDiffusionPipeline.from_pretrained(
            shapes_checkpoint, vae=None, unet=None, safety_checker=None, requires_safety_checker=False
        )
        reference.text_encoder.float()
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<cat-toy>": 0.05 * vectors(3, 64)}, path)
    reference.load_textual_inversion(path.parent, weight_name=path.name)
    prompt = "a <cat-toy>, on a blue background"
    with torch.no_grad():
        wanted = reference.encode_prompt(prompt, "cpu", 1, False)[0][0].numpy()
    graph = shapes_bundle / "text_encoder" / precision
    encoder = TextEncoder(OnnxSession(graph, threads=1), load_tokenizer(shapes_bundle / "tokenizer"))
    ours = PromptEncoder([with_textual_inversions(encoder, graph, [load_textual_inversion(path)], threads=1)])
    bound = 1e-4 if precision == "model.onnx" else 2e-2
    assert np.abs(ours(prompt).hidden - wanted).max() <= bound
    assert np.abs(PromptEncoder([encoder])(prompt).hidden - wanted).max() > 0.1
