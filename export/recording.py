"""A bundle whose networks are watched or replaced while it draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

from latentrt.runtime.bundle import Bundle
from latentrt.runtime.components import Components
from latentrt.runtime.lora_store import Wanted
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.specs import Array, Session
from latentrt.runtime.wrapped_session import WrappedSession

from .export_plan import DERIVED

# Called after every call of a network: the component, its inputs and its outputs by name.
Seen = Callable[[str, Mapping[str, Array], Mapping[str, Array]], None]
# Given a component and what opens the bundle's own session of it, the session to use.
Wrap = Callable[[str, Callable[[], Session]], Session]


class _WrappedComponents(Components):
    """A bundle's networks, each as `wrap` gives it."""

    def __init__(
        self, bundle: Bundle, precision: str, wrap: Wrap, *, backend: str, verify: bool, loras: Wanted
    ) -> None:
        super().__init__(bundle, precision, backend=backend, verify=verify, loras=loras)
        self._wrap = wrap
        self._wrapped: dict[str, Session] = {}

    def __getitem__(self, component: str) -> Session:
        if component not in self._wrapped:
            self._wrapped[component] = self._wrap(component, partial(super().__getitem__, component))
        return self._wrapped[component]


def wrapped_pipeline(
    bundle: Bundle,
    precision: str,
    wrap: Wrap,
    *,
    backend: str = "onnxruntime",
    verify: bool = True,
    loras: Wanted = (),
) -> Pipeline:
    """A pipeline whose networks are what `wrap` makes of them.

    Args:
        bundle: with the artifacts that may run.
        precision: of the run.
        wrap: called once for every network, when it is first needed.
        backend: as in `Pipeline.load`; so are `verify` and `loras`.

    Raises:
        UsageError, ArtifactError, ConfigError, BackendError: as `Pipeline.load`.
    """
    return Pipeline.over(_WrappedComponents(bundle, precision, wrap, backend=backend, verify=verify, loras=loras))


def replaced_pipeline(
    bundle: Bundle,
    precision: str,
    component: str,
    session: Callable[[], Session],
    *,
    backend: str = "onnxruntime",
    loras: Wanted = (),
) -> Pipeline:
    """A pipeline with another session in the place of one network.

    Networks that were derived from it, such as the decoder to uint8, do not run: they would draw in its place.

    Args:
        bundle: with the artifacts that may run.
        precision: of the other networks.
        component: the network.
        session: called when it is first needed.
        backend: as in `Pipeline.load`; so is `loras`.

    Raises:
        UsageError, ArtifactError, ConfigError, BackendError: as `Pipeline.load`.
    """

    def wrap(name: str, opened: Callable[[], Session]) -> Session:
        return session() if name == component else opened()

    manifest = bundle.manifest
    if manifest is not None:
        kept = tuple(each for each in manifest.artifacts if DERIVED.get(each.component) != component)
        bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(manifest, artifacts=kept))
    return wrapped_pipeline(bundle, precision, wrap, backend=backend, loras=loras)


def watched_pipeline(
    bundle: Bundle,
    precision: str,
    seen: Seen,
    *,
    backend: str = "onnxruntime",
    verify: bool = True,
    loras: Wanted = (),
) -> Pipeline:
    """A pipeline that tells of every call of its networks.

    Args:
        bundle: with the artifacts that may run.
        precision: of the run.
        seen: what is told. Arrays are the run's own: they must not be changed.
        backend: as in `Pipeline.load`; so are `verify` and `loras`.

    Raises:
        UsageError, ArtifactError, ConfigError, BackendError: as `Pipeline.load`.
    """

    def watched(component: str, opened: Callable[[], Session]) -> Session:
        def call(session: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
            answer = session(feeds)
            seen(component, feeds, answer)
            return answer

        return WrappedSession(opened(), call)

    return wrapped_pipeline(bundle, precision, watched, backend=backend, verify=verify, loras=loras)
