"""Prompts that change while a picture is drawn, as AUTOMATIC1111's web UI writes them.

`[from:to:when]` and its short forms switch at a step, `[a|b]` alternates, `a AND b :1.2` composes (Liu et al. 2022,
Compositional Visual Generation with Composable Diffusion Models). What the web UI's grammar cannot read stays text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")
_WHEN = re.compile(r"\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*")
_TOKEN = re.compile(r"(?:[^\\\[\]():|]|\\.)+|[\[\]():|]|\\")


@dataclass(frozen=True)
class PromptPart:
    """One prompt of a composition: its weight, and (last_step, text) with last_step counted from 1, inclusive."""

    weight: float
    schedule: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class ResolvedPrompt:
    """A prompt with AND and schedules resolved. Attention grammar and BREAK are still in the texts."""

    parts: tuple[PromptPart, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text of every part once, in the order of first use."""
        return tuple(dict.fromkeys(text for part in self.parts for _, text in part.schedule))


@dataclass(frozen=True)
class _Scheduled:
    before: tuple[_Node, ...]
    after: tuple[_Node, ...]
    last: int


@dataclass(frozen=True)
class _Alternating:
    choices: tuple[tuple[_Node, ...], ...]


_Node = str | _Scheduled | _Alternating


@dataclass
class _Frame:
    """An opened bracket: where its first node is, where its colons and bars are, whether it still can be a group."""

    opener: str
    start: int
    separators: list[tuple[int, str]] = field(default_factory=list)
    balanced: bool = True

    def segments(self, nodes: Sequence[_Node]) -> tuple[tuple[_Node, ...], ...]:
        """The nodes between the separators."""
        borders = [self.start - 1, *(index for index, _ in self.separators), len(nodes)]
        return tuple(tuple(nodes[a + 1 : b]) for a, b in pairwise(borders))


class _Clock:
    """Turns the number of a schedule into the last step of what stood before it."""

    def __init__(self, steps: int, first_pass_steps: int | None) -> None:
        self.steps = steps
        self._first = first_pass_steps

    def last_step(self, number: str) -> int:
        """A number with a point is a fraction of the steps, one without is a step."""
        value = float(number)
        if "." in number:
            value = (value - (0.0 if self._first is None else 1.0)) * self.steps
        else:
            value -= self._first or 0
        return int(max(-1.0, min(float(self.steps), value)))


def _close(frame: _Frame, nodes: Sequence[_Node], clock: _Clock) -> _Node | None:
    """The node that a `[...]` is, None if it is no schedule and no alternation."""
    kinds = {kind for _, kind in frame.separators}
    if not frame.balanced or len(kinds) != 1 or (":" in kinds and len(frame.separators) > 2):
        return None
    segments = frame.segments(nodes)
    if kinds == {"|"}:
        return _Alternating(segments)
    number = "".join(node if isinstance(node, str) else "?" for node in segments[-1])
    when = _WHEN.fullmatch(number)
    if when is None:
        return None
    return _Scheduled(segments[0] if len(segments) == 3 else (), segments[-2], clock.last_step(when.group(1)))


def _parse(text: str, clock: _Clock) -> list[_Node] | None:
    """Nodes of a text; None where the grammar has no reading: a bar outside `[a|b]`, a backslash before nothing.

    A group counts if its bracket closes around balanced content, with at most one colon in round brackets. Such groups
    are found with a stack of what is open, in one pass; whatever does not fit is text.
    """
    nodes: list[_Node] = []
    stack = [_Frame("", 0)]
    bars = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        top = stack[-1]
        if token == "\\":
            return None
        if token in "([":
            stack.append(_Frame(token, len(nodes) + 1))
        elif token in ":|":
            bars += token == "|"
            top.separators.append((len(nodes), token))
        elif token in ")]" and top.opener + token in ("()", "[]"):
            stack.pop()
            group = _close(top, nodes, clock) if token == "]" else None
            if group is not None:
                bars -= sum(kind == "|" for _, kind in top.separators)
                nodes[top.start - 1 :] = [group]
                continue
            stack[-1].balanced &= top.balanced and len(top.separators) <= (token == ")")
        elif token in ")]":
            top.balanced = False
        nodes.append(token)
    return None if bars else nodes


def _walk(nodes: Sequence[_Node], step: int | None) -> Iterator[str | _Scheduled | _Alternating]:
    """Texts as they stand at a step; with None every node, whatever the step."""
    pending = list(reversed(nodes))
    while pending:
        node = pending.pop()
        if step is None or isinstance(node, str):
            yield node
        if isinstance(node, _Scheduled):
            if step is None or step > node.last:
                pending += reversed(node.after)
            if step is None or step <= node.last:
                pending += reversed(node.before)
        elif isinstance(node, _Alternating):
            chosen = node.choices if step is None else (node.choices[(step - 1) % len(node.choices)],)
            pending += (inner for choice in reversed(chosen) for inner in reversed(choice))


def resolve_schedule(text: str, steps: int, *, first_pass_steps: int | None = None) -> tuple[tuple[int, str], ...]:
    """The texts of a prompt over its steps, without looking for AND: what a negative prompt is.

    Args:
        steps: of this pass.
        first_pass_steps: given in the second pass of a hi-res fix. Steps are then counted on from the first pass, and
            fractions from 1.0 to 2.0 are those of the second, as in the web UI.

    Returns:
        (last_step, text), last_step from 1, inclusive; the last is `steps`. An alternation gives one entry per step.
    """
    clock = _Clock(max(int(steps), 1), first_pass_steps)
    nodes = _parse(text, clock)
    if nodes is None:
        return ((clock.steps, text),)
    ends = {clock.steps}
    for node in _walk(nodes, None):
        if isinstance(node, _Alternating):
            ends.update(range(1, clock.steps + 1))
        elif isinstance(node, _Scheduled) and node.last >= 1:
            ends.add(node.last)
    return tuple((end, "".join(str(node) for node in _walk(nodes, end))) for end in sorted(ends))


def _weighted(text: str) -> tuple[str, float]:
    """A text and the weight at its end, 1.0 if it has none; whitespace at the end goes too."""
    head, colon, tail = text.rpartition(":")
    if colon and _WEIGHT.fullmatch(tail.strip()) and math.isfinite(weight := float(tail)):
        return head.rstrip(), weight
    return text.rstrip(), 1.0


def resolve_prompt(text: str, steps: int, *, first_pass_steps: int | None = None) -> ResolvedPrompt:
    """Split a prompt at the word AND, take each part's weight (`… :1.2`, default 1), and resolve its schedule.

    Never raises on odd text. Linear in the length of the text, times the steps at which it changes. Among stray
    brackets the web UI's parser (Earley, ambiguous there) now and then takes a closed group for text; here it is one.
    """
    return ResolvedPrompt(
        tuple(
            PromptPart(weight, resolve_schedule(part, steps, first_pass_steps=first_pass_steps))
            for part, weight in map(_weighted, _AND.split(text))
        )
    )


def text_at(part: PromptPart, step_index: int) -> str:
    """The text of a part at a step counted from 0; after the last step, the last text."""
    return next((text for last, text in part.schedule if step_index < last), part.schedule[-1][1])
