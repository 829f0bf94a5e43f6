"""A component that runs from engines: the one of several that holds a call's shapes, else ONNX Runtime or an error.

Which shapes a run needs is known with its first call, not when the bundle is opened. So a component's engines are
looked at when it is opened, and those of several are loaded when a call wants them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .engine_choice import HeldEngine, holding, no_profile
from .engine_host import EngineHost
from .engine_refit import check_refittable
from .errors import UsageError
from .input_checks import check_names
from .manifest import Manifest
from .specs import Array, ModelSpec, Session, closed_error
from .tensorrt_session import TensorRTSession


class EngineSession:
    """Run a component from its engines. Safe to use from many threads.

    Args:
        engines: usable here; the first states inputs and outputs. A single one is loaded at once.
        manifest: of their bundle.
        host: what the pipeline's engines share.
        fallback: opens what runs shapes that no engine holds, with the weights of the moment; None refuses them.

    Raises:
        ArtifactError, BackendError, OutOfDeviceMemory: as `EngineHost.open`.
    """

    def __init__(
        self,
        engines: Sequence[HeldEngine],
        manifest: Manifest,
        host: EngineHost,
        *,
        fallback: Callable[[], Session] | None = None,
    ) -> None:
        self._engines, self._manifest, self._host = tuple(engines), manifest, host
        self._fallback = fallback
        self._lock = threading.RLock()
        self._sessions: dict[str, TensorRTSession] = {}
        self._other: Session | None = None
        self._weights: dict[str, Array] = {}
        self._notes: tuple[str, ...] = ()
        self._latest: tuple[Any, Session] | None = None
        self._closed = False
        if len(self._engines) == 1:
            self._opened(self._engines[0])

    @property
    def spec(self) -> ModelSpec:
        """Inputs and outputs, as the first engine has them."""
        return self._engines[0].spec

    @property
    def backend(self) -> str:
        """What ran the latest call, or will run the first."""
        latest = self._latest
        if latest is not None:
            return latest[1].backend
        return f"{self._engines[0].sidecar.flavour} on {self._host.device.name}"

    @property
    def notes(self) -> tuple[str, ...]:
        """The shapes that went to ONNX Runtime and how to have an engine for them, and why work is not replayed."""
        with self._lock:
            sessions = list(self._sessions.values())
        slow = [f"{self.spec.name}: no CUDA graph: {why}" for session in sessions if (why := session.why_no_graph)]
        return (*self._notes, *dict.fromkeys(slow))

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Raises:
            UsageError: inputs do not fit, or no engine holds their shapes; says which they hold and how to build one.
            ArtifactError: an engine's file was changed, or is not what its sidecar says.
            BackendError: the session was closed, or the backend failed.
        """
        check_names(self.spec, feeds)
        return self._session_for(tuple(np.shape(feeds[spec.name]) for spec in self.spec.inputs))(feeds)

    def warm_up(self, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
        """Have sets of input shapes ready: engines loaded, CUDA graphs captured. What no engine holds is left out.

        Raises:
            ArtifactError, BackendError: as a call.
        """
        for wanted in shapes:
            engine = holding(self._engines, wanted)
            if engine is not None:
                self._opened(engine).warm_up([wanted])

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Replace weights in all engines, those that are loaded later too.

        Raises:
            UsageError: one of them was not built for it; none is changed then.
            BackendError: as `TensorRTSession.refit`.
        """
        for engine in self._engines:
            check_refittable(engine.sidecar, weights, bundle=engine.bundle)
        with self._lock:
            for session in self._sessions.values():
                session.refit(weights)
            self._weights |= weights
            other, self._other, self._latest = self._other, None, None
        if other is not None:
            other.close()

    def close(self) -> None:
        """Give back all that its engines hold, when the calls under way are done."""
        with self._lock:
            self._closed = True
            sessions: list[Session] = [*self._sessions.values(), *([self._other] if self._other is not None else [])]
            self._sessions, self._other, self._latest = {}, None, None
        for session in sessions:
            session.close()

    def _session_for(self, key: tuple[tuple[int, ...], ...]) -> Session:
        latest = self._latest
        if latest is not None and latest[0] == key:
            return latest[1]
        shapes = dict(zip((spec.name for spec in self.spec.inputs), key, strict=True))
        engine = holding(self._engines, shapes)
        with self._lock:
            session = self._instead(shapes) if engine is None else self._opened(engine)
            self._latest = (key, session)
            return session

    def _opened(self, engine: HeldEngine) -> TensorRTSession:
        with self._lock:
            if self._closed:
                raise closed_error(self.spec.name)
            key = engine.record.path
            if key not in self._sessions:
                session = self._host.open(engine, self._manifest)
                if self._weights:
                    session.refit(self._weights)
                self._sessions[key] = session
            return self._sessions[key]

    def _instead(self, shapes: Mapping[str, tuple[int, ...]]) -> Session:
        problem = no_profile(self._engines, shapes)
        if self._closed:
            raise closed_error(self.spec.name)
        if self._fallback is None:
            raise UsageError(problem)
        if self._other is None:
            self._other = self._fallback()
        note = f"{self._other.backend} in the place of an engine: {problem}"
        self._notes = tuple(dict.fromkeys([*self._notes, note]))
        return self._other
