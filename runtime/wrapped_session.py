"""A session whose calls go through a function: watched, or timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from .residency import held
from .specs import Array, ModelSpec, Session

# Given the session and the feeds of a call: makes it and returns its outputs.
Call: TypeAlias = Callable[[Session, Mapping[str, Array]], dict[str, Array]]


class WrappedSession:
    """Another session in all but its calls.

    Args:
        session: the other.
        call: makes each call.
    """

    def __init__(self, session: Session, call: Call) -> None:
        self._session, self._call = session, call

    @property
    def spec(self) -> ModelSpec:
        """Its inputs and outputs."""
        return self._session.spec

    @property
    def backend(self) -> str:
        """What runs it."""
        return self._session.backend

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once, through the function."""
        return self._call(self._session, feeds)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep it open for the block, if it is one that would go."""
        with held(self._session):
            yield

    def close(self) -> None:
        """Close it."""
        self._session.close()
