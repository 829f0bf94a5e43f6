"""TensorRT's log: one logger for each flavour in a process, and the errors in what it was told."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

# TensorRT keeps the first logger that a process hands it and ignores all later ones, so there is one per flavour.
_LOGGERS: dict[Any, Any] = {}
# A large build draws some thousands of lines; a server runs for months.
_KEPT = 20_000
_ERRORS = ("ERROR", "INTERNAL_ERROR")


def shared_logger(trt: Any) -> Any:
    """The process's logger of a flavour; `messages` holds the latest (severity, text), to be emptied before a build."""
    if trt not in _LOGGERS:

        class Log(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.messages: deque[tuple[str, str]] = deque(maxlen=_KEPT)

            def log(self, severity: Any, text: str) -> None:
                # A large graph draws a hundred thousand verbose lines, none of which is read.
                if severity != trt.ILogger.Severity.VERBOSE:
                    self.messages.append((severity.name, text))

        _LOGGERS[trt] = Log()
    return _LOGGERS[trt]


def error_text(messages: Iterable[tuple[str, str]]) -> str:
    """The errors of a log, joined."""
    return "; ".join(text for severity, text in messages if severity in _ERRORS) or "no message"


def last_errors(trt: Any) -> str:
    """The latest errors that a flavour of TensorRT has told its logger of."""
    errors = [message for message in shared_logger(trt).messages if message[0] in _ERRORS]
    return error_text(errors[-3:])
