from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from latentrt.export.clip_tokenizer import END, START, VOCABULARY_SIZE, tokenizer_files, vocabulary
from latentrt.runtime.tokenizer import load_tokenizer

PROMPTS = [
    "a photo of a cat",
    "An astronaut riding a horse, 8k; trending on ArtStation!! (masterpiece:1.2)",
    "it's Zoë's café, naïve façade, 東京 Ελλάδα 🎉 1234",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(END).items():
        (folder / name).write_bytes(content)
    return folder


def test_the_vocabulary_is_clips() -> None:
    tokens = vocabulary()
    assert len(tokens) == VOCABULARY_SIZE == 49408
    assert sorted(tokens.values()) == list(range(49408))
    known = {"!": 0, '"': 1, "!</w>": 256, "in": 512, "th": 513, "a</w>": 320, START: 49406, END: 49407}
    assert {token: tokens[token] for token in known} == known


def test_known_prompts_have_their_known_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert tokenizer.encode("an astronaut riding a horse") == [550, 18376, 6765, 320, 4558]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (49406, 49407, 49407)


def test_transformers_reads_the_same_from_the_files(folder: Path) -> None:
    theirs = CLIPTokenizer.from_pretrained(folder)
    expected = theirs(PROMPTS, padding="max_length", max_length=77, return_tensors="np").input_ids
    np.testing.assert_array_equal(load_tokenizer(folder)(PROMPTS), expected)


def test_open_clip_pads_with_id_zero(tmp_path: Path) -> None:
    for name, content in tokenizer_files("!").items():
        (tmp_path / name).write_bytes(content)
    row = load_tokenizer(tmp_path)(["a cat"])[0]
    assert row.tolist() == [49406, 320, 2368, 49407, *[0] * 73]
