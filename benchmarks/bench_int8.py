"""What int8 costs in quality on the shapes model: latentrt's plans, naive ones, and ONNX Runtime's own quantizer.

    python benchmarks/bench_int8.py --bundle build/demo/shapes.bundle --plot docs/int8-frontier.svg

All is drawn with 20 steps of DPM++ 2M Karras at guidance 5, and measured on prompts that nothing was calibrated or
chosen with, against fp32 pictures of the same seeds. Beside the table of plans:

    frontier      noise of plans as the solver predicts it, and as it is measured on held-out calls
    sensitivity   noise of single layers from one backward pass, and with that layer alone quantized
    engines       built ahead of time by TensorRT-RTX in fp16 and int8; none is run
    resume        the key of the plan after the first run was killed while it captured

Whatever was measured is in the JSON file at once and is kept by what it was made from: a run that is interrupted, or
that has other rows, goes on. The work folder takes 1 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import onnx_ir as ir
from int8_checks import engine, frontier, killed, sensitivity
from int8_peers import Peer, quantize_peer

from latentrt.calibrate.adopt import adopt_graph
from latentrt.calibrate.apply import apply_plan
from latentrt.calibrate.budget import parse_budgets
from latentrt.calibrate.calibration import frontier_of
from latentrt.calibrate.calibration_options import CalibrateOptions, drawn_by
from latentrt.calibrate.measuring import measuring
from latentrt.calibrate.placement import check_placement
from latentrt.calibrate.plan import Plan
from latentrt.calibrate.plan_file import plan_key
from latentrt.calibrate.planning import PlanOptions, selected
from latentrt.calibrate.prediction_noise import mean_db, share_db
from latentrt.calibrate.preparing import Prepared, captured_part, prepare
from latentrt.calibrate.report import Report, write_report
from latentrt.calibrate.report_plots import frontier_plot
from latentrt.calibrate.search import best
from latentrt.calibrate.solver import predicted_sqnr
from latentrt.calibrate.verification import Verification, value_of
from latentrt.calibrate.verify import verify_plan
from latentrt.export.tool_versions import tool_versions
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.machine import cpu_features
from latentrt.runtime.manifest import key_of, load_manifest, sha256_of, write_atomic

ROOT = Path(__file__).parents[1]
OPTIONS = CalibrateOptions(
    prompts="shapes",
    counts=(64, 16, 256),
    settings={"steps": 20, "sampler": "DPM++ 2M", "schedule": "karras", "guidance": 5.0},
    judge=f"{ROOT / 'examples/shapes/judge.py'}:shows",
)
# Of the network that is drawn with: its own size, one picture.
SIZES = {"batch": 1, "latent_height": 16, "latent_width": 16, "sequence_length": 77}
FEW, ALL = 64, 256
DEFAULT = "latentrt, psnr=32"
TARGETS = ("sm86", "sm89", "sm120")


@dataclass(frozen=True)
class Row:
    """A way to quantize, and how many held-out prompts it is measured on.

    Attributes:
        prompts: drawn.
        numbers: how scales and vectors are chosen, if latentrt does it.
        budget: that layers are chosen for; None to quantize all that can be.
        peer: the other quantizer, if it is that one.
    """

    prompts: int
    numbers: PlanOptions = dataclasses.field(default_factory=PlanOptions)
    budget: str | None = None
    peer: Peer | None = None


def _plain(method: Any) -> PlanOptions:
    return PlanOptions(method=method, smooth=False)


ROWS = {
    DEFAULT: Row(ALL, budget="psnr=32"),
    "latentrt, sqnr=30": Row(ALL, budget="sqnr=30"),
    "min-max, not smoothed": Row(ALL, _plain("minmax")),
    "onnxruntime, min-max": Row(ALL, peer=Peer("MinMax", 512)),
    "percentile 99.99, not smoothed": Row(ALL, _plain("percentile")),
    "onnxruntime, min-max, per tensor, all layers": Row(
        ALL, peer=Peer("MinMax", 512, per_channel=False, same_layers=False)
    ),
    "latentrt, sqnr=34": Row(FEW, budget="sqnr=34"),
    "output error, not smoothed": Row(FEW, _plain("output-error")),
    "min-max, smoothed": Row(FEW, PlanOptions(method="minmax")),
    "percentile 99.99, smoothed": Row(FEW, PlanOptions(method="percentile")),
    "entropy, smoothed": Row(FEW, PlanOptions(method="entropy")),
    "mse, smoothed": Row(FEW, PlanOptions(method="mse")),
    "entropy, not smoothed": Row(FEW, _plain("entropy")),
    "onnxruntime, percentile": Row(FEW, peer=Peer("Percentile", 48)),
    "onnxruntime, entropy": Row(FEW, peer=Peer("Entropy", 48)),
}


@dataclass(frozen=True)
class Bench:
    """The bundle that is worked on, and the file of what was measured."""

    bundle: Path
    work: Path
    file: Path
    original: Path

    def say(self, text: str) -> None:
        """Tell how far it is."""
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def read(self) -> dict[str, Any]:
        """What was measured so far."""
        return dict(json.loads(self.file.read_text())) if self.file.exists() else {}

    def prepared(self, numbers: PlanOptions, budget: str | None = None) -> Prepared:
        """All layers planned."""
        budgets = parse_budgets([budget]) if budget else OPTIONS.budgets
        return prepare(self.bundle, dataclasses.replace(OPTIONS, numbers=numbers, budgets=budgets), say=self.say)

    def once(self, part: str, name: str, made_from: Any, make: Callable[[], Mapping[str, Any]]) -> None:
        """Measure what is not in the file yet, or was made from something else."""
        key = key_of({"made_from": made_from})
        if self.read().get(part, {}).get(name, {}).get("key") == key:
            self.say(f"{part}, {name}: kept")
            return
        self.say(f"{part}, {name}")
        started = time.monotonic()
        found = {"key": key, **make(), "seconds": round(time.monotonic() - started, 1)}
        content = self.read()
        content.setdefault(part, {})[name] = found
        write_atomic(self.file, (json.dumps(content, indent=1) + "\n").encode())


def figures(verification: Verification, precision: str) -> dict[str, Any]:
    """What was measured of a precision, for the table."""
    got = verification.measured[precision]
    found: dict[str, Any] = {"prompts": len(verification.prompts), "accuracy": got.accuracy}
    for name, spread in got.metrics.items():
        found[name] = {key: getattr(spread, key) for key in ("mean", "low", "high", "tail", "worst")}
    if got.noise is not None:
        for name, steps in (("raw", got.noise.raw), ("guided", got.noise.guided)):
            found[f"sqnr_{name}"] = {"mean_db": mean_db(steps), "share_db": share_db(steps)}
    loss = value_of(verification, precision, "accuracy")
    if loss is not None and loss[1] is not None:
        found["accuracy_loss"] = {"mean": loss[0], "low": loss[1][0], "high": loss[1][1]}
    return found


def verified(bench: Bench, prepared: Prepared, key: str, count: int) -> Verification:
    """What the bundle's int8 graph draws, against fp32 and fp16."""
    options, split = prepared.options, prepared.split
    calls = captured_part(
        prepared.source, options, split, "verification", say=bench.say, on_progress=lambda _text, _share: None
    )
    drawing = drawn_by(options, split, "verification", bench.bundle)
    return verify_plan(
        dataclasses.replace(drawing, prompts=drawing.prompts[:count]),
        bench.work / f"pictures-{count}",
        budgets=options.budgets,
        plan=key,
        judge=options.judge,
        calls=calls.calls(),
        calls_key=calls.key,
    )


