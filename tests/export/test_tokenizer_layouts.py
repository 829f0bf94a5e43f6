"""The files that older releases of transformers need, made from the one that the newest writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tiny import write_tiny_tokenizer

from latentrt.export.clip_tokenizer import tokenizer_files
from latentrt.export.networks import libraries_quiet
from latentrt.export.tokenizer_layouts import with_slow_files

VOCABULARY, MERGES = "tokenizer/vocab.json", "tokenizer/merges.txt"


@pytest.fixture(params=["tiny", "clip"])
def originals(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, bytes]:
    """A tokenizer in the layout of transformers 4."""
    if request.param == "tiny":
        folder = write_tiny_tokenizer(tmp_path / "slow")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    else:
        files = tokenizer_files("!")
    return {f"tokenizer/{name}": content for name, content in files.items()}


def saved_by_transformers(texts: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """The same tokenizer as the installed release writes it: in one file."""
    source, target = folder / "source", folder / "target"
    source.mkdir()
    for name, content in texts.items():
        (source / Path(name).name).write_bytes(content)
    with libraries_quiet():
        transformers.CLIPTokenizer.from_pretrained(source).save_pretrained(target)
    return {f"tokenizer/{path.name}": path.read_bytes() for path in target.iterdir()}


def test_vocabulary_and_merges_are_those_that_the_tokenizer_was_made_from(
    originals: dict[str, bytes], tmp_path: Path
) -> None:
    new = saved_by_transformers(originals, tmp_path)
    assert "tokenizer/tokenizer.json" in new
    assert {VOCABULARY, MERGES}.isdisjoint(new)
    found = with_slow_files(new)
    assert {name: found[name] for name in new} == new
    vocabulary = json.loads(found[VOCABULARY])
    assert vocabulary == json.loads(originals[VOCABULARY])
    assert list(vocabulary.values()) == list(range(len(vocabulary)))
    # A line with the version, then a merge a line.
    merges, wanted = (texts[MERGES].decode().splitlines() for texts in (found, originals))
    assert merges[0].startswith("#version")
    assert merges[1:] == wanted[1:]
    assert found[MERGES].endswith(b"\n")


def test_a_tokenizer_of_the_derived_files_is_the_same(originals: dict[str, bytes], tmp_path: Path) -> None:
    new = saved_by_transformers(originals, tmp_path)
    slow = {name: content for name, content in with_slow_files(new).items() if name != "tokenizer/tokenizer.json"}
    folder = tmp_path / "again"
    folder.mkdir()
    assert saved_by_transformers(slow, folder)["tokenizer/tokenizer.json"] == new["tokenizer/tokenizer.json"]


def test_merges_written_as_lists_and_as_strings_are_the_same() -> None:
    pairs = [["a", "b"], ["ab", "c</w>"], ["#", "#"]]

    def made(merges: list[str] | list[list[str]]) -> bytes:
        model = {"vocab": {"a": 0}, "merges": merges}
        return with_slow_files({"tokenizer_2/tokenizer.json": json.dumps({"model": model}).encode()})[
            "tokenizer_2/merges.txt"
        ]

    assert made(pairs) == made([" ".join(pair) for pair in pairs]) == b"#version: 0.2\na b\nab c</w>\n# #\n"


def test_files_that_are_there_stay_and_other_texts_too(originals: dict[str, bytes], tmp_path: Path) -> None:
    both = {**saved_by_transformers(originals, tmp_path), VOCABULARY: b"{}", MERGES: b"", "model_index.json": b"{ }"}
    assert with_slow_files(both) == both
    assert with_slow_files(originals) == originals
