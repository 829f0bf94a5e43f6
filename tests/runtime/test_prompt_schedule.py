"""Against the web UI's documented examples, and values worked out by hand from its rules."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.prompt_schedule import PromptPart, resolve_prompt, resolve_schedule, text_at


def schedule(text: str, steps: int = 10, first: int | None = None) -> list[tuple[int, str]]:
    return list(resolve_schedule(text, steps, first_pass_steps=first))


def every(*texts: str) -> list[tuple[int, str]]:
    return [(step + 1, texts[step % len(texts)]) for step in range(10)]


# The examples that the web UI's own documentation of its parser gives, at 10 steps.
DOCUMENTED = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": every("a", "(b:1.1)"),
    "[fe|]male": every("female", "male"),
    "[fe|||]male": every("female", "male", "male", "male"),
}

BY_HAND = {
    "": [(10, "")],
    "a [b::0.4] c": [(4, "a b c"), (10, "a  c")],
    "[a:b:0.25]": [(2, "a"), (10, "b")],
    "[:b:3]": [(3, ""), (10, "b")],
    "[a:b:3 ]": [(3, "a"), (10, "b")],
    # With a point it is a fraction of the steps, without one a step.
    "[a:b:1]": [(1, "a"), (10, "b")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b:1.5]": [(10, "a")],
    "[a:b:0]": [(10, "b")],
    "[a:b:-2]": [(10, "b")],
    "[a:b:99]": [(10, "a")],
    "[a:b:1e1]": [(10, "a")],
    "[a:b:1e999]": [(10, "a")],
    # No number, too many colons, not balanced, no closing bracket: text.
    "[a]": [(10, "[a]")],
    "[a:b]": [(10, "[a:b]")],
    "[a:b:c]": [(10, "[a:b:c]")],
    "[a:b:c:3]": [(10, "[a:b:c:3]")],
    "[(a:b:3]": [(10, "[(a:b:3]")],
    "[(a:b:c):d:3]": [(10, "[(a:b:c):d:3]")],
    "[a)b:c:3]": [(10, "[a)b:c:3]")],
    "[a:b:3": [(10, "[a:b:3")],
    r"\[a:b:3\]": [(10, r"\[a:b:3\]")],
    # One part that cannot be read does not hold up another.
    "[a:b] [c:d:3]": [(3, "[a:b] c"), (10, "[a:b] d")],
    "(a [b:c:3]:1.2)": [(3, "(a b:1.2)"), (10, "(a c:1.2)")],
    "[a [b:c:5]:d:3]": [(3, "a b"), (5, "d"), (10, "d")],
    "[[a|b]:c:2]": [(1, "a"), (2, "b"), *[(step, "c") for step in range(3, 11)]],
    "[[a:x:4]|b]": [(s, ("a" if s <= 4 else "x") if s % 2 else "b") for s in range(1, 11)],
    "[|]": every("", ""),
    # A bar that belongs to no alternation, or a backslash at the end: the web UI's parser gives the whole prompt up.
    "a | [b:c:3]": [(10, "a | [b:c:3]")],
    "[a|b:3]": [(10, "[a|b:3]")],
    "(a|b) [c:d:3]": [(10, "(a|b) [c:d:3]")],
    "[c:d:3] \\": [(10, "[c:d:3] \\")],
    r"a \| [b:c:3]": [(3, r"a \| b"), (10, r"a \| c")],
}


@pytest.mark.parametrize("text", [*DOCUMENTED, *BY_HAND])
def test_schedules(text: str) -> None:
    assert schedule(text) == {**DOCUMENTED, **BY_HAND}[text]


def test_the_example_at_the_head_of_the_web_uis_parser() -> None:
    text = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
        "[ in foreground::0.6][ in background:0.25] [shoddy:masterful:0.5]"
    )
    head = "fantasy landscape with a "
    assert schedule(text, 100) == [
        (25, f"{head}mountain and an oak in foreground shoddy"),
        (50, f"{head}lake and an oak in foreground in background shoddy"),
        (60, f"{head}lake and an oak in foreground in background masterful"),
        (75, f"{head}lake and an oak in background masterful"),
        (100, f"{head}lake and a christmas tree in background masterful"),
    ]


def test_steps_of_a_second_pass() -> None:
    """Documented: fractions up to 1 are over, from 1 to 2 they are this pass's; steps count on from the first."""
    assert schedule("a [b:.5] c", first=10) == [(10, "a b c")]
    assert schedule("a [b:1.5] c", first=10) == [(5, "a  c"), (10, "a b c")]
    assert schedule("a [b:13] c", first=10) == [(3, "a  c"), (10, "a b c")]


