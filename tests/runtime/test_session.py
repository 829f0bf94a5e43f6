from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.session import OnnxSession

WIDTH, LAYERS = 1024, 16


@pytest.fixture(scope="module")
def large_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrix products by 64 MiB of weights in external data, each negated first: a folded copy would show."""
    path = tmp_path_factory.mktemp("unet") / "model.onnx"
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH), np.float32) / 32, f"w{index}")
        for index in range(LAYERS)
    ]
    node = helper.make_node
    nodes = []
    for index in range(LAYERS):
        nodes.append(node("Neg", [f"w{index}"], [f"n{index}"]))
        nodes.append(node("MatMul", [f"x{index}", f"n{index}"], [f"x{index + 1}"]))
    info = helper.make_tensor_value_info
    inputs, outputs = ([info(f"x{index}", TensorProto.FLOAT, ["b", WIDTH])] for index in (0, LAYERS))
    graph = helper.make_graph(nodes, "unet", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx_data")
    return path


def private_bytes(path: Path, *, optimize: bool) -> tuple[int, float]:
    """Memory of its own that a fresh process holds after a run, and the sum of what the run gave."""
    program = f"""
import re, numpy as np
from pathlib import Path
from latentrt.runtime.session import OnnxSession
session = OnnxSession(Path({str(path)!r}), threads=1, optimize={optimize})
total = session({{"x0": np.ones((2, {WIDTH}), np.float32)}})["x{LAYERS}"].sum()
status = Path("/proc/self/status").read_text()
print(int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024, float(total))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    size, total = done.stdout.split()
    return int(size), float(total)


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_weights_stay_in_the_mapped_file(large_graph: Path) -> None:
    weights = LAYERS * WIDTH * WIDTH * 4
    kept, expected = private_bytes(large_graph, optimize=True)
    mapped, found = private_bytes(large_graph, optimize=False)
    assert kept - mapped > 0.7 * weights
    assert found == pytest.approx(expected, rel=1e-3)


def peak_bytes(path: Path, *, swapped: bool) -> int:
    """The most memory of a fresh process that runs three networks one after the other."""
    program = f"""
import re, numpy as np
from functools import partial
from pathlib import Path
from latentrt.runtime.residency import SwappedSession, held
from latentrt.runtime.session import OnnxSession
opens = partial(OnnxSession, Path({str(path)!r}), threads=1)
networks = [SwappedSession("unet", opens) if {swapped} else opens() for _ in range(3)]
for network in networks:
    with held(network):
        for _ in range(2):
            network({{"x0": np.ones((2, {WIDTH}), np.float32)}})
status = Path("/proc/self/status").read_text()
print(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_networks_that_are_swapped_take_the_memory_of_one(large_graph: Path) -> None:
    weights = LAYERS * WIDTH * WIDTH * 4
    saved = peak_bytes(large_graph, swapped=False) - peak_bytes(large_graph, swapped=True)
    assert saved > 1.7 * weights


def test_a_damaged_graph_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=re.escape(str(path))):
        OnnxSession(path, optimize=False)
