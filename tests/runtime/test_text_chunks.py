"""Rows of long prompts: against ClipTokenizer for short ones, worked out by hand from the web UI's rules for long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.text_chunks import TextChunk, Words, chunk_prompt
from latentrt.runtime.tokenizer import ClipTokenizer, load_tokenizer

TOKENIZER = load_tokenizer(Path(__file__).parents[2] / "examples" / "shapes" / "tokenizer")
RED, BLUE, COMMA = (TOKENIZER.encode(word)[0] for word in ("red", "blue", ","))
LONG_WORD: Words = {(BLUE,): tuple(range(50_000, 50_008))}


def body(chunk: TextChunk, tokenizer: ClipTokenizer = TOKENIZER) -> list[int]:
    """The tokens between BOS and EOS, the frame checked."""
    ids: list[int] = chunk.input_ids.tolist()
    assert len(ids) == len(chunk.weights) == tokenizer.length
    assert ids[0] == tokenizer.bos
    end = ids.index(tokenizer.eos)
    assert ids[end + 1 :] == [tokenizer.pad] * (len(ids) - end - 1)
    return ids[1:end]


def bodies(text: str, **options: object) -> list[list[int]]:
    return [body(chunk) for chunk in chunk_prompt(text, TOKENIZER, **options)]  # type: ignore[arg-type]


WORDS = st.lists(st.sampled_from(["red", "blue", ",", "naïve", "日本", "it's", "8k", "x:y"]), max_size=200).map(
    " ".join
)


@settings(deadline=None)
@given(WORDS)
def test_a_short_prompt_is_the_tokenizers_row(text: str) -> None:
    if len(TOKENIZER.encode(text)) > 75:
        return
    (chunk,) = chunk_prompt(text, TOKENIZER)
    np.testing.assert_array_equal(chunk.input_ids, TOKENIZER([text])[0])
    assert (chunk.weights == 1).all()


@settings(deadline=None)
@given(WORDS, st.sampled_from([0, 5, 20]))
def test_no_token_is_lost_or_moved(text: str, backtrack: int) -> None:
    rows = bodies(text, backtrack=backtrack)
    assert [token for row in rows for token in row] == TOKENIZER.encode(text)
    assert all(rows) or len(rows) == 1


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_has_rows(text: str) -> None:
    assert len(chunk_prompt(text, TOKENIZER)) >= 1
    assert len(chunk_prompt(text, TOKENIZER, attention=False)) >= 1


def test_the_empty_prompt_is_one_row() -> None:
    assert bodies("") == [[]]


def test_75_tokens_are_one_row_and_76_are_two() -> None:
    assert bodies("red " * 75) == [[RED] * 75]
    assert bodies("red " * 76) == [[RED] * 75, [RED]]
    assert bodies("red " * 151) == [[RED] * 75, [RED] * 75, [RED]]


@pytest.mark.parametrize(
    ("before", "after", "rows"),
    [
        # The 76th token finds a comma 20 tokens back or nearer: what follows the comma moves on.
        (60, 15, [[RED] * 60 + [COMMA], [BLUE] * 15]),
        (55, 20, [[RED] * 55 + [COMMA], [BLUE] * 20]),
        (54, 21, [[RED] * 54 + [COMMA] + [BLUE] * 20, [BLUE]]),
        (74, 1, [[RED] * 74 + [COMMA], [BLUE]]),
        # The 76th token is the comma itself: it just goes to the next row.
        (75, 1, [[RED] * 75, [COMMA, BLUE]]),
        # The row is full, but nothing follows.
        (60, 14, [[RED] * 60 + [COMMA] + [BLUE] * 14]),
    ],
)
def test_the_comma_rule(before: int, after: int, rows: list[list[int]]) -> None:
    assert bodies("red " * before + ", " + "blue " * after) == rows


def test_the_comma_rule_switched_off() -> None:
    assert bodies("red " * 60 + ", " + "blue " * 15, backtrack=0) == [[RED] * 60 + [COMMA] + [BLUE] * 14, [BLUE]]


def test_the_last_comma_counts_and_weights_move_with_their_tokens() -> None:
    text = "red " * 60 + ", blue, (blue blue:1.5) " + "blue " * 15
    first, second = chunk_prompt(text, TOKENIZER)
    assert body(first) == [RED] * 60 + [COMMA, BLUE, COMMA]
    assert second.weights[1:18].tolist() == [1.5, 1.5] + [1.0] * 15
    assert (first.weights == 1).all()


def test_break_opens_a_row() -> None:
    assert bodies("red BREAK blue") == [[RED], [BLUE]]
    assert bodies("red BREAK") == [[RED]]
    assert bodies("BREAK red") == [[], [RED]]
    assert bodies("red BREAK BREAK blue") == [[RED], [], [BLUE]]
    assert bodies("BREAK") == [[]]
    # A comma before the border is out of reach after it.
    assert bodies("red " * 60 + ", BREAK " + "red " * 76) == [[RED] * 60 + [COMMA], [RED] * 75, [RED]]


def test_weights() -> None:
    (chunk,) = chunk_prompt("red (blue:1.5) [red] (blue red)", TOKENIZER)
    assert chunk.weights[:7].tolist() == pytest.approx([1, 1, 1.5, 1 / 1.1, 1.1, 1.1, 1])
    assert (chunk.weights[6:] == 1).all()


def test_without_attention_brackets_are_characters() -> None:
    assert bodies("(red:1.2) BREAK", attention=False) == [TOKENIZER.encode("(red:1.2) BREAK")]


def test_the_vectors_of_a_word_stay_together() -> None:
    vectors = list(range(50_000, 50_008))
    assert bodies("red blue red", words=LONG_WORD) == [[RED, *vectors, RED]]
    assert bodies("red " * 67 + "blue", words=LONG_WORD) == [[RED] * 67 + vectors]
    assert bodies("red " * 68 + "blue red", words=LONG_WORD) == [[RED] * 68, [*vectors, RED]]
    (chunk,) = chunk_prompt("(blue:1.3) red", TOKENIZER, words=LONG_WORD)
    assert chunk.weights[1:10].tolist() == pytest.approx([1.3] * 8 + [1.0])


def test_vectors_that_fit_no_row_are_split() -> None:
    word: Words = {(BLUE,): tuple(range(50_000, 50_080))}
    assert bodies("red blue", words=word) == [[RED, *range(50_000, 50_074)], [*range(50_074, 50_080)]]


def test_the_longer_of_two_words_wins() -> None:
    words: Words = {(RED,): (1000,), (RED, BLUE): (1001, 1002)}
    assert bodies("red blue red red blue", words=words) == [[1001, 1002, 1000, 1001, 1002]]


def test_another_length_and_another_padding() -> None:
    tiny = ClipTokenizer(TOKENIZER.tokenizer, TOKENIZER.bos, TOKENIZER.eos, pad=0, length=6)
    first, second = chunk_prompt("red blue red blue blue", tiny)
    assert first.input_ids.tolist() == [tiny.bos, RED, BLUE, RED, BLUE, tiny.eos]
    assert second.input_ids.tolist() == [tiny.bos, BLUE, tiny.eos, 0, 0, 0]