def test_composition() -> None:
    resolved = resolve_prompt("a [x:y:2] AND b :1.2 AND c:-0.5", 4)
    assert resolved.parts == (
        PromptPart(1.0, ((2, "a x"), (4, "a y"))),
        PromptPart(1.2, ((4, " b"),)),
        PromptPart(-0.5, ((4, " c"),)),
    )
    assert resolved.texts == ("a x", "a y", " b", " c")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sand AND sea", [("sand", 1.0), (" sea", 1.0)]),
        ("BRAND and ANDY sAND", [("BRAND and ANDY sAND", 1.0)]),
        ("a:1.5", [("a", 1.5)]),
        ("a : 2. ", [("a", 2.0)]),
        ("a:b", [("a:b", 1.0)]),
        ("a:1e2", [("a:1e2", 1.0)]),
        ("a :1 :2", [("a :1", 2.0)]),
        ("AND", [("", 1.0), ("", 1.0)]),
        (":3", [("", 3.0)]),
        ("a\nb \n", [("a\nb", 1.0)]),
        ("a:" + "9" * 400, [("a:" + "9" * 400, 1.0)]),
    ],
)
def test_parts(text: str, parts: list[tuple[str, float]]) -> None:
    assert [(part.schedule[0][1], part.weight) for part in resolve_prompt(text, 5).parts] == parts


def test_text_at_counts_from_zero() -> None:
    part = resolve_prompt("[a:b:2]", 4).parts[0]
    assert [text_at(part, index) for index in range(6)] == ["a", "a", "b", "b", "b", "b"]


PARTS = ["(", ")", "[", "]", ":", "|", "0.5", "3", " ", "a", "\\", "AND", " AND ", "\n", "-", "BREAK", "1e999", "٣"]


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PARTS)).map("".join)), st.integers(1, 60))
def test_any_text_resolves(text: str, steps: int) -> None:
    for part in resolve_prompt(text, steps).parts:
        ends = [end for end, _ in part.schedule]
        assert ends == sorted(set(ends))
        assert ends[0] >= 1
        assert ends[-1] == steps


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="[]|\\")))
def test_text_without_square_brackets_is_itself(text: str) -> None:
    assert schedule(text) == [(10, text)]


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(0, 120))
def test_every_step_has_the_text_that_its_number_says(steps: int, when: int) -> None:
    part = PromptPart(1.0, resolve_schedule(f"[a:b:{when}]", steps))
    assert [text_at(part, i) for i in range(steps)] == ["a" if i < when else "b" for i in range(steps)]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000,
        "[" * 10_000 + "a" + ":3]" * 10_000,
        "[" * 10_000 + "a" + "|b]" * 10_000,
        "[" * 10_000 + "]" * 10_000,
        "(" * 10_000 + ")" * 10_000,
        "[a:b:0.5]" * 2000,
        " " * 50_000 + "x:",
        "a AND " * 10_000,
    ],
)
def test_ten_thousand_brackets(text: str) -> None:
    started = time.perf_counter()
    assert resolve_prompt(text, 20).parts
    assert time.perf_counter() - started < 5
