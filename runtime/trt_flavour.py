"""The two TensorRT libraries with one API: `tensorrt` and `tensorrt_rtx`, chosen by name and imported when used."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from .errors import BackendError, UsageError

FLAVOURS = ("tensorrt", "tensorrt_rtx")
EXTRAS: Mapping[str, str] = {"tensorrt": "latentrt[tensorrt]", "tensorrt_rtx": "latentrt[tensorrt-rtx]"}

# Hopper and data-centre Blackwell: TensorRT-RTX has no kernels for them in any version so far.
DATA_CENTRE_SMS = ("sm90", "sm100", "sm103")


def install_command(flavour: str) -> str:
    """The pip command that installs a flavour."""
    return f"pip install '{EXTRAS[flavour]}'"


def import_flavour(flavour: str) -> Any:
    """The module of a flavour.

    Raises:
        UsageError: no such flavour.
        BackendError: it is not installed, or its libraries do not load.
    """
    if flavour not in FLAVOURS:
        raise UsageError(f"flavour: expected one of {', '.join(FLAVOURS)}, got {flavour!r}.")
    try:
        module = importlib.import_module(flavour)
    except (ImportError, OSError, RuntimeError) as err:
        raise BackendError(
            f"{flavour}: expected an importable package, got {err}. Run: {install_command(flavour)}"
        ) from err
    if not hasattr(module, "Builder"):
        raise BackendError(
            f"{flavour}: expected a whole package, got one without its libraries. Run: {install_command(flavour)}"
        )
    return module


def sm_number(sm: str) -> int:
    """89 of `sm89`.

    Raises:
        UsageError: it is not of that form.
    """
    match = re.fullmatch(r"sm(\d{2,3})", sm)
    if match is None:
        raise UsageError(f"target: expected a compute capability such as sm89, got {sm!r}.")
    return int(match[1])


def supported_sms(module: Any, flavour: str) -> tuple[str, ...]:
    """The compute capabilities that a flavour can build for ahead of time; empty where it builds on the GPU itself."""
    if flavour == "tensorrt":
        return ()
    names = [name.lower() for name in dir(module.ComputeCapability) if re.fullmatch(r"SM\d{2,3}", name)]
    return tuple(sorted(names, key=sm_number))


def installed_flavour(flavour: str) -> tuple[str, int | None] | None:
    """Version and CUDA major version (where the distribution's name states it) of a flavour, without importing it."""
    stem = flavour.replace("_", "-")
    for cuda_major in (13, 12, None):
        version = installed_version(stem if cuda_major is None else f"{stem}-cu{cuda_major}")
        if version is not None:
            return version, cuda_major
    return None


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
