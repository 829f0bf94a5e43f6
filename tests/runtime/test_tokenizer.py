"""Against transformers' CLIP tokenizer, on the real 49 408-token vocabulary."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.tokenizer import ClipTokenizer, PromptTruncatedWarning, load_tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "shapes" / "tokenizer"


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def ours() -> ClipTokenizer:
    return load_tokenizer(FOLDER)


PROMPTS = [
    "",
    "a small red circle on a blue background",
    "A  Photo,of\n\tan ASTRONAUT!!  riding a horse's back (8k, f/1.8) :-)",
    "naïve café Ünïcödé 日本語 🙂 ﬁ",
    "it's they'll we've 1234567890 <|endoftext|> x",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_transformers(prompt: str, reference: Any, ours: ClipTokenizer) -> None:
    wanted = reference([prompt], padding="max_length", max_length=77, truncation=True).input_ids
    np.testing.assert_array_equal(ours([prompt]), wanted)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_any_text_gives_the_same_row(prompt: str) -> None:
    from transformers import CLIPTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncatedWarning)
        row = _ours()([prompt])
    if not hasattr(_ours, "reference"):
        _ours.reference = CLIPTokenizer.from_pretrained(FOLDER)  # type: ignore[attr-defined]
    wanted = _ours.reference([prompt], padding="max_length", max_length=77, truncation=True).input_ids  # type: ignore[attr-defined]
    np.testing.assert_array_equal(row, wanted)


_CACHE: list[ClipTokenizer] = []


def _ours() -> ClipTokenizer:
    if not _CACHE:
        _CACHE.append(load_tokenizer(FOLDER))
    return _CACHE[0]


def test_a_long_prompt_is_cut_and_the_cut_is_shown(reference: Any, ours: ClipTokenizer) -> None:
    prompt = "red " * 75 + "and then a Green square"
    with pytest.warns(PromptTruncatedWarning, match="and then a Green square"):
        row = ours([prompt])
    wanted = reference([prompt], padding="max_length", max_length=77, truncation=True).input_ids
    np.testing.assert_array_equal(row, wanted)


def test_75_tokens_still_fit(ours: ClipTokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = ours(["red " * 75])[0]
    assert row[0] == ours.bos
    assert row[-1] == ours.eos


def test_the_layout_of_transformers_5(tmp_path: Path, reference: Any, ours: ClipTokenizer) -> None:
    """It saves tokenizer.json only."""
    reference.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink(missing_ok=True)
    assert (tmp_path / "tokenizer.json").exists()
    np.testing.assert_array_equal(load_tokenizer(tmp_path)(PROMPTS), ours(PROMPTS))


def test_padding_follows_the_checkpoint(tmp_path: Path) -> None:
    """SD 2.x pads with "!", whose id is 0."""
    shutil.copytree(FOLDER, tmp_path / "t")
    config = tmp_path / "t" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": {"content": "!"}}))
    assert load_tokenizer(tmp_path / "t")(["red"])[0].tolist()[-3:] == [0, 0, 0]


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_damaged_folders(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "t"
    shutil.copytree(FOLDER, folder)
    if damage == "missing":
        (folder / "vocab.json").unlink()
    elif damage == "truncated":
        (folder / "vocab.json").write_bytes((folder / "vocab.json").read_bytes()[:5000])
    else:
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps({"pad_token": "<nowhere>"}))
    with pytest.raises(ArtifactError):
        load_tokenizer(folder)


ADDED = ["<Cat-Toy>", "<Cat-Toy>_1", "<Cat-Toy>_2", "<single>"]
WITH_ADDED = ["a <cat-toy>, here", "<Cat-Toy><single>x<Cat-Toy>_1 y", "cat toy <single> (<single>)"]


def _layout(folder: Path, version: str, reference: Any) -> None:
    """A tokenizer with added tokens, as transformers 5 saves it, or in one of transformers 4's two ways."""
    if version == "5":
        reference.add_tokens(ADDED)
        reference.save_pretrained(folder)
        return
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    first = 49408
    if version == "4 file":
        (folder / "added_tokens.json").write_text(json.dumps({t: first + i for i, t in enumerate(ADDED)}))
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        decoder = {str(first + i): {"content": t, "normalized": True} for i, t in enumerate(ADDED)}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": decoder}))


@pytest.mark.parametrize("version", ["5", "4 file", "4 config"])
def test_added_tokens_are_those_of_transformers(tmp_path: Path, version: str) -> None:
    from transformers import CLIPTokenizer

    _layout(tmp_path, version, CLIPTokenizer.from_pretrained(FOLDER))
    reference, tokenizer = CLIPTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    if version != "5":  # transformers 5 no longer reads them
        reference.add_tokens(ADDED)
    for text in WITH_ADDED:
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False).input_ids
    assert tokenizer.multi_vector_words == {
        (49408,): (49408, 49409, 49410),
        (49408, 49409, 49410): (49408, 49409, 49410),
    }


def test_added_tokens_at_other_ids_are_refused(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "t")
    (tmp_path / "t" / "added_tokens.json").write_text(json.dumps({"<late>": 49500}))
    with pytest.raises(ArtifactError, match="49500"):
        load_tokenizer(tmp_path / "t")


def test_tokens_added_at_run_time_leave_the_original_alone(ours: ClipTokenizer) -> None:
    before = ours.encode("a <x>, b")
    assert ours.with_tokens(["<x>"]).encode("a <x>, b") == [*ours.encode("a"), 49408, *ours.encode(", b")]
    assert ours.encode("a <x>, b") == before
    assert ours.with_tokens([]) is ours