def in_int8(bench: Bench) -> dict[str, Any]:
    """What of the bundle's int8 graph computes in int8, read from the graph itself."""
    placement = check_placement(ir.load(open_bundle(bench.bundle).graph("unet", "int8")), SIZES)
    return {
        "macs_int8": placement.macs,
        "layers_int8": sum(placement.quantized.values()),
        "layers": sum(placement.total.values()),
        "problems": list(placement.problems),
    }


def chosen_plan(bench: Bench, prepared: Prepared) -> tuple[Plan, dict[str, Any]]:
    """The plan that a search finds for the budget, and what it measured on the way."""
    with measuring(prepared, say=bench.say, on_progress=lambda _text, _share: None) as means:
        trials = means.search(prepared.options.budgets)
    chosen = best(trials)
    if chosen is None:
        raise SystemExit(f"no plan holds {', '.join(map(str, prepared.options.budgets))}")
    told = [{"layers": len(t.choice.chosen), "predicted_db": t.choice.predicted_db, **t.values} for t in trials]
    return selected(prepared.plan, chosen.choice.chosen), {"trials": told}


def own_row(bench: Bench, name: str, row: Row, prepared: Prepared) -> dict[str, Any]:
    """A plan of latentrt's."""
    plan, told = chosen_plan(bench, prepared) if row.budget else (prepared.plan, {})
    apply_plan(prepared.source, plan)
    verification = verified(bench, prepared, plan_key(plan), row.prompts)
    report = Report(
        title=name,
        plan=plan,
        verification=verification,
        frontier=frontier_of(prepared, ()),
        pictures=bench.work / f"pictures-{row.prompts}",
        command="benchmarks/bench_int8.py",
        date=time.strftime("%Y-%m-%d"),
    )
    write_report(bench.work / f"{_slug(name)}.html", report)
    noises = [layer.noise for layer in plan.layers if layer.quantized and layer.noise is not None]
    predicted = {"predicted_db": predicted_sqnr(noises), "plan": plan_key(plan)}
    save_floor(bench, verification)
    return {**told, **predicted, **in_int8(bench), **figures(verification, "int8")}


