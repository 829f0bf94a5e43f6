"""Networks of published sizes as `latentrt export` writes their graphs, weights left out: a few kilobytes each.

    python tests/benchmarks/published_graphs.py [FOLDER_OF_TRACED_GRAPHS]

makes them anew from the configs that were published, in minutes.
"""

from __future__ import annotations

import lzma
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

FOLDER = Path(__file__).with_name("graphs")
COMPONENTS = {
    "sd1": ("text_encoder", "vae_decoder", "vae_encoder"),
    "sd2": ("text_encoder", "unet"),
    "sdxl": ("text_encoder_2", "unet"),
}
_SMALL = 1024


def published_graph(name: str) -> ir.Model:
    """The graph of a network, such as `sd1_vae_decoder`; weights cannot be read."""
    return ir.from_proto(onnx.load_from_string(lzma.decompress((FOLDER / f"{name}.onnx.xz").read_bytes())))


def write_graphs(cache: Path | None = None) -> None:
    """Trace all of them on the meta device.

    Args:
        cache: of traced graphs.
    """
    from latentrt.export.checkpoint_parts import Part
    from latentrt.export.graph_builder import components_of
    from latentrt.export.networks import Network, unfilled_module
    from latentrt.export.published_configs import published_configs
    from latentrt.export.to_onnx import to_onnx
    from latentrt.export.weights import Weight

    def weight(shape: tuple[int, ...]) -> Weight:
        return Weight(shape, np.dtype("f4"), lambda: np.broadcast_to(np.float32(0), shape))

    def network(name: str, config: Mapping[str, Any]) -> Network:
        model_class = str(config.get("_class_name") or config["architectures"][0])
        module = unfilled_module(Part(name, Path(name), config, model_class, {}, {}))
        return Network(module, {key: weight(tuple(tensor.shape)) for key, tensor in module.state_dict().items()})

    for family, wanted in COMPONENTS.items():
        configs = published_configs(family)
        parts = {key: network(key, configs[key]) for key in configs if key not in ("model_index", "scheduler")}
        for component, made in components_of(parts).items():
            if component in wanted:
                model = to_onnx(made, cache=cache)
                _leave_out_weights(model)
                data = ir.to_proto(model).SerializeToString()
                FOLDER.mkdir(exist_ok=True)
                (FOLDER / f"{family}_{component}.onnx.xz").write_bytes(lzma.compress(data, preset=9))


def _leave_out_weights(model: ir.Model) -> None:
    """Let weights lie in a file that is not there."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SMALL:
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor("weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)


if __name__ == "__main__":
    write_graphs(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
