"""Textual inversions folded in at export: against diffusers' load_textual_inversion, and in the runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from latentrt.export.checkpoint_parts import Part, open_part
from latentrt.export.fold_embeddings import folded
from latentrt.export.networks import libraries_quiet
from latentrt.export.weights import Weight, of_array
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.text_chunks import chunk_prompt
from latentrt.runtime.textual_inversion import TextualInversion, load_textual_inversion
from latentrt.runtime.tokenizer import load_tokenizer

CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd21": "StableDiffusionPipeline",
    "sdxl_base": "StableDiffusionXLPipeline",
}
PROMPTS = ("a red <cat>, blue", "bl <cat> on <cat> <dog>", "<dog>", "red")
WIDTH = 32


def vectors(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def embedding(name: str, count: int, *, seed: int = 0) -> TextualInversion:
    tables = {"clip_l": vectors(count, seed), "clip_g": vectors(count, seed + 1)}
    return TextualInversion((name,), tables, "0" * 64)


def checkpoint(folder: Path) -> tuple[dict[str, Part], dict[str, bytes]]:
    """The text encoders and the tokenizers' files of a checkpoint."""
    parts = {name: open_part(name, folder / name, kind) for name, kind in CLASSES.items() if (folder / name).is_dir()}
    files = [file for name in parts for file in (folder / name.replace("text_encoder", "tokenizer")).iterdir()]
    return parts, {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}


def as_tokenizer_json(texts: Mapping[str, bytes], folder: Path) -> dict[str, bytes]:
    """The tokenizers as transformers 5 saves them."""
    from transformers import CLIPTokenizer

    found: dict[str, bytes] = {}
    write(texts, folder / "old")
    for name in {Path(file).parent.name for file in texts}:
        CLIPTokenizer.from_pretrained(folder / "old" / name).save_pretrained(folder / "new" / name)
        found |= {f"{name}/{file.name}": file.read_bytes() for file in (folder / "new" / name).iterdir()}
    return found


def write(texts: Mapping[str, bytes], folder: Path) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


def network(part: Part) -> Any:
    """A text encoder of transformers from its config and weights, which have to be just its own."""
    import transformers

    model_class = getattr(transformers, part.model_class)
    model = model_class(transformers.CLIPTextConfig(**part.config)).eval()
    expected = model.state_dict()
    values = {name: torch.from_numpy(np.array(weight.read())) for name, weight in part.weights.items()}
    values = {name if name in expected else name.removeprefix("text_model."): value for name, value in values.items()}
    model.load_state_dict(values)
    return model.requires_grad_(False)


