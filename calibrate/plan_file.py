"""Plans on disk: a JSON file to be read and edited by hand, and a safetensors file of its arrays beside it.

Whether a layer is quantized, and its scale, may be changed by anybody; the plan is then another one, with another key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.runtime.errors import ArtifactError, CalibrationError
from latentrt.runtime.manifest import key_of, write_atomic
from latentrt.runtime.safetensors import open_safetensors, safetensors_bytes

from .plan import LayerPlan, Plan
from .plan_checks import check_consistent

FORMAT = 1
Arrays = Mapping[str, NDArray[np.float32]]
_VECTOR, _CORRECTION = "vector/", "correction/"


def arrays_path(path: Path) -> Path:
    """Of a plan's JSON file, the file with its arrays: `int8.plan.safetensors` beside `int8.plan.json`."""
    return path.with_suffix(".safetensors")


def save_plan(plan: Plan, path: Path) -> tuple[Path, Path]:
    """Write a plan's arrays and then its JSON file at `path`, which ends with .json, a layer to a line.

    Returns:
        The two files, the JSON first.

    Raises:
        CalibrationError: a number is NaN or infinite, or the plan is not consistent.
        OSError: the disk is full, or the like.
    """
    check_consistent(plan)
    arrays = safetensors_bytes(
        {
            **{f"{_VECTOR}{group}": np.asarray(values, np.float32) for group, values in plan.vectors.items()},
            **{f"{_CORRECTION}{name}": np.asarray(values, np.float32) for name, values in plan.corrections.items()},
        },
        {},
    )
    content = {
        "format": FORMAT,
        "component": plan.component,
        "kind": plan.kind,
        "graph": dict(plan.graph),
        "loras": [dict(lora) for lora in plan.loras],
        "made": dict(plan.made),
        "arrays": hashlib.sha256(arrays).hexdigest(),
    }
    try:
        head = json.dumps(content, indent=1, allow_nan=False)
        rows = [json.dumps(asdict(layer), allow_nan=False) for layer in plan.layers]
    except ValueError as err:
        raise CalibrationError(f"{path.name}: expected finite numbers, got one that is not: {err}.") from err
    lines = ",\n  ".join(rows)
    write_atomic(arrays_path(path), arrays)
    write_atomic(path, f'{head[:-2]},\n "layers": [\n  {lines}\n ]\n}}\n'.encode())
    return path, arrays_path(path)


def load_plan(path: Path) -> Plan:
    """Read what `save_plan` wrote, and what was made of it by hand.

    Raises:
        ArtifactError: a file is missing, is no plan, or the arrays are another plan's.
        CalibrationError: the plan is not consistent; says which layer.
    """
    content, arrays = _read(path)
    try:
        layers = tuple(_layer(row) for row in content["layers"])
        plan = Plan(
            component=_text(content["component"]),
            kind=content["kind"],
            graph={_text(name): _text(sha256) for name, sha256 in content["graph"].items()},
            loras=tuple(dict(lora) for lora in content["loras"]),
            layers=layers,
            vectors=_with_prefix(arrays, _VECTOR),
            corrections=_with_prefix(arrays, _CORRECTION),
            made=dict(content["made"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CalibrationError(
            f"{path}: expected a plan of `latentrt calibrate`, got {err!r}. Calibrate again."
        ) from err
    check_consistent(plan)
    return plan


def plan_key(plan: Plan) -> str:
    """SHA-256 of all that decides about the graphs of a plan; reasons and predictions do not."""
    quants = plan.quants()
    return key_of(
        {
            "component": plan.component,
            "kind": plan.kind,
            "graph": dict(plan.graph),
            "loras": [dict(lora) for lora in plan.loras],
            "layers": {
                name: [quant.scale, _digest(quant.vector), _digest(quant.correction)] for name, quant in quants.items()
            },
        }
    )


def _digest(values: NDArray[np.float32] | None) -> str | None:
    return None if values is None else hashlib.sha256(np.asarray(values, "<f4").tobytes()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], Arrays]:
    """The JSON object and the arrays, as they lie on disk."""
    try:
        content = json.loads(path.read_bytes(), parse_constant=_no_number)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"no object of format {FORMAT}")
        data = arrays_path(path).read_bytes()
        if hashlib.sha256(data).hexdigest() != content.get("arrays"):
            raise ValueError(f"{arrays_path(path).name} is another plan's")
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path}: expected a plan of `latentrt calibrate`, got {err}. Calibrate again.") from err
    tensors = open_safetensors(arrays_path(path), data).tensors
    return content, {name: tensor.read() for name, tensor in tensors.items()}


def _no_number(text: str) -> None:
    raise ValueError(f"{text}, which is no number")


def _with_prefix(arrays: Arrays, prefix: str) -> dict[str, NDArray[np.float32]]:
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where a text belongs")
    return value


def _layer(row: Any) -> LayerPlan:
    """One line of the table; what it holds is checked later."""
    names = {field.name for field in fields(LayerPlan)}
    if not isinstance(row, dict) or row.keys() != names:
        raise ValueError(f"a layer {str(row)[:80]} where one with {', '.join(sorted(names))} belongs")
    return LayerPlan(**row)
