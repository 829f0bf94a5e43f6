"""Which networks are in a device's memory when: the policies of `residency_plan`, carried out.

    all     every network stays once it was opened
    swap    a network is there for its stage only: the text encoders while texts are encoded, the U-Net with its
            ControlNets while steps are made, the VAE while pictures are encoded or decoded. The peak is the largest of
            them instead of their sum, and each picture pays for opening them
    stream  as swap, and the U-Net's weights are streamed through the device's memory: by TensorRT

The pipeline says of each stage what it holds (`held`). Stages of several requests may overlap: a network goes when the
last of those that hold it is done.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from .backends import provider_of
from .bundle import DRAWING, Bundle
from .errors import UsageError
from .machine import probe_machine
from .residency_plan import POLICIES
from .specs import Array, ModelSpec, Noting, Session, closed_error

CHOICES = (*POLICIES, "auto")
# Of what the weights take, what the networks may take in all with what they work in.
_WITH_ACTIVATIONS = 1.5


def choose_residency(policy: str, bundle: Bundle, precision: str, *, backend: str) -> str:
    """One of `residency_plan.POLICIES`: the one asked for or, for `auto`, `all` where a GPU's memory has room for it.

    Raises:
        UsageError: no such policy, or `stream` without TensorRT.
        ConfigError: `auto`, and the U-Net's config is damaged.
    """
    if policy not in CHOICES:
        raise UsageError(f"residency: expected one of {', '.join(CHOICES)}, got {policy!r}.")
    if policy == "stream" and backend != "tensorrt":
        raise UsageError(
            f"residency stream: expected --backend tensorrt, got {backend}: only TensorRT streams weights. "
            "Use --residency swap."
        )
    if policy != "auto":
        return policy
    on_gpu = backend.startswith("tensorrt") or provider_of(backend) == "cuda"
    gpus = probe_machine().gpus if on_gpu else ()
    fits = not gpus or weight_bytes(bundle, precision) * _WITH_ACTIVATIONS <= gpus[0].memory_bytes
    return "all" if fits else "swap"


def weight_bytes(bundle: Bundle, precision: str) -> int:
    """What the files of the networks of a text-to-image run take, about as much as their weights do in memory."""
    if bundle.manifest is None:
        folders = [bundle.path / component for component in DRAWING]
        return sum(file.stat().st_size for folder in folders for file in folder.glob("*.onnx*"))
    held = [bundle.manifest.artifact(part, bundle.precision_of(part, precision) or "") for part in DRAWING]
    return sum(bundle.manifest.files[name].size for artifact in held if artifact for name in artifact.files)


@runtime_checkable
class Holdable(Protocol):
    """A session that may go between two calls, unless somebody holds it."""

    def hold(self) -> AbstractContextManager[None]:
        """Keep it open, from its first run inside the block to the end of the block."""
        ...


class SwappedSession:
    """A session that is open only while somebody holds or runs it. Safe to use from several threads.

    Args:
        name: of the component.
        open_session: opens it; its errors come out of the call that needed it.
    """

    def __init__(self, name: str, open_session: Callable[[], Session]) -> None:
        self._name, self._open = name, open_session
        self._lock = threading.RLock()
        self._session: Session | None = None
        self._holders = 0
        self._described: tuple[ModelSpec, str] | None = None
        self._notes: tuple[str, ...] = ()
        self._closed = False

    @property
    def spec(self) -> ModelSpec:
        """Inputs and outputs; opens it if it has never been open."""
        return self._description()[0]

    @property
    def backend(self) -> str:
        """What runs it; opens it if it has never been open."""
        return self._description()[1]

    @property
    def has_run(self) -> bool:
        """Whether it has been open, so that what runs it is known."""
        with self._lock:
            return self._described is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """Of the session, while it is open and afterwards."""
        with self._lock:
            return self._session.notes if isinstance(self._session, Noting) else self._notes

    @property
    def is_open(self) -> bool:
        """Whether its weights are in memory now."""
        with self._lock:
            return self._session is not None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep it open, from its first run inside the block to the end of the block."""
        with self._lock:
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._drop()

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once, having opened it if it is not.

        Raises:
            UsageError: inputs do not fit.
            BackendError: the backend failed, or the session was closed for good.
            ArtifactError: a file of it is missing, damaged or changed.
        """
        with self.hold():
            return self._opened()(feeds)

    def close(self) -> None:
        """Close it for good, when the calls under way are done."""
        with self._lock:
            self._closed = True
            self._drop()

    def _description(self) -> tuple[ModelSpec, str]:
        with self._lock:
            if self._described is None:
                with self.hold():
                    self._opened()
            assert self._described is not None
            return self._described

    def _opened(self) -> Session:
        with self._lock:
            if self._closed:
                raise closed_error(self._name)
            if self._session is None:
                self._session = self._open()
                self._described = (self._session.spec, self._session.backend)
            return self._session

    def _drop(self) -> None:
        self._notes = self.notes
        session, self._session = self._session, None
        if session is not None:
            session.close()


@contextmanager
def held(*sessions: Session) -> Iterator[None]:
    """A stage that uses these: none of them is dropped before it ends. Sessions that stay anyway are left alone."""
    with contextlib.ExitStack() as stack:
        for session in sessions:
            if isinstance(session, Holdable):
                stack.enter_context(session.hold())
        yield
