"""optimum in an environment of its own, and checkpoints in the only layout that it reads.

optimum-onnx needs transformers 4, this project transformers 5, so optimum runs in a second virtual environment with
the versions of optimum_constraints.txt. It also reads older files only: CLIP's weights under `text_model.`, and a
tokenizer in vocab.json and merges.txt.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
# Random checkpoints of every family.
sys.path[:0] = [str(HERE.parents[1] / "tests"), str(HERE.parents[1] / "tests" / "export")]
TORCH = "torch==2.13.0"
CONSTRAINTS = HERE / "optimum_constraints.txt"
PACKAGES = ("optimum-onnx", "optimum", "transformers", "diffusers", "onnxruntime", "onnxslim", "onnx", "torch", "numpy")


@dataclass(frozen=True)
class Ran:
    """A finished command.

    Attributes:
        seconds: of wall time.
        peak_mib: resident memory at its highest.
    """

    output: str
    seconds: float
    peak_mib: float


def run(command: Sequence[str | Path], variables: Mapping[str, str] | None = None) -> Ran:
    """Run a command to its end, on the CPU and without a network.

    Args:
        variables: further ones of its environment.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    always = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, **always, **(variables or {})}
    began = time.perf_counter()
    with subprocess.Popen(
        [str(word) for word in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        output = process.stdout.read() if process.stdout else ""
        # Like Popen.wait, with the memory of this child alone.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(str(word) for word in command)}: exit {process.returncode}\n{output[-3000:]}")
    return Ran(output, time.perf_counter() - began, _mib(usage))


def _mib(usage: resource.struct_rusage) -> float:
    """Linux counts kilobytes, macOS bytes."""
    return usage.ru_maxrss / 2**20 if sys.platform == "darwin" else usage.ru_maxrss / 2**10


def ensure_venv(folder: Path) -> Path:
    """The environment's Python; makes the environment if there is none."""
    python = folder / "bin" / "python"
    if not (folder / "bin" / "optimum-cli").exists():
        print(f"making {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        for packages in ([os.environ.get("TORCH", TORCH)], ["--requirement", str(CONSTRAINTS)]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def versions_in(python: Path) -> dict[str, str]:
    """Of the packages that make optimum's results."""
    program = (
        f"import json; from importlib.metadata import version; print(json.dumps([version(p) for p in {PACKAGES}]))"
    )
    return dict(zip(PACKAGES, json.loads(run([python, "-c", program]).output.splitlines()[-1]), strict=True))


def export_with_optimum(python: Path, checkpoint: Path, folder: Path, *options: str) -> Ran:
    """`optimum-cli export onnx` of a pipeline; it cannot tell the task from a folder."""
    command: list[str | Path] = [
        python.with_name("optimum-cli"),
        "export",
        "onnx",
        "--model",
        checkpoint,
        "--task",
        "text-to-image",
    ]
    return run([*command, *options, folder])


def export_with_latentrt(
    checkpoint: Path, folder: Path, precision: str = "fp32", variables: Mapping[str, str] | None = None
) -> Ran:
    """`latentrt export`; `variables` of its environment, such as LATENTRT_CACHE."""
    options = ["--precision", precision, "--json", "--force"]
    return run([sys.executable, "-m", "latentrt.runtime.cli", "export", checkpoint, "-o", folder, *options], variables)


def use_older_names(checkpoint: Path) -> Path:
    """Rename the text encoders' weights as transformers 4 has them, where transformers 5 wrote them."""
    for path in checkpoint.glob("text_encoder*/model.safetensors"):
        tensors = load_file(path)
        prefix = "" if any(name.startswith("text_model.") for name in tensors) else "text_model."
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return checkpoint
