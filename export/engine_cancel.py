"""Interrupting a builder that is inside its library."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Abandoned(KeyboardInterrupt):
    """A second interrupt came before the builder had stopped: its thread is still at work."""


def run_cancellable(
    work: Callable[[], Any], cancelled: threading.Event, on_cancel: Callable[[], None] = lambda: None
) -> Any:
    """Run `work` in a thread so that Ctrl-C reaches Python while the builder is inside its library.

    An interrupt sets `cancelled`, calls `on_cancel` and waits for the work to end.

    Raises:
        KeyboardInterrupt: after an interrupt, once the work has ended.
        Abandoned: a second interrupt came while waiting.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []
    ended = threading.Event()

    def target() -> None:
        try:
            outcome.append(work())
        except BaseException as err:  # handed to the caller's thread below
            failure.append(err)
        finally:
            ended.set()

    worker = threading.Thread(target=target, name="engine build", daemon=True)
    try:
        worker.start()
        _wait(ended)
    except KeyboardInterrupt:
        cancelled.set()
        on_cancel()
        try:
            if worker.ident is not None:
                _wait(ended)
        except KeyboardInterrupt as err:
            raise Abandoned from err
        raise
    if failure:
        raise failure[0]
    return outcome[0]


def _wait(ended: threading.Event) -> None:
    while not ended.wait(0.1):  # on Windows a wait without a limit cannot be interrupted
        pass
