"""What is not as it was to be with the networks of a run, for people."""

from __future__ import annotations

from collections.abc import Mapping

from .backends import choose_backend
from .component_opening import ComponentOpening
from .onnx_cuda import cuda_note
from .residency import SwappedSession
from .specs import Noting, Session


def opened_notes(opening: ComponentOpening, held: Mapping[str, Session]) -> tuple[str, ...]:
    """Of the networks that have run or stay open: what they say themselves, and what the machine has and is not used.

    Args:
        held: the sessions by component.
    """
    ran = {name: each for name, each in held.items() if not isinstance(each, SwappedSession) or each.has_run}
    found = [note for session in ran.values() if isinstance(session, Noting) for note in session.notes]
    if opening.backend == "auto":
        # Engines are built together: what is wrong with the U-Net's is wrong with the others.
        reasons = [_why_no_engine(opening, "unet") if "unet" in ran else None]
        if any(session.backend == "onnxruntime CPU" for session in ran.values()):
            reasons.append(cuda_note())
        found += [reason for reason in reasons if reason is not None]
    return tuple(dict.fromkeys(found))


def _why_no_engine(opening: ComponentOpening, component: str) -> str | None:
    """Why none of the bundle's engines of a component is used although there is a GPU; None if there is no such."""
    precision, bundle = opening.precision_of(component), opening.bundle
    engines = bundle.manifest.engines if bundle.manifest is not None else ()
    built = [engine.precision for engine in engines if engine.component == component]
    if not built or opening.host is None or not opening.host.machine.gpus:
        return None
    held = precision if precision in built else built[0]
    choice = choose_backend(bundle, component, held, backend=opening.backend, host=opening.host)
    if choice.engines:
        return None if held == precision else f"{component}: its engines are in {held}, and this run in {precision}"
    return f"{component}: {choice.reason}"
