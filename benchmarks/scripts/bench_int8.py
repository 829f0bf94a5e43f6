"""What int8 costs in quality on the shapes model: latentrt's plans, naive ones, and ONNX Runtime's own quantizer.

    python benchmarks/scripts/bench_int8.py --bundle build/demo/shapes.bundle --plot docs/int8-frontier.svg

All is drawn with 20 steps of DPM++ 2M Karras at guidance 5, and measured on prompts that nothing was calibrated or
chosen with, against fp32 pictures of the same seeds. Beside the table of plans:

    numbers       noise of all layers by every way to choose their scales, with smoothing and without
    frontier      noise of plans as the solver predicts it, and as it is measured on held-out calls
    sensitivity   noise of single layers from one backward pass, and with that layer alone quantized
    engines       built ahead of time by TensorRT-RTX in fp16 and int8; none is run
    killed        the plan of a run that went on where one was killed, and that of one that was not

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import onnx_ir as ir
from int8_checks import engine, frontier, killed, numbers, sensitivity, split_alone
from int8_peers import Peer, quantize_peer

from latentrt.calibrate.adopt import adopt_graph
from latentrt.calibrate.apply import apply_plan
from latentrt.calibrate.budget import parse_budgets
from latentrt.calibrate.calibration import frontier_of, out_of_reach
from latentrt.calibrate.calibration_options import CalibrateOptions, drawn_by
from latentrt.calibrate.calls import Call
from latentrt.calibrate.capture_file import Capture
from latentrt.calibrate.measuring import measuring
from latentrt.calibrate.placement import check_placement
from latentrt.calibrate.plan import Plan
from latentrt.calibrate.plan_file import plan_key
from latentrt.calibrate.planning import PlanOptions, selected
from latentrt.calibrate.prediction_noise import mean_db, share_db
from latentrt.calibrate.preparing import Prepared, captured_part, prepare
from latentrt.calibrate.report import Report, write_report
from latentrt.calibrate.report_plots import frontier_plot
from latentrt.calibrate.scales import METHODS
from latentrt.calibrate.search import Trial, best
from latentrt.calibrate.solver import predicted_sqnr
from latentrt.calibrate.verification import Verification, value_of
from latentrt.calibrate.verify import verify_plan
from latentrt.export.tool_versions import tool_versions
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.machine import cpu_features
from latentrt.runtime.manifest import key_of, sha256_of, write_atomic

ROOT = Path(__file__).parents[2]
OPTIONS = CalibrateOptions(
    prompts="shapes",
    counts=(64, 16, 256),
    settings={"steps": 20, "sampler": "DPM++ 2M", "schedule": "karras", "guidance": 5.0},
    judge=f"{ROOT / 'examples/shapes/judge.py'}:shows",
)
# For what does not depend on how much is measured.
SMALL = dataclasses.replace(OPTIONS, counts=(8, 4, 16), noise_prompts=2)
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
    "min-max, not smoothed": Row(ALL, _plain("minmax")),
    "onnxruntime, min-max": Row(ALL, peer=Peer("MinMax", 512)),
    "latentrt, sqnr=28": Row(ALL, budget="sqnr=28"),
    "percentile, not smoothed": Row(ALL, _plain("percentile")),
    "min-max, smoothed": Row(ALL, PlanOptions(method="minmax")),
    "onnxruntime, min-max, a scale a weight, all layers": Row(
        ALL, peer=Peer("MinMax", 512, per_channel=False, same_layers=False)
    ),
    "latentrt, psnr=52": Row(FEW, budget="psnr=52"),
    "latentrt, sqnr=32": Row(FEW, budget="sqnr=32"),
    "latentrt, not smoothed": Row(FEW, _plain("output-error")),
    "percentile, smoothed": Row(FEW, PlanOptions(method="percentile")),
    "entropy, smoothed": Row(FEW, PlanOptions(method="entropy")),
    "mse, smoothed": Row(FEW, PlanOptions(method="mse")),
    "onnxruntime, percentile": Row(FEW, peer=Peer("Percentile", 64)),
    "onnxruntime, entropy": Row(FEW, peer=Peer("Entropy", 64)),
}


@dataclass(frozen=True)
class Bench:
    """The bundle that is worked on, and the file of what was measured."""

    bundle: Path
    work: Path
    file: Path

    def say(self, text: str) -> None:
        """Tell how far it is."""
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def read(self) -> dict[str, Any]:
        """What was measured so far."""
        return dict(json.loads(self.file.read_text())) if self.file.exists() else {}

    def write(self, part: str, found: Mapping[str, Any]) -> None:
        """Add to what was measured."""
        content = self.read()
        content[part] = {**content.get(part, {}), **found}
        write_atomic(self.file, (json.dumps(content, indent=1) + "\n").encode())

    def once(self, part: str, name: str, made_from: Any, make: Callable[[], Mapping[str, Any]]) -> None:
        """Measure what is not in the file yet, or was made from something else."""
        key = key_of({"made_from": made_from})
        if self.read().get(part, {}).get(name, {}).get("key") == key:
            self.say(f"{part}, {name}: kept")
            return
        self.say(f"{part}, {name}")
        started = time.monotonic()
        self.write(part, {name: {"key": key, **make(), "seconds": round(time.monotonic() - started, 1)}})

    def prepared(self, row: Row) -> Prepared:
        """All layers planned. Where none are chosen, noise is for the record only."""
        options = dataclasses.replace(OPTIONS, numbers=row.numbers)
        if row.budget:
            options = dataclasses.replace(options, budgets=parse_budgets([row.budget]))
        else:
            options = dataclasses.replace(options, noise_prompts=1)
        return prepare(self.bundle, options, say=self.say)

    def held_out(self, prepared: Prepared) -> Capture:
        """Calls that nothing was calibrated or chosen with."""
        return captured_part(
            prepared.source,
            OPTIONS,
            prepared.split,
            "verification",
            say=self.say,
            on_progress=lambda _text, _share: None,
        )


def verified(bench: Bench, prepared: Prepared, key: str, count: int) -> Verification:
    """What the bundle's int8 graph draws, against fp32 and fp16."""
    calls = bench.held_out(prepared)
    drawing = drawn_by(OPTIONS, prepared.split, "verification", bench.bundle)
    verification = verify_plan(
        dataclasses.replace(drawing, prompts=drawing.prompts[:count]),
        bench.work / f"pictures-{count}",
        budgets=prepared.options.budgets,
        plan=key,
        judge=OPTIONS.judge,
        calls=calls.calls(),
        calls_key=calls.key,
    )
    if count == ALL:
        bench.write("table", {name: figures(verification, name) for name in ("fp32", "fp16")})
    return verification