def peer_row(bench: Bench, name: str, row: Row, prepared: Prepared) -> dict[str, Any]:
    """ONNX Runtime's quantizer on the same captured calls, or as many as there is memory for."""
    peer = row.peer
    assert peer is not None
    captured = list(prepared.calibration.calls())
    calls = captured[:: max(1, len(captured) // peer.calls)][: peer.calls]
    path = bench.work / f"{_slug(name)}.onnx"
    kept = frozenset(layer.name for layer in prepared.layers if not layer.quantizable)
    quantize_peer(prepared.source.graph, path, peer, (dict(call.feeds) for call in calls), kept=kept)
    cases = {f"captured call {index + 1}": call.feeds for index, call in enumerate(islice(captured, 2))}
    adopted = adopt_graph(bench.bundle, "unet", path, "int8", cases=cases)
    verification = verified(bench, prepared, sha256_of(path), row.prompts)
    save_floor(bench, verification)
    warnings = {"calibration_calls": len(calls), "warnings": list(adopted.placement.warnings)}
    return {**warnings, **in_int8(bench), **figures(verification, "int8")}


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def save_floor(bench: Bench, verification: Verification) -> None:
    """The rows of fp32 and fp16, which every verification has, of the most prompts."""
    content = bench.read()
    for precision in ("fp32", "fp16"):
        found = {"macs_int8": 0.0, "layers_int8": 0, **figures(verification, precision)}
        if found["prompts"] >= content.get("table", {}).get(precision, {}).get("prompts", 0):
            content.setdefault("table", {})[precision] = found
    write_atomic(bench.file, (json.dumps(content, indent=1) + "\n").encode())


def table(bench: Bench) -> None:
    """The rows."""
    for name, row in ROWS.items():
        prepared = bench.prepared(row.numbers, row.budget)
        make = peer_row if row.peer else own_row
        stage = prepared.calibration.key if row.peer else prepared.stage.key
        bench.once(
            "table",
            name,
            [dataclasses.asdict(row), stage],
            lambda make=make, name=name, row=row, prepared=prepared: make(bench, name, row, prepared),  # type: ignore[misc]
        )


def plot(bench: Bench, path: Path) -> None:
    """The frontier as a picture that stands by itself, in the report's colours."""
    content = bench.read()
    mixes = [
        (mix["macs_int8"], mix["predicted_db"], mix["measured_db"]) for mix in content["frontier"]["plans"]["plans"]
    ]
    row = content["table"][DEFAULT]
    svg = frontier_plot(mixes, (row["macs_int8"], row["predicted_db"], row["sqnr_guided"]["share_db"]), "int8")
    css = files("latentrt.calibrate").joinpath("report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"(--\w+): (#\w+);", css[: css.index("@media")]))
    svg = re.sub(r"var\((--\w+)\)", lambda match: light[match[1]], svg).replace("currentColor", light["--ink"])
    path.write_text(svg.replace("<svg ", f'<svg style="background: {light["--ground"]}" ', 1))


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="of the shapes model, in fp32 and fp16; it is not changed")
    parser.add_argument("--work", type=Path, default=ROOT / "build/int8")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/int8-shapes.json")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.prepare:
        prepare(told.prepare, OPTIONS)
        return
    bench = Bench(told.work / "shapes.bundle", told.work, told.json, told.bundle)
    if not bench.bundle.exists():
        shutil.copytree(told.bundle, bench.bundle)
    content = bench.read()
    content["machine"] = {"cores": os.cpu_count(), "cpu": list(cpu_features()), "tools": tool_versions()}
    write_atomic(bench.file, (json.dumps(content, indent=1) + "\n").encode())
    prepared = bench.prepared(PlanOptions())
    bench.once("frontier", "plans", prepared.stage.key, lambda: frontier(bench, prepared))
    bench.once("sensitivity", "layers", prepared.stage.key, lambda: sensitivity(prepared))
    table(bench)
    plan, _ = chosen_plan(bench, prepared)
    apply_plan(prepared.source, plan)
    for precision in ("fp16", "int8"):
        held = load_manifest(bench.bundle).artifact("unet", precision)
        for target in TARGETS:
            name = f"{precision} {target}"
            bench.once("engines", name, held and held.key, lambda p=precision, t=target: engines(bench, p, t))  # type: ignore[misc]
    bench.once("resume", "killed", plan_key(prepared.plan), lambda: resume(bench, plan_key(prepared.plan)))
    if told.plot:
        plot(bench, told.plot)


if __name__ == "__main__":
    main()
