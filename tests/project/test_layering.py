"""runtime <- export <- calibrate <- benchmarks, and the runtime without PyTorch.

Parsed from the sources, and seen at import.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "runtime": set(),
    "export": {"runtime"},
    "calibrate": {"runtime", "export"},
    "benchmarks": {"runtime", "export", "calibrate"},
}
# Folders of a part that are no packages: neither imported nor in the wheel.
ASIDE = {"benchmarks": {"scripts", "results"}}
BANNED_IN_RUNTIME = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "polygraphy", "safetensors"}


def imported_modules(source: str) -> Iterator[str]:
    """Absolute module names that a source imports anywhere, functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def broken_rules(folder: str, source: str) -> set[str]:
    """The imports of a source that its folder may not have."""
    broken = set()
    for name in imported_modules(source):
        parts = name.split(".")
        if parts[0] in ALLOWED:  # works only from the repository's root
            broken.add(name)
        ours = parts[0] == "latentrt" and len(parts) > 1 and parts[1] in ALLOWED
        if ours and parts[1] not in {folder} | ALLOWED[folder]:
            broken.add(name)
        if folder == "runtime" and parts[0] in BANNED_IN_RUNTIME:
            broken.add(name)
    return broken


def sources() -> list[Path]:
    return sorted(path for folder in ALLOWED for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_follow_the_chain(path: Path) -> None:
    assert not broken_rules(path.parent.name, path.read_text())


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("runtime", "import torch"),
        ("runtime", "def f():\n    from diffusers import X"),
        ("runtime", "from latentrt.export import exporter"),
        ("runtime", "from latentrt import calibrate"),
        ("export", "import latentrt.calibrate.table"),
        ("export", "import runtime.session"),
        ("calibrate", "from latentrt.benchmarks.results_file import Results"),
    ],
)
def test_the_check_sees_a_broken_rule(folder: str, source: str) -> None:
    assert broken_rules(folder, source)


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"import sys, json; {statement}; print(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_runtime_brings_numpy_and_the_standard_library_only() -> None:
    at_start = modules_after("pass")
    brought = modules_after("import latentrt.runtime, latentrt.runtime.pipeline") - at_start
    assert brought - sys.stdlib_module_names == {"latentrt", "numpy"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's own account of peak memory")
def test_importing_the_runtime_takes_little_memory() -> None:
    """60 MB. Not by getrusage, whose peak a process inherits from the one that started it."""
    code = "import latentrt.runtime.pipeline; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    (peak,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("VmHWM")]
    assert int(peak) * 1024 < 60e6


def test_the_command_starts_without_pytorch() -> None:
    brought = modules_after("from latentrt.runtime.cli import main; main(['generate', '--help'])")
    assert not brought & (BANNED_IN_RUNTIME | {"onnxruntime"})


def test_folders_are_flat() -> None:
    """A nested package would work from the sources and be missing from the wheel."""
    for folder in ALLOWED:
        nested = {p.name for p in (ROOT / folder).iterdir() if p.is_dir()} - {"__pycache__"}
        assert nested == ASIDE.get(folder, set())
        assert not any((ROOT / folder / name / "__init__.py").exists() for name in nested)