def figures(verification: Verification, precision: str) -> dict[str, Any]:
    """What was measured of a precision."""
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


def in_int8(bench: Bench) -> dict[str, Any]:
    """What of the bundle's int8 graph computes in int8, read from the graph itself."""
    placement = check_placement(ir.load(open_bundle(bench.bundle).graph("unet", "int8")), SIZES)
    return {
        "macs_int8": placement.macs,
        "layers_int8": sum(placement.quantized.values()),
        "layers": sum(placement.total.values()),
        "problems": list(placement.problems),
        "warnings": list(placement.warnings),
    }


def chosen_plan(bench: Bench, prepared: Prepared) -> tuple[Plan, tuple[Trial, ...]]:
    """The plan that a search finds for the budget, and what was measured on the way."""
    with measuring(prepared, say=bench.say, on_progress=lambda _text, _share: None) as means:
        trials = means.search(prepared.options.budgets)
    chosen = best(trials)
    if chosen is None:
        raise SystemExit(out_of_reach(trials, prepared.plan))
    return selected(prepared.plan, chosen.choice.chosen), trials


def own_row(bench: Bench, name: str, row: Row, prepared: Prepared) -> dict[str, Any]:
    """A plan of latentrt's, and its report in the work folder."""
    plan, trials = chosen_plan(bench, prepared) if row.budget else (prepared.plan, ())
    apply_plan(prepared.source, plan)
    verification = verified(bench, prepared, plan_key(plan), row.prompts)
    report = Report(
        title=name,
        plan=plan,
        verification=verification,
        frontier=frontier_of(prepared, trials),
        pictures=bench.work / f"pictures-{row.prompts}",
        command="benchmarks/scripts/bench_int8.py",
        date=time.strftime("%Y-%m-%d"),
    )
    write_report(bench.work / f"{_slug(name)}.html", report)
    noises = [layer.noise for layer in plan.layers if layer.quantized and layer.noise is not None]
    return {
        **in_int8(bench),
        **figures(verification, "int8"),
        "predicted_db": predicted_sqnr(noises),
        "plan": plan_key(plan),
        "trials": [
            {"layers": len(trial.choice.chosen), "predicted_db": trial.choice.predicted_db, **trial.values}
            for trial in trials
        ],
    }


