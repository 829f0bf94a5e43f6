"""The tools that decide about a graph, and the versions that are installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

# Raised whenever the same checkpoint and tools would give other graphs than before.
GRAPH_REVISION = 4
GRAPH_TOOLS = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript")
TOOLS = (*GRAPH_TOOLS, "latentrt", "onnxruntime", "numpy")


def tool_versions(names: Sequence[str] = TOOLS) -> dict[str, str]:
    """Installed versions by distribution; those that are not installed are left out."""
    return {name: found for name in names if (found := _installed(name)) is not None}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
