"""Export Stable Diffusion checkpoints to verified ONNX graphs, and build TensorRT engines from them."""

from .build_options import BuildOptions
from .checkpoint import Checkpoint, open_checkpoint
from .engine_jobs import build_engines
from .engine_making import EngineResult
from .exporter import Exported, export_checkpoint
from .parity import Comparison, compare

__all__ = [
    # checkpoint to graphs
    "Checkpoint",
    "Comparison",
    "Exported",
    "compare",
    "export_checkpoint",
    "open_checkpoint",
    # graphs to engines
    "BuildOptions",
    "EngineResult",
    "build_engines",
]
