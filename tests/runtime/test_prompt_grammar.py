"""Against the web UI's documented examples, and values worked out by hand from its rules."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.prompt_grammar import Piece, parse_attention

BREAK = "|BREAK|"


def plain(text: str) -> list[tuple[str, float]]:
    return [(BREAK if piece.is_break else piece.text, piece.weight) for piece in parse_attention(text)]


# The examples that the web UI's own documentation of its parser gives.
DOCUMENTED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}

BY_HAND = {
    "": [("", 1.0)],
    "()": [("", 1.0)],
    "[]": [("", 1.0)],
    "[less]": [("less", 1 / 1.1)],
    "[[less]]": [("less", 1 / 1.1 * (1 / 1.1))],
    "([even])": [("even", 1 / 1.1 * 1.1)],
    "[open": [("open", 1 / 1.1)],
    "([both": [("both", 1.1 * (1 / 1.1))],
    "closed) x]": [("closed) x]", 1.0)],
    # Only round brackets take a number; in square ones it is text.
    "[a:1.3]": [("a:1.3", 1 / 1.1)],
    "[a:1.3)": [("a:1.3)", 1 / 1.1)],
    "a:1.5) b": [("a:1.5) b", 1.0)],
    "(a:1.3": [("a:1.3", 1.1)],
    "(a:b:1.2)": [("a:b", 1.2)],
    "(a: 1.2 )": [("a", 1.2)],
    "(a :1.2)": [("a ", 1.2)],
    "(a:1.2 x)": [("a:1.2 x", 1.1)],
    "(a:-0.5)": [("a", -0.5)],
    "(a:+2)": [("a", 2.0)],
    "(a:0)b": [("a", 0.0), ("b", 1.0)],
    "(a:.5)": [("a", 0.5)],
    "(a:2.)": [("a", 2.0)],
    "(a:)": [("a:", 1.1)],
    # No number: the web UI stops with an error here, so that anything but an error will do.
    "(a:.)": [("a:.", 1.1)],
    "(a:1.2.3)": [("a:1.2.3", 1.1)],
    # The number closes the innermost round bracket, also across a square one.
    "(a [b:1.5) c]": [("a ", 1.5), ("b", 1.5 * (1 / 1.1)), (" c", 1 / 1.1)],
    r"\\": [("\\", 1.0)],
    r"\(a\)": [("(a)", 1.0)],
    r"(a\))": [("a)", 1.1)],
    r"\\(a)": [("\\", 1.0), ("a", 1.1)],
    r"a\b": [("ab", 1.0)],
    "a: b": [("a: b", 1.0)],
    "a BREAK b": [("a", 1.0), (BREAK, 1.0), ("b", 1.0)],
    "BREAK": [("", 1.0), (BREAK, 1.0), ("", 1.0)],
    "aBREAK b BREAKc break": [("aBREAK b BREAKc break", 1.0)],
    "a \n BREAK\n BREAK b": [("a", 1.0), (BREAK, 1.0), ("", 1.0), (BREAK, 1.0), ("b", 1.0)],
    "(a) BREAK [b]": [("a", 1.1), ("", 1.0), (BREAK, 1.0), ("", 1.0), ("b", 1 / 1.1)],
    # The web UI multiplies the mark itself, which then is a word.
    "(a BREAK b)": [("a", 1.1), ("BREAK", -1.1), ("b", 1.1)],
    "(a BREAK b:1.0)": [("a", 1.0), (BREAK, 1.0), ("b", 1.0)],
}


@pytest.mark.parametrize("text", [*DOCUMENTED, *BY_HAND])
def test_pieces(text: str) -> None:
    assert plain(text) == {**DOCUMENTED, **BY_HAND}[text]


GRAMMAR = st.lists(
    st.sampled_from(["(", ")", "[", "]", ":", "1.2", "-1", ".", " ", "\\", "BREAK", "AND", "a", "|", "\n", "٣", "²"])
).map("".join)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), GRAMMAR))
def test_any_text_parses(text: str) -> None:
    pieces = parse_attention(text)
    assert pieces
    for one, other in pairwise(pieces):
        assert one.weight != other.weight or one.is_break or other.is_break


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="()[]\\:")).filter(lambda text: "BREAK" not in text))
def test_text_without_grammar_is_itself(text: str) -> None:
    assert parse_attention(text) == (Piece(text),)


@settings(deadline=None)
@given(st.text().filter(lambda text: "BREAK" not in text))
def test_escaped_text_is_itself(text: str) -> None:
    escaped = "".join("\\" + char if char in "()[]\\" else char for char in text)
    assert parse_attention(escaped) == (Piece(text),)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-40, 40), st.integers(0, 3), st.integers(0, 3))))
def test_every_word_has_the_weight_of_its_brackets(words: list[tuple[int, int, int]]) -> None:
    text, wanted = "", {}
    for index, (tenths, round_, square) in enumerate(words):
        text += "[" * square + "(" * round_ + f"(w{index}x:{tenths / 10})" + ")" * round_ + "]" * square + " "
        wanted[f"w{index}x"] = tenths / 10 * 1.1 ** (round_ - square)
    read = {word: piece.weight for piece in parse_attention(text) for word in wanted if word in piece.text}
    assert read == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["(" * 10_000, "[" * 10_000 + "]" * 10_000, "(a" * 10_000, "(" * 5000 + "a)" * 5000])
def test_ten_thousand_brackets(text: str) -> None:
    started = time.perf_counter()
    assert parse_attention(text)
    assert time.perf_counter() - started < 5


def test_a_huge_weight_is_text_and_a_huge_product_is_infinite() -> None:
    assert parse_attention("(a:" + "9" * 400 + ")")[0].weight == 1.1
    nines = "9" * 300
    assert math.isinf(parse_attention(f"((a:{nines}):{nines})")[0].weight)
