"""New weights for an engine that is loaded already: LoRAs swapped, and engines without weights filled.

TensorRT's Refitter needs a GPU; everything else here does not. An engine takes new weights only where it was built for
them (`latentrt build --refit`), by the names that the graph's initializers have, in the types that it was built with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .engine_sidecar import EngineSidecar
from .errors import BackendError, UsageError
from .graph_weights import stripped_weights
from .precisions import QUANTIZED
from .specs import Array

# NumPy has no bfloat16 and no float8: their bits. What is quantized is only ever filled in as it was.
_DTYPES = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
    "INT8": np.dtype(np.int8),
    "FP8": np.dtype(np.uint8),
}
_NAMED = 3
_ENGINE = "engine"


def no_refit(component: str, precision: str, bundle: Path) -> str:
    """Why a quantized engine takes no new weights, and what to do."""
    return (
        f"{component}: expected an engine in half precision to refit, got {precision}: new weights need new scales, "
        "which are part of the engine. Calibrate with the LoRAs in the weights: "
        f"latentrt calibrate {bundle} --precision {precision} --lora NAME:SCALE; or draw with --precision fp16."
    )


def check_refittable(sidecar: EngineSidecar, names: Collection[str], *, bundle: Path) -> None:
    """Hold weights to those that an engine's sidecar says it takes; nothing is loaded for it.

    Raises:
        UsageError: the engine was built without refit, or not for all of these weights, or is quantized; says how to
            have one with other weights.
    """
    if sidecar.precision in QUANTIZED and names:
        raise UsageError(no_refit(sidecar.component, sidecar.precision, bundle))
    if sidecar.refit == "all":
        return
    if missing := sorted(set(names) - set(sidecar.refittable)):
        raise UsageError(
            _not_refittable(sidecar.component, missing, len(sidecar.refittable), f"latentrt build {bundle}")
        )


def refit(
    trt: Any,
    engine: Any,
    weights: Mapping[str, Array],
    logger: Any,
    *,
    graph: Path | None = None,
    component: str = _ENGINE,
) -> None:
    """Put new weights into an engine; all are checked before the first is set. No call of it may be under way.

    TensorRT may have merged some of these weights with others, such as queries with keys and values. It then wants the
    others too, and gets those of the graph.

    Args:
        trt: the module of the engine's flavour.
        engine: deserialized.
        weights: as the graph has them, by the names of its initializers. bfloat16 as its 16 bits.
        logger: of TensorRT.
        graph: the .onnx file that the engine was built from.
        component: that it is of, for messages.

    Raises:
        UsageError: the engine was not built for it, or a weight is of another type or size than the engine's.
        BackendError: TensorRT wants weights that were not given, or failed: the engine has to be loaded again then.
    """
    refitter = trt.Refitter(engine, logger)
    takes = set(refitter.get_all_weights())
    if unknown := sorted(weights.keys() - takes):
        raise UsageError(_not_refittable(component, unknown, len(takes), "latentrt build BUNDLE"))
    given = {name: np.ascontiguousarray(values) for name, values in weights.items()}
    _put(trt, refitter, given)
    missing = list(refitter.get_missing_weights())
    if missing and graph is not None:
        given |= {name: np.ascontiguousarray(values) for name, values in stripped_weights(graph, missing).items()}
        _put(trt, refitter, {name: given[name] for name in missing})
        missing = list(refitter.get_missing_weights())
    if missing:
        raise BackendError(
            f"{component}: expected weights that TensorRT has merged with the new ones as well, got none for "
            f"{_listed(missing)}. Load the engine with its graph beside it."
        )
    if not refitter.refit_cuda_engine():
        raise BackendError(
            f"{component}: expected TensorRT to take {len(given)} weights, it did not. Some may be new and some old: "
            "open the bundle again."
        )


def fill(trt: Any, engine: Any, graph: Path, logger: Any, *, component: str = _ENGINE) -> None:
    """Give an engine that was built without weights those of its graph.

    Args:
        graph: the .onnx file that the engine was built from.

    Raises:
        ArtifactError: the graph is damaged, or another one than the engine was built from.
        UsageError, BackendError: as `refit`.
    """
    names = trt.Refitter(engine, logger).get_all_weights()
    refit(trt, engine, stripped_weights(graph, names), logger, component=component)


def _put(trt: Any, refitter: Any, weights: Mapping[str, Array]) -> None:
    """Set weights of a refitter, which keeps no copies of them."""
    for name, values in weights.items():
        prototype = refitter.get_weights_prototype(name)
        wanted = _DTYPES.get(prototype.dtype.name)
        if values.dtype != wanted or values.size != prototype.size:
            raise UsageError(
                f"{name}: expected {prototype.size} weights of type {prototype.dtype.name.lower()}, as the engine has, "
                f"got {values.size} of {values.dtype}. Give those of the graph that the engine was built from."
            )
    for name, values in weights.items():
        dtype = refitter.get_weights_prototype(name).dtype
        if not refitter.set_named_weights(name, trt.Weights(dtype, values.ctypes.data, values.size)):
            raise BackendError(f"{name}: expected TensorRT to take new weights, it refused them.")


def _not_refittable(component: str, names: Sequence[str], held: int, build: str) -> str:
    what = "was built without refit" if not held else f"takes new weights for {held} others"
    return (
        f"{component}: expected an engine that takes new weights for {_listed(names)}, got one that {what}. "
        f"Run: {build}{'' if component == _ENGINE else f' --components {component}'} --refit lora"
    )


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{rest}"
