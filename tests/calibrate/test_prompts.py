from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.calibrate.prompts import BUILT_IN, MOST_CHARACTERS, load_prompts, split_prompts
from latentrt.runtime.errors import UsageError
from latentrt.runtime.text_chunks import chunk_prompt
from latentrt.runtime.tokenizer import load_tokenizer

COUNTS = st.tuples(*[st.integers(1, 40)] * 3)


@pytest.mark.parametrize(("name", "least"), [("everyday", 256), ("shapes", 384)])
def test_built_in_sets(name: str, least: int, shapes_checkpoint: Path) -> None:
    prompts = load_prompts(name)
    assert len(prompts) >= least
    lines = (Path(__file__).parents[2] / "calibrate" / BUILT_IN[name]).read_text("ascii").splitlines()
    assert list(prompts) == lines[1:], "a prompt is there twice, or is no prompt"
    assert len({" ".join(prompt.lower().split()) for prompt in prompts}) == len(prompts)
    tokenizer = load_tokenizer(shapes_checkpoint / "tokenizer")
    assert {len(chunk_prompt(prompt, tokenizer)) for prompt in prompts} == {1}


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    farmer = "👩‍🌾\ton\u00a0a field"
    lines = [
        "\ufeff# a comment",
        "",
        "  a café (at night:1.2)  \r",
        "ein Hund",
        "a café (at night:1.2)",
        "夜の街",
        farmer,
    ]
    file.write_bytes("\n".join(lines).encode())
    assert load_prompts(file) == ("a café (at night:1.2)", "ein Hund", "夜の街", farmer)
    assert load_prompts(str(file)) == load_prompts(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected 3 or more different prompts, one a line, got 0"),
        (b"# only\n\n# comments\n", "got 0"),
        (b"a cat\n", "got 1"),
        (b"a cat\na dog\na cat\n", "got 2"),
        (b"a cat\na \xff dog\n", "expected UTF-8 text, got a byte that is none at 8"),
        (b"a cat\n" + b"x" * (MOST_CHARACTERS + 1), "line 2: expected at most 3000 characters, got 3001"),
        (b"a cat\na dog AND a bird\n", "line 2: expected one prompt, got several joined by AND"),
        (b"a cat\na\0dog\n", "line 2: expected text, got control characters"),
    ],
)
def test_files_that_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_prompts(file)
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)


def test_no_such_file_or_set(tmp_path: Path) -> None:
    for missing in (tmp_path / "missing.txt", tmp_path, "every-day"):
        with pytest.raises(UsageError, match="or one of the sets everyday, shapes"):
            load_prompts(missing)


@given(counts=COUNTS, seed=st.integers(0, 2**63), spare=st.integers(0, 9), more=st.integers(0, 9))
def test_a_split(counts: tuple[int, int, int], seed: int, spare: int, more: int) -> None:
    prompts = [f"prompt {index}" for index in range(sum(counts) + spare + more)]
    split = split_prompts(prompts, seed, counts)
    parts = (split.calibration, split.search, split.verification)
    assert tuple(map(len, parts)) == counts
    assert len({*split.calibration, *split.search, *split.verification}) == sum(counts)
    assert {prompt for part in parts for prompt in part} <= {*prompts}
    assert split_prompts(prompts, seed, counts) == split
    # More to calibrate with: what results are judged by stays, and so does what there was.
    larger = split_prompts(prompts, seed, (counts[0] + more, counts[1], counts[2]))
    assert (larger.verification, larger.search) == (split.verification, split.search)
    assert larger.calibration[: counts[0]] == split.calibration


def test_another_seed_holds_others_out() -> None:
    prompts = [f"prompt {index}" for index in range(100)]
    first, second = (split_prompts(prompts, seed, (10, 10, 20)).verification for seed in (0, 1))
    assert {*first} != {*second}


@pytest.mark.parametrize(
    ("counts", "said"),
    [((5, 3, 3), "expected 11 different ones"), ((0, 3, 3), "1 or more for each part"), ((3, -1, 3), "1 or more")],
)
def test_splits_that_cannot_be(counts: tuple[int, int, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        split_prompts([str(index) for index in range(10)], 0, counts)


def test_a_repeated_prompt_would_be_on_both_sides() -> None:
    with pytest.raises(UsageError, match="got 1 again"):
        split_prompts(["a", "b", "c", "a"], 0, (1, 1, 1))
