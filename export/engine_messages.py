"""TensorRT's messages in plain words: what went wrong, what to do, and whether a build with less is worth another try.

The texts are TensorRT's own, from its builds here and from public issue threads (NVIDIA/TensorRT 1116, 1775, 1948,
2176, 2643, 2727, 3046, 4254, 4258, 4610). The original goes into the error beside the translation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["memory", "workspace", "kernels", "other"]
"""What ran out: the device's memory, the workspace it was limited to, kernels that fit; or something a retry cannot
change."""


@dataclass(frozen=True)
class Explanation:
    """What messages mean.

    Attributes:
        texts: regular expressions; one of them is in the message.
        cause, remedy: for people.
        kind: what another try would have to change.
    """

    texts: tuple[str, ...]
    cause: str
    remedy: str
    kind: Kind = "other"


_REBUILD = "Build the engine again on this machine: latentrt build BUNDLE --force"

# The first that matches is taken: a build without memory also ends with "no implementation", which is not its cause.
_TABLE = (
    Explanation(
        (
            r"no tactics to implement the operation within workspace limit",
            r"Could not find any implementation for node .*insufficient workspace",
        ),
        "a layer needs more scratch memory than --workspace allows",
        "Give a larger --workspace, or none.",
        "workspace",
    ),
    Explanation(
        (
            r"Cuda Runtime \(out of memory\)",
            r"OutOfMemory",
            r"Requested amount of GPU memory .* could not be allocated",
            r"User allocator error allocating",
            r"insufficient memory on requested size",
            r"std::bad_alloc",
        ),
        "the builder ran out of memory",
        "Close what else uses the GPU, give a smaller --workspace, or build for fewer or smaller sizes.",
        "memory",
    ),
    Explanation(
        (r"volume exceeds (\(2\^31\)-1|2147483647)",),
        "a tensor would have more than 2^31 values, which no TensorRT kernel can address",
        "Build for smaller pictures or fewer images; the runtime decodes large pictures in tiles.",
    ),
    Explanation(
        (r"Could not find any implementation for node", r"no tactics to implement the operation"),
        "TensorRT has no kernel for a part of the graph at these shapes",
        "Give a larger --workspace or another --level, build for other sizes, or try another TensorRT version.",
        "kernels",
    ),
    Explanation(
        (r"No importer registered for op", r"Plugin not found", r"could not find plugin"),
        "TensorRT does not know an operator of the graph",
        "Export the component again with this latentrt; graphs that were fused for ONNX Runtime are not for building.",
    ),
    Explanation(
        (
            r"must have (the )?same (input )?types?",
            r"element type \(\w+\) differs",
            r"first input has type \w+ but second input has type",
        ),
        "the inputs of a node have different types, and TensorRT is strongly typed",
        "Export the component again with this latentrt.",
    ),
    Explanation(
        (r"Failed to open file", r"[Ee]xternal data", r"convertOnnxWeights"),
        "the graph's weights beside it could not be read",
        "Run: latentrt verify BUNDLE, and export the component again if a file is missing.",
    ),
    Explanation(
        (
            r"no optimization profile has been defined",
            r"MIN<=OPT<=MAX",
            r"(kMIN|kOPT|kMAX) (dimensions|values) (in|for) profile",
            r"[Oo]ptimization profile",
        ),
        "the shapes do not fit the graph's inputs",
        "Give sizes that the graph takes: latentrt inspect BUNDLE lists its inputs.",
    ),
    Explanation(
        (r"Unsupported SM", r"Target GPU SM \d+ is not supported", r"Target SM \d+ is not found"),
        "this version of TensorRT has no kernels for that GPU",
        "Install a version that has: latentrt doctor lists what the installed ones build for.",
    ),
    Explanation(
        (r"libnvinfer_lean",),
        "the lean runtime that version-compatible engines carry is not installed",
        "Build without --version-compatible, or install the package tensorrt-lean of the same version.",
    ),
    Explanation(
        (r"incompatible device", r"Version tag does not match", r"not compatible with this version"),
        "the engine is of another GPU or another TensorRT version",
        _REBUILD,
    ),
    Explanation((r"Magic tag does not match", r"Serialization assertion"), "the engine's file is damaged", _REBUILD),
    Explanation(
        (
            r"graph_jit\.cpp.*CUDA_SUCCESS",
            r"CUDA initialization failure",
            r"driver version is insufficient",
            r"no CUDA-capable device",
        ),
        "this build needs an NVIDIA GPU and its driver",
        "Build on a machine with a GPU, or without --refit and --strip, which need one.",
    ),
)
_ERRORS = ("ERROR", "INTERNAL_ERROR")


def meaning_of(messages: Iterable[tuple[str, str]]) -> Explanation | None:
    """What the log of a failed call, (severity, text), means, or None if none of its messages is known.

    Where the errors name no cause but missing kernels, the warnings tell whether tactics were skipped for want of
    memory.
    """
    held = list(messages)
    meaning = _explain(_errors(held))
    if meaning is None or meaning.kind == "kernels":
        hint = _explain([text for severity, text in held if severity == "WARNING"])
        if hint is not None and hint.kind in ("memory", "workspace"):
            return hint
    return meaning


def failure_text(messages: Iterable[tuple[str, str]]) -> str:
    """What a log says of a failed call: cause and remedy where they are known, and TensorRT's own words."""
    held = list(messages)
    meaning, words = meaning_of(held), "; ".join(_errors(held)) or "no message"
    return words if meaning is None else f"{meaning.cause}. {meaning.remedy} TensorRT said: {words}"


def _explain(texts: Sequence[str]) -> Explanation | None:
    joined = "\n".join(texts)
    return next((item for item in _TABLE if any(re.search(pattern, joined) for pattern in item.texts)), None)


def _errors(messages: Iterable[tuple[str, str]]) -> list[str]:
    """The errors, each once. Without a driver every failed call logs one about that too, which counts if alone."""
    errors = dict.fromkeys(text for severity, text in messages if severity in _ERRORS)
    return [text for text in errors if not re.search(r"catchCudaError.*cudaError 35", text)] or list(errors)
