"""The project's own benchmarks: `make bench`, and on a host with an NVIDIA GPU `make bench-gpu`.

    python benchmarks/scripts/project_bench.py --only end-to-end,growth

Each stage is some commands that a user could type; what they find is kept in a folder. A stage that is finished is not
run again as long as its commands, and what they stand on, are the same; --force runs it all the same. At the end the
project's bars are held against what was measured: exit 1 if one is missed. Needs the bundle of `make demo`.

Stages: bundle, export, end-to-end, export-full-size, full-size, growth, samplers, int8. The shapes model is measured
with its trained weights, Stable Diffusion 1.5's width with random ones. --keep copies the results to
benchmarks/results, from which results_table.py writes the tables of README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from project_bars import bars_of
from project_stages import Command, Plan, Stage, stages_of

from latentrt.runtime.machine import probe_machine
from latentrt.runtime.manifest import key_of, load_manifest, write_atomic

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results"
DONE = "finished.json"
PROGRAMS = {"latentrt": (sys.executable, "-m", "latentrt.runtime.cli"), "python": (sys.executable,)}


def with_needs(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """The named stages and all that they need, in their order.

    Raises:
        SystemExit: there is no stage of a name.
    """
    known = {stage.name: stage for stage in stages}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"only: expected stages of {', '.join(known)}, got {', '.join(unknown)}.")
    wanted = set(names)
    for stage in reversed(stages):
        wanted |= set(stage.needs) if stage.name in wanted else set()
    return [stage for stage in stages if stage.name in wanted]


def keys_of(stages: Sequence[Stage], files: Mapping[str, str]) -> dict[str, str]:
    """By stage, a key of its commands, of the files by hash that all stand on, and of the stages that it needs."""
    keys: dict[str, str] = {}
    for stage in stages:
        words = [command.words for command in stage.commands]
        keys[stage.name] = key_of({"commands": words, "files": files, "needs": [keys[name] for name in stage.needs]})
    return keys


def graphs_of(bundle: Path) -> dict[str, str]:
    """Hashes of the graphs that a bundle was made with; what a stage adds for a provider or GPU is left out."""
    manifest = load_manifest(bundle)
    plain = [artifact for artifact in manifest.artifacts if not artifact.target]
    return {name: manifest.files[name].sha256 for artifact in plain for name in artifact.files}


def is_done(stage: Stage, key: str, done: Mapping[str, Any], out: Path) -> bool:
    """Whether a stage was finished with this key and its results are still there."""
    same = done.get(stage.name, {}).get("key") == key
    return same and all((out / name).exists() for name in stage.results)


def run(command: Command) -> None:
    """Run a command from the repository's root, its output passed on.

    Raises:
        SystemExit: it failed, and may not.
    """
    program, *words = command.words
    line = shlex.join(command.words)
    print(f"  {line}", flush=True)
    code = subprocess.run([*PROGRAMS[program], *words], cwd=ROOT).returncode
    if code and not command.may_fail:
        raise SystemExit(
            f"bench: {' '.join(command.words)} failed with exit {code}. The same command goes on from here."
        )
    if code:
        print(f"  failed with exit {code}; the rows that need it will say why", flush=True)


def run_stages(plan: Plan, names: Sequence[str], *, force: bool) -> list[Stage]:
    """Run what is named and not done, and say how long it took; returns these stages and those that they need."""
    out = ROOT / plan.out
    out.mkdir(parents=True, exist_ok=True)
    stages = stages_of(plan)
    keys = keys_of(stages, graphs_of(ROOT / plan.bundle))
    chosen = with_needs(stages, names)
    done: dict[str, Any] = json.loads((out / DONE).read_text()) if (out / DONE).exists() else {}
    for stage in chosen:
        if is_done(stage, keys[stage.name], done, out) and not (force and stage.name in names):
            found = done[stage.name]
            print(f"{stage.name}: kept, it took {found['seconds']:.0f} s on {found['date']}", flush=True)
            continue
        print(f"{stage.name}: {stage.about}", flush=True)
        started = time.perf_counter()
        for command in stage.commands:
            run(command)
        seconds = time.perf_counter() - started
        done[stage.name] = {"key": keys[stage.name], "seconds": round(seconds, 1), "date": time.strftime("%Y-%m-%d")}
        write_atomic(out / DONE, json.dumps(done, indent=1).encode() + b"\n")
        print(f"{stage.name}: {seconds:.0f} s", flush=True)
    return chosen


def keep(stages: Sequence[Stage], out: Path, kept: Path) -> None:
    """Copy the stages' results to where the README's tables are made from."""
    for name in (name for stage in stages for name in stage.results):
        shutil.copyfile(out / name, kept / name)
        print(f"kept {kept / name}")


def show_bars(out: Path) -> bool:
    """Print the bars; whether none is missed."""
    bars = bars_of(out)
    print("\nbars on two cores, same weights, same run:")
    for bar in bars:
        print(f"  {bar.line}")
    return all(bar.met is not False for bar in bars)


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="stages divided by commas, and what they need; default all")
    parser.add_argument("--out", help="folder of the results, in the repository; default build/bench or bench-gpu")
    parser.add_argument("--bundle", default="build/demo/shapes.bundle", help="of the shapes model, in the repository")
    parser.add_argument("--gpu", action="store_true", help="on the GPU, beside PyTorch in fp16")
    parser.add_argument("--full-size", type=int, help="pixels at SD 1.5's width; default 256, on a GPU 512")
    parser.add_argument("--full-steps", type=int, help="steps there; default 4, on a GPU 20")
    parser.add_argument("--force", action="store_true", help="run finished stages again")
    parser.add_argument("--keep", action="store_true", help="copy the results to benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="one run of each row: shows that everything starts")
    parser.add_argument("--list", action="store_true", help="print the commands of the stages and stop")
    parser.add_argument("--check", action="store_true", help="say whether this machine has what --gpu wants, and stop")
    told = parser.parse_args(arguments)
    if told.quick and told.keep:
        parser.error("keep: expected a whole run, got --quick. Leave one out.")
    return told


def plan_of(told: argparse.Namespace) -> Plan:
    """What the options ask for; on a GPU at the size and steps that are usual there."""
    return Plan(
        out=told.out or f"build/bench{'-gpu' if told.gpu else ''}{'-quick' if told.quick else ''}",
        bundle=told.bundle,
        gpu=told.gpu,
        full_size=told.full_size or (512 if told.gpu else 256),
        full_steps=told.full_steps or (20 if told.gpu else 4),
        quick=told.quick,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, hold them against the bars."""
    told = options_of(arguments)
    plan = plan_of(told)
    names = told.only.split(",") if told.only else [stage.name for stage in stages_of(plan)]
    if told.list:
        for stage in with_needs(stages_of(plan), names):
            print("\n  ".join((f"{stage.name}: {stage.about}", *(shlex.join(each.words) for each in stage.commands))))
        return 0
    machine = probe_machine()
    if plan.gpu and not machine.gpus:
        print(
            f"bench-gpu: expected an NVIDIA GPU, got none: {machine.why_no_gpu}. For the CPU: make bench.",
            file=sys.stderr,
        )
        return 1
    if told.check:
        return 0
    if not (ROOT / plan.bundle).is_dir():
        print(f"bench: expected a bundle at {plan.bundle}, got none. Make it with: make demo.", file=sys.stderr)
        return 1
    stages = run_stages(plan, names, force=told.force)
    if told.keep:
        keep(stages, ROOT / plan.out, KEPT)
    if plan.gpu or plan.quick:
        print("\nno bars are set for a GPU" if plan.gpu else "\nquick: these figures mean nothing")
        return 0
    return 0 if show_bars(ROOT / plan.out) else 1


if __name__ == "__main__":
    sys.exit(main())
