"""Which GPUs an engine is for, and which TensorRT builds it."""

from __future__ import annotations

import re
from typing import Any

from latentrt.runtime.errors import BackendError, UsageError
from latentrt.runtime.machine import Machine
from latentrt.runtime.trt_flavour import FLAVOURS, import_flavour, install_command, sm_number, supported_sms

Targets = tuple[str, ...]


def parse_targets(text: str) -> tuple[Targets, ...]:
    """Engines from `sm86,sm89+sm120`: commas separate engines, `+` joins several targets in one engine.

    `8.6`, `86` and `SM86` mean `sm86`; `current` is this machine's GPU.

    Raises:
        UsageError: a word is neither.
    """
    engines: list[Targets] = []
    for group in text.split(","):
        targets = []
        for word in group.split("+"):
            plain = word.strip().lower()
            match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", plain)
            if plain != "current" and match is None:
                raise UsageError(f"target: expected sm86, sm89+sm120 or current, got {word.strip()!r}.")
            targets.append(plain if match is None else f"sm{match[1]}{match[2]}")
        unique = tuple(sorted(set(targets), key=lambda sm: -1 if sm == "current" else sm_number(sm)))
        if unique not in engines:
            engines.append(unique)
    return tuple(engines)


def resolve_current(engines: tuple[Targets, ...], machine: Machine) -> tuple[Targets, ...]:
    """Put this machine's GPU in place of `current`.

    Raises:
        UsageError: there is no GPU here.
    """
    if not any("current" in targets for targets in engines):
        return engines
    if not machine.gpus:
        raise UsageError(
            f"target: expected a GPU in this machine for 'current', but {machine.why_no_gpu or 'it has none'}. "
            "Name the GPUs to build for, such as --target sm86,sm89,sm120."
        )
    own = machine.gpus[0].sm
    resolved = (tuple({own if sm == "current" else sm: None for sm in targets}) for targets in engines)
    return tuple(dict.fromkeys(tuple(sorted(targets, key=sm_number)) for targets in resolved))


def choose_flavour(wanted: str, engines: tuple[Targets, ...], machine: Machine) -> tuple[str, Any]:
    """The name and module of the TensorRT that builds for all targets.

    With `auto`, full TensorRT where it is installed and every engine is for this machine's GPU alone (it times its
    kernels there), otherwise TensorRT-RTX, which builds ahead of time.

    Raises:
        UsageError: no such flavour, or it cannot build for one of the targets.
        BackendError: it is not installed, or needs a GPU that is not here.
    """
    if wanted not in ("auto", *FLAVOURS):
        raise UsageError(f"flavour: expected auto, {' or '.join(FLAVOURS)}, got {wanted!r}.")
    on_device = bool(machine.gpus) and engines == ((machine.gpus[0].sm,),)
    if wanted == "auto":
        if not machine.packages:
            raise BackendError(
                "TensorRT: expected tensorrt or tensorrt_rtx, found neither installed. "
                f"Run: {install_command('tensorrt_rtx')} (builds without a GPU) or {install_command('tensorrt')}"
            )
        local = "tensorrt" in machine.packages and (on_device or "tensorrt_rtx" not in machine.packages)
        wanted = "tensorrt" if local else "tensorrt_rtx"
    if wanted == "tensorrt":
        _check_local(engines, machine, on_device=on_device)
        return wanted, import_flavour(wanted)
    module = import_flavour(wanted)
    supported = supported_sms(module, wanted)
    if foreign := [sm for targets in engines for sm in targets if sm not in supported]:
        raise UsageError(
            f"target: expected one of {', '.join(supported)} for tensorrt_rtx {module.__version__}, got "
            f"{', '.join(dict.fromkeys(foreign))}. Data-centre GPUs such as sm90 need full TensorRT, on that GPU: "
            f"{install_command('tensorrt')}"
        )
    return wanted, module


def _check_local(engines: tuple[Targets, ...], machine: Machine, *, on_device: bool) -> None:
    if not machine.gpus:
        raise BackendError(
            f"tensorrt: expected a GPU, because full TensorRT builds on the device, but "
            f"{machine.why_no_gpu or 'there is none'}. Build on the target machine, or ahead of time with "
            f"--flavour tensorrt_rtx ({install_command('tensorrt_rtx')})."
        )
    if not on_device:
        names = ",".join("+".join(targets) for targets in engines)
        raise UsageError(
            f"target: expected {machine.gpus[0].sm}, because full TensorRT builds for the GPU it runs on "
            f"({machine.gpus[0].name}), got {names}. Build there, or use --flavour tensorrt_rtx."
        )