def with_tokens(pipeline: Any, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Any:
    """A diffusers pipeline with textual inversions by token, each with tables for one or two text encoders."""
    for token, tables in tensors.items():
        for table, suffix in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = (getattr(pipeline, name + suffix, None) for name in ("text_encoder", "tokenizer"))
            if encoder is not None:
                pipeline.load_textual_inversion({token: tables[table]}, text_encoder=encoder, tokenizer=tokenizer)
    return pipeline


def encoded(pipeline: Any, prompt: str) -> list[np.ndarray[Any, Any]]:
    """What the U-Net is conditioned on: hidden states, and in SDXL the pooled embedding."""
    with torch.no_grad():
        found = pipeline.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return [value[0].numpy() for value in found if value is not None]


def check(found: list[np.ndarray[Any, Any]], wanted: list[np.ndarray[Any, Any]]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("layout", ["vocab.json", "tokenizer.json", "both"])
def test_diffusers_and_the_runtime(
    tmp_path: Path, family_sources: Callable[[str], Any], family: str, layout: str
) -> None:
    parts, texts = checkpoint(family_sources(family).path)
    with libraries_quiet():
        import diffusers
        from transformers import CLIPTokenizer

        load = getattr(diffusers, PIPELINES[family]).from_pretrained
        options = {"local_files_only": True, "vae": None, "unet": None, "safety_checker": None}
        embeddings = [embedding("<cat>", 3), embedding("<dog>", 1, seed=5)]
        reference = with_tokens(
            load(family_sources(family).path, **options),
            {e.names[0]: {key: torch.from_numpy(value) for key, value in e.tables.items()} for e in embeddings},
        )
        if layout != "vocab.json":
            texts = (texts if layout == "both" else {}) | as_tokenizer_json(texts, tmp_path)
        changed, files = folded(parts, texts, embeddings)
        write(files, tmp_path / "folded")
        replaced = {name: network(part) for name, part in changed.items()}
        names = [name.replace("text_encoder", "tokenizer") for name in changed]
        replaced |= {name: CLIPTokenizer.from_pretrained(tmp_path / "folded" / name) for name in names}
        ours = load(family_sources(family).path, **options, **replaced)
    for name in names:
        # So that the reference pools at the end of a text too, see test_pooling.
        own = getattr(reference, name.replace("tokenizer", "text_encoder"))
        getattr(own, "text_model", own).eos_token_id = getattr(reference, name).eos_token_id
    for prompt in PROMPTS:
        check(encoded(ours, prompt), encoded(reference, prompt))
        for name in names:
            tokenizer = getattr(reference, name)
            text = reference.maybe_convert_prompt(prompt, tokenizer)
            ids = tokenizer(text, padding="max_length", max_length=77).input_ids
            (chunk,) = chunk_prompt(prompt, load_tokenizer(tmp_path / "folded" / name))
            np.testing.assert_array_equal(chunk.input_ids, ids)
    plain = encoded(load(family_sources(family).path, **options), PROMPTS[0])
    assert np.abs(plain[0] - encoded(ours, PROMPTS[0])[0]).max() > 0.1


def test_pooling(tmp_path: Path, family_sources: Callable[[str], Any]) -> None:
    """The pooled embedding is that of the text's end; transformers takes that of the largest id, here a new word's."""
    parts, texts = checkpoint(family_sources("sdxl_base").path)
    assert parts["text_encoder_2"].config["eos_token_id"] == 2
    changed, files = folded(parts, texts, [embedding("<cat>", 1)])
    tokenizer = load_tokenizer(write(files, tmp_path) / "tokenizer_2")
    config = changed["text_encoder_2"].config
    assert (config["eos_token_id"], config["vocab_size"]) == (tokenizer.eos, tokenizer.eos + 2)
    (chunk,) = chunk_prompt("a <cat>, red", tokenizer)
    ids = torch.from_numpy(chunk.input_ids[None])
    with libraries_quiet(), torch.no_grad():
        model = network(changed["text_encoder_2"])
        found = model(ids)
        end = int(np.flatnonzero(chunk.input_ids == tokenizer.eos)[0])
        torch.testing.assert_close(found.text_embeds, model.text_projection(found.last_hidden_state[:, end]))
        (model.text_model if hasattr(model, "text_model") else model).eos_token_id = 2
        assert (model(ids).text_embeds - found.text_embeds).abs().max() > 0.1


def test_a_config_of_todays_keeps_its_end(family_sources: Callable[[str], Any]) -> None:
    parts, texts = checkpoint(family_sources("sd15").path)
    part = replace(parts["text_encoder"], config={**parts["text_encoder"].config, "eos_token_id": 518})
    changed, _ = folded({"text_encoder": part}, texts, [embedding("<cat>", 1)])
    assert changed["text_encoder"].config["eos_token_id"] == 518


def test_only_text_encoders_change_and_lazily(tmp_path: Path, family_sources: Callable[[str], Any]) -> None:
    parts, texts = checkpoint(family_sources("sd15").path)
    table = "embeddings.token_embedding.weight"
    name = next(name for name in parts["text_encoder"].weights if name.endswith(table))
    before = parts["text_encoder"].weights[name]

    def fail() -> Any:
        raise AssertionError("read")

    for dtype, read in ((before.dtype, fail), (np.dtype(np.float16), lambda: before.read().astype(np.float16))):
        weights = {**parts["text_encoder"].weights, name: Weight(before.shape, dtype, read)}
        given = {"text_encoder": replace(parts["text_encoder"], weights=weights), "unet": parts["text_encoder"]}
        changed, files = folded(given, {**texts, "model_index.json": b"{}"}, [embedding("<cat>", 2)])
        assert changed["unet"] is given["unet"]
        assert {key for key in files if files[key] != texts.get(key)} == {
            "tokenizer/added_tokens.json",
            "model_index.json",
        }
        grown = changed["text_encoder"].weights[name]
        assert (grown.shape, grown.dtype) == ((before.shape[0] + 2, WIDTH), np.dtype(np.float32))
        assert [key for key in weights if changed["text_encoder"].weights[key] is not weights[key]] == [name]
    np.testing.assert_array_equal(grown.read()[:-2], before.read().astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(grown.read()[-2:], vectors(2, 0))
    assert changed["text_encoder"].changes == (
        {"kind": "textual_inversion", "token": "<cat>", "vectors": 2, "sha256": "0" * 64},
    )


def test_rows_beyond_the_tokens(family_sources: Callable[[str], Any]) -> None:
    """A table that was padded to a round size takes new tokens where the tokenizer puts them."""
    parts, texts = checkpoint(family_sources("sd15").path)
    name = next(name for name in parts["text_encoder"].weights if name.endswith("token_embedding.weight"))
    table = parts["text_encoder"].weights[name].read()
    padded = np.concatenate([table, np.zeros((5, WIDTH), np.float32)])
    part = replace(parts["text_encoder"], weights={**parts["text_encoder"].weights, name: of_array(padded)})
    changed, files = folded({"text_encoder": part}, texts, [embedding("<cat>", 2)])
    wanted = np.concatenate([table, vectors(2, 0), np.zeros((3, WIDTH), np.float32)])
    np.testing.assert_array_equal(changed["text_encoder"].weights[name].read(), wanted)
    assert json.loads(files["tokenizer/added_tokens.json"]) == {"<cat>": len(table), "<cat>_1": len(table) + 1}
    short = {**part.weights, name: of_array(table[:-1])}
    with pytest.raises(ArtifactError, match="belong to different models"):
        folded({"text_encoder": replace(part, weights=short)}, texts, [embedding("<cat>", 2)])


def test_tokens_that_a_config_lists(tmp_path: Path, family_sources: Callable[[str], Any]) -> None:
    """transformers 4 lists added tokens in the tokenizer's config too, and goes by that."""
    parts, texts = checkpoint(family_sources("sd15").path)
    first, files = folded(parts, texts, [embedding("<cat>", 1)])
    number = json.loads(files["tokenizer/added_tokens.json"])["<cat>"]
    config = json.loads(files["tokenizer/tokenizer_config.json"])
    config["added_tokens_decoder"] = {str(number): {"content": "<cat>", "special": False}}
    files["tokenizer/tokenizer_config.json"] = json.dumps(config).encode()
    _, files = folded(first, files, [embedding("<dog>", 1)])
    decoder = json.loads(files["tokenizer/tokenizer_config.json"])["added_tokens_decoder"]
    assert {index: token["content"] for index, token in decoder.items()} == {
        str(number): "<cat>",
        str(number + 1): "<dog>",
    }
    assert load_tokenizer(write(files, tmp_path) / "tokenizer").encode("<dog><cat>") == [number + 1, number]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([embedding("red</w>", 1)], "taken"),
        ([embedding("<cat>", 2), embedding("<cat>_1", 1)], "taken"),
        ([embedding("<cat>_1", 1), embedding("<cat>", 1)], "taken"),
        ([embedding("<cat>", 1), embedding("<CAT>", 1)], "taken"),
        ([embedding(" ", 1)], "empty"),
        ([embedding("<cat>", 76)], "at most 75"),
        ([TextualInversion(("<cat>",), {"": np.ones((1, 768), np.float32)}, "")], "Stable Diffusion 1.x"),
    ],
)
def test_what_cannot_be_added(
    family_sources: Callable[[str], Any], given: list[TextualInversion], message: str
) -> None:
    parts, texts = checkpoint(family_sources("sd15").path)
    with pytest.raises(UsageError, match=message):
        folded(parts, texts, given)


def test_damaged_tokenizers(family_sources: Callable[[str], Any]) -> None:
    parts, texts = checkpoint(family_sources("sd15").path)
    with pytest.raises(ArtifactError, match=r"text_encoder: expected a whole CLIP tokenizer for text_encoder"):
        folded(parts, {**texts, "tokenizer/merges.txt": b"\xff"}, [embedding("<cat>", 1)])
    with pytest.raises(ArtifactError, match=r"tokenizer's tokenizer\.json"):
        folded(parts, {**texts, "tokenizer/tokenizer.json": b"[1]"}, [embedding("<cat>", 1)])
    assert folded(parts, texts, []) == (parts, texts)


def test_files_of_the_runtime(tmp_path: Path, family_sources: Callable[[str], Any]) -> None:
    """What the runtime reads, of all layouts, under the name that it gives first."""
    parts, texts = checkpoint(family_sources("sd15").path)
    save_file({"emb_params": vectors(2, 0)}, tmp_path / "easy.safetensors")
    _, files = folded(parts, texts, [load_textual_inversion(tmp_path / "easy.safetensors")])
    assert list(json.loads(files["tokenizer/added_tokens.json"])) == ["easy", "easy_1"]