def peer_row(bench: Bench, name: str, row: Row, prepared: Prepared) -> dict[str, Any]:
    """ONNX Runtime's quantizer on the same captured calls, or as many as there is memory for."""
    peer = row.peer
    assert peer is not None
    captured = list(prepared.calibration.calls())
    calls = captured[:: len(captured) // peer.calls]
    path = bench.work / f"{_slug(name)}.onnx"
    kept = frozenset(layer.name for layer in prepared.layers if not layer.quantizable)
    quantize_peer(prepared.source.graph, path, peer, (dict(call.feeds) for call in calls), kept=kept)
    adopt_graph(bench.bundle, "unet", path, "int8", cases={"captured call": calls[0].feeds})
    verification = verified(bench, prepared, sha256_of(path), row.prompts)
    return {"calibration_calls": len(calls), **in_int8(bench), **figures(verification, "int8")}


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def measure(bench: Bench, original: Path) -> None:
    """All that is not measured yet."""
    prepared = bench.prepared(ROWS[DEFAULT])
    measure_row(bench, DEFAULT, ROWS[DEFAULT], prepared)
    key = prepared.stage.key

    def held_out() -> Iterator[Call]:
        return bench.held_out(prepared).calls()

    bench.once("checks", "frontier", key, lambda: frontier(prepared, held_out()))
    bench.once("checks", "numbers", key, lambda: numbers(prepared.source, all_numbers(bench), held_out()))
    calls = [call for call in prepared.calibration.calls() if call.prompt < OPTIONS.noise_prompts]
    bench.once("checks", "sensitivity", key, lambda: sensitivity(prepared, calls[::4]))
    apply_plan(prepared.source, chosen_plan(bench, prepared)[0])
    for target in TARGETS:
        for precision in ("fp16", "int8"):
            graph = sha256_of(open_bundle(bench.bundle).graph("unet", precision))
            bench.once("engines", f"{precision} {target}", graph, partial(engine, bench.bundle, precision, target))
    command = [sys.executable, __file__, "--prepare"]
    folder = bench.work / "killed"
    bench.once("checks", "killed", key, lambda: killed(original, folder, SMALL, command))
    for name, row in ROWS.items():
        measure_row(bench, name, row, prepared if row.peer else bench.prepared(row))


def all_numbers(bench: Bench) -> dict[str, Plan]:
    """Plans that quantize all layers, by each way to choose their scales; and with a part of smoothing alone."""
    rows = {
        f"{method}, {'smoothed' if smooth else 'not smoothed'}": Row(0, PlanOptions(method=method, smooth=smooth))
        for smooth in (True, False)
        for method in METHODS
    }
    plans = {name: bench.prepared(row).plan for name, row in rows.items()}
    split = split_alone(*(plans[f"minmax, {how}"] for how in ("smoothed", "not smoothed")))
    return {**plans, "minmax, conv_shortcut smoothed alone": split}


def measure_row(bench: Bench, name: str, row: Row, prepared: Prepared) -> None:
    """A row, if it is not measured yet."""
    make = peer_row if row.peer else own_row
    made_from = [dataclasses.asdict(row), prepared.stage.key]
    bench.once("table", name, made_from, lambda: make(bench, name, row, prepared))


def plot(bench: Bench, path: Path) -> None:
    """The frontier as a picture that stands by itself, in the report's colours."""
    content = bench.read()
    mixes = [
        (mix["macs_int8"], mix["predicted_db"], mix["measured_db"]) for mix in content["checks"]["frontier"]["plans"]
    ]
    row = content["table"][DEFAULT]
    svg = frontier_plot(mixes, (row["macs_int8"], row["predicted_db"], row["sqnr_guided"]["share_db"]), "int8")
    css = files("latentrt.calibrate").joinpath("report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"(--\w+): (#\w+);", css[: css.index("@media")]))
    svg = re.sub(r"var\((--\w+)\)", lambda match: light[match[1]], svg).replace("currentColor", light["--ink"])
    path.write_text(svg.replace("<svg ", f'<svg style="background: {light["--ground"]}" ', 1))


def tell(content: Mapping[str, Any]) -> None:
    """Print the table."""
    for name, row in content["table"].items():
        psnr, loss = row.get("psnr"), row.get("accuracy_loss")
        cells = [f"{name:46}", f"{row['prompts']:4}", f"{row.get('macs_int8', 0):7.1%}"]
        if psnr:
            cells += [
                f"{psnr['mean']:5.1f} dB ({psnr['low']:.1f} to {psnr['high']:.1f}), worst {psnr['worst']:4.1f}",
                f"SSIM {row['ssim']['mean']:.4f}",
                f"FLIP {row['flip']['mean']:.4f}",
                f"SQNR {row['sqnr_raw']['mean_db']:4.1f} raw {row['sqnr_guided']['mean_db']:4.1f} guided",
            ]
        cells.append(f"accuracy {row['accuracy']:.1%}")
        if loss:
            cells.append(f"loss {100 * loss['mean']:.1f} ({100 * loss['low']:.1f} to {100 * loss['high']:.1f})")
        print("  ".join(cells))


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="of the shapes model, in fp32 and fp16; it is not changed")
    parser.add_argument("--work", type=Path, default=ROOT / "build/int8")
    parser.add_argument("--json", type=Path, default=ROOT / "build/int8-shapes.json")
    parser.add_argument("--plot", type=Path, help="write the frontier here, as SVG")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.prepare:
        prepare(told.prepare, SMALL)
        return
    bench = Bench(told.work / "shapes.bundle", told.work, told.json)
    if not bench.bundle.exists():
        shutil.copytree(told.bundle, bench.bundle)
    bench.write("machine", {"cores": os.cpu_count(), "cpu": list(cpu_features()), "tools": tool_versions()})
    measure(bench, told.bundle)
    tell(bench.read())
    if told.plot:
        plot(bench, told.plot)


if __name__ == "__main__":
    main()
