"""Statistics of Stable Diffusion 1.5's U-Net at its published size, streamed: time and peak memory.

    python benchmarks/scripts/bench_statistics.py --calls 8 --json benchmarks/results/statistics-cpu.json

No checkpoint is written: weights are cut from one block of random numbers when a layer runs, and dropped again, as
those of a bundle are read from its graph. Time is that of the calls with and without statistics; memory is the peak of
the whole process, VmHWM. The rows are noise, which costs what a picture costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import os
import platform
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from latentrt.calibrate.calls import Call
from latentrt.calibrate.layers import Layer, graph_layers
from latentrt.calibrate.statistics import Statistics, collect, estimated_bytes
from latentrt.export.checkpoint_parts import Part
from latentrt.export.networks import Network, unfilled_module, weights_at_hand
from latentrt.export.published_configs import published_configs
from latentrt.export.tool_versions import tool_versions
from latentrt.export.unet import UNet
from latentrt.export.weights import Weight

ROOT = Path(__file__).resolve().parents[2]
GRAPH = ROOT / "tests/export/sd15_unet.onnx.xz"
# Random numbers: somewhat more than the largest weight has.
BLOCK = 2**25
STEPS = 1000


def random_network(rng: np.random.Generator) -> Network:
    """The U-Net with weights that keep activations near unit size."""
    config = published_configs("sd1")["unet"]
    module = unfilled_module(Part("unet", Path("sd1"), config, "UNet2DConditionModel", {}, {}))
    block = rng.standard_normal(BLOCK, np.float32)

    def weight(name: str, shape: tuple[int, ...]) -> Weight:
        def read() -> Any:
            if len(shape) == 1:
                return np.full(shape, "norm" in name and name.endswith("weight"), np.float32)
            count = int(np.prod(shape))
            start = zlib.crc32(name.encode()) % (BLOCK - count)
            return block[start : start + count].reshape(shape) / np.float32(np.sqrt(np.prod(shape[1:])))

        return Weight(shape, np.dtype(np.float32), read)

    return Network(module, {name: weight(name, tuple(held.shape)) for name, held in module.state_dict().items()})


def random_calls(count: int, rows: int, size: int, rng: np.random.Generator) -> Iterator[Call]:
    """Calls at evenly spaced timesteps."""
    for index in range(count):
        timestep = (count - index - 0.5) * STEPS / count
        feeds = {
            "sample": rng.standard_normal((rows, 4, size, size), np.float32),
            "timestep": np.full(rows, timestep, np.float32),
            "encoder_hidden_states": rng.standard_normal((rows, 77, 768), np.float32),
        }
        yield Call(feeds, prompt=index, timestep=timestep, negatives=rows // 2, guidance=7.5)


def layers_at(size: int) -> tuple[Layer, ...]:
    """The layers of the graph."""
    model = ir.from_proto(onnx.load_from_string(lzma.decompress(GRAPH.read_bytes())))
    sizes = {"batch": 1, "latent_height": size, "latent_width": size, "sequence_length": 77}
    return graph_layers(model, sizes)


def held_bytes(statistics: Statistics) -> int:
    """Of all arrays."""
    return sum(
        array.nbytes
        for own in itertools.chain.from_iterable(bins.values() for bins in statistics.inputs.values())
        for array in (
            own.amax,
            own.sums,
            own.histogram.counts,
            own.reservoir.priorities,
            own.reservoir.importance,
            own.reservoir.rows,
        )
    )


def peak_bytes() -> int:
    """Most memory that this process ever had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measured(count: int, rows: int, size: int) -> dict[str, Any]:
    """One call without statistics, then calls with them."""
    rng = np.random.default_rng(0)
    network, layers = random_network(rng), layers_at(size)
    wrapper = UNet(network.module).eval()
    with weights_at_hand(network), torch.inference_mode():
        started = time.perf_counter()
        for call in random_calls(1, rows, size, rng):
            wrapper(**{name: torch.from_numpy(values) for name, values in call.feeds.items()})
        plain, plain_peak = time.perf_counter() - started, peak_bytes()
        started = time.perf_counter()
        statistics = collect(wrapper, layers, random_calls(count, rows, size, rng), steps=STEPS)
        watched = (time.perf_counter() - started) / count
    return {
        "calls": count,
        "rows": rows,
        "latent_size": size,
        "seconds_per_call": watched,
        "seconds_per_call_without": plain,
        "peak_bytes": peak_bytes(),
        "peak_bytes_without": plain_peak,
        "statistics_bytes": held_bytes(statistics),
        "estimated_statistics_bytes": estimated_bytes(layers),
        "layers": len(layers),
        "tensors": len(statistics.inputs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=8, help="one or more of every timestep bin fill all statistics")
    parser.add_argument("--rows", type=int, default=2, help="of a call")
    parser.add_argument("--size", type=int, default=64, help="of the latents")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measured(options.calls, options.rows, options.size)
    print(
        f"{found['seconds_per_call']:.1f} s a call of {found['rows']} rows, {found['seconds_per_call_without']:.1f} s "
        f"without statistics; peak {found['peak_bytes'] / 1e9:.2f} GB, {found['peak_bytes_without'] / 1e9:.2f} GB "
        f"without; statistics {found['statistics_bytes'] / 1e6:.0f} MB"
    )
    if options.json:
        machine = {"cpu": platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        content = {"machine": machine, "tools": tool_versions(), "weights": "random", "unet": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
