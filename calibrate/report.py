"""The report of a calibration: one HTML page that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from latentrt.runtime.manifest import write_atomic

from .budget import decibels
from .plan import Plan
from .prediction_noise import mean_db, share_db
from .report_html import document, facts, listed, plain, plot, tiles
from .report_pictures import picture_row, shown_prompts
from .report_plots import (
    Frontier,
    frontier_plot,
    kind_shares,
    kinds_plot,
    layers_plot,
    noise_plot,
    noisiest,
    short_name,
)
from .report_tables import layers_table, precisions_table
from .verification import Verification, outcomes, what_limits


@dataclass(frozen=True, eq=False)
class Report:
    """What a report tells.

    Attributes:
        title: of the page, such as the bundle's name.
        plan: that was applied.
        verification: of it.
        frontier: mixes that the solver offered: share of the macs, predicted dB, measured dB or None.
        pictures: the folder that `verify_plan` drew into.
        command: that made all this.
        date: when, for people.
    """

    title: str
    plan: Plan
    verification: Verification
    frontier: Frontier
    pictures: Path
    command: str
    date: str


def write_report(path: Path, report: Report) -> None:
    """Write a report's page.

    Raises:
        ArtifactError: a picture is missing or damaged, or a budget was not measured.
        OSError: the disk is full or the folder not writable.
    """
    write_atomic(path, page(report).encode())


def page(report: Report) -> str:
    """A report as an HTML page.

    Raises:
        ArtifactError: a picture is missing or damaged, or a budget was not measured.
    """
    parts = (_headline, _precisions, _pictures, _steps, _sensitivity, _frontier, _layers, _making)
    title = f"{report.title}: {report.plan.precision} calibration"
    return document(title, "\n".join(part(report) for part in parts))


def chosen_mix(report: Report) -> tuple[float, float, float | None]:
    """The plan as a point of the frontier: share of the macs quantized, predicted dB, measured dB or None."""
    quantized = [layer for layer in report.plan.layers if layer.quantized]
    noise = report.verification.measured[report.verification.tested].noise
    return (
        sum(layer.macs for layer in quantized),
        decibels(1.0, sum(layer.noise or 0.0 for layer in quantized)),
        None if noise is None else share_db(noise.guided),
    )


def _headline(report: Report) -> str:
    plan, verification = report.plan, report.verification
    found = outcomes(verification)
    missed = [outcome for outcome in found if not outcome.met]
    kind, tested = plan.precision, verification.tested
    where = "on a GPU" if verification.on_gpu else "on the CPU with ONNX Runtime; not run on a GPU"
    marks = [("good", "met") if outcome.met else ("bad", "missed") for outcome in found]
    lines = [
        f'<span class="{colour}">{word}</span> {escape(str(outcome))}'
        for (colour, word), outcome in zip(marks, found, strict=True)
    ]
    limit = f"<p>{escape(what_limits(missed, plan))}</p>" if missed else ""
    share, _, _ = chosen_mix(report)
    measured = verification.measured[tested]
    figures = {
        f"multiplications in {kind}": f"{share:.1%}",
        f"layers in {kind}": f"{sum(layer.quantized for layer in plan.layers)} of {len(plan.layers)}",
        "mean PSNR": f"{measured.metrics['psnr'].mean:.1f} dB",
    }
    if measured.noise is not None:
        figures["mean SQNR, guided"] = f"{mean_db(measured.noise.guided):.1f} dB"
    if measured.accuracy is not None:
        figures["prompt accuracy"] = f"{measured.accuracy:.1%}"
    return (
        f'<p class="soft">latentrt calibrate, {escape(report.date)}</p>\n'
        f"<h1>{escape(report.title)}: {kind} {'misses its' if missed else 'holds its'} quality budget</h1>\n"
        f"<p>The {escape(plan.component)} quantized to {kind}, measured {where}: {len(verification.prompts)} held-out "
        f"prompts, against fp32 pictures of the same seeds.</p>\n"
        f'<div class="verdict{" missed" if missed else ""}">\n{listed(lines)}\n{limit}</div>\n'
        f"{tiles(figures)}"
    )


def _precisions(report: Report) -> str:
    return f"<h2>Precisions</h2>\n{precisions_table(report.verification)}"


def _pictures(report: Report) -> str:
    verification = report.verification
    chosen = shown_prompts(verification)
    values = verification.measured[verification.tested].metrics["psnr"].values
    blocks = []
    for index, place in chosen:
        prompt = verification.prompts[index]
        figures = "".join(
            f'<figure><img src="{uri}" alt="{escape(f"{name}: {prompt}")}">'
            f"<figcaption>{escape(name)}</figcaption></figure>"
            for name, uri in picture_row(report.pictures, verification, index).items()
        )
        blocks.append(
            f'<section class="prompt">\n<h3>{escape(prompt)}</h3>\n'
            f'<p class="soft">{place} by PSNR, {values[index]:.1f} dB; seed {verification.seed + index}</p>\n'
            f'<div class="row">{figures}</div>\n</section>'
        )
    note = (
        f"Chosen by the PSNR of their {escape(verification.tested)} pictures, from the worst to the best. Differences "
        "from fp32 are absolute, by channel, and multiplied as each row says; black is equal."
    )
    return f"<h2>Pictures</h2>\n<p>{note}</p>\n" + "\n".join(blocks)


def _steps(report: Report) -> str:
    verification = report.verification
    noise = verification.measured[verification.tested].noise
    if noise is None:
        return "<h2>Predictions over the timesteps</h2>\n<p>Not measured: no calls were captured.</p>"
    bound = next((budget.bound for budget in verification.budgets if budget.metric == "sqnr"), None)
    lowest = min(noise.guided, key=lambda step: step.sqnr_db)
    words = (
        f"The guided prediction is worst at timestep {lowest.timestep:g}, with {lowest.sqnr_db:.1f} dB. The mean over "
        f"the timesteps is {mean_db(noise.guided):.1f} dB, their mean noise that of {share_db(noise.guided):.1f} dB."
    )
    return f"<h2>Predictions over the timesteps</h2>\n{plot(noise_plot(verification, bound=bound), words)}"


def _sensitivity(report: Report) -> str:
    plan = report.plan
    noisy = noisiest(plan)
    if not noisy:
        return "<h2>Sensitivity</h2>\n<p>Not measured.</p>"
    total = sum(layer.noise or 0.0 for layer in noisy)
    kind, noise, macs = kind_shares(plan)[0]
    first = noisy[0]
    layers = (
        f"The noisiest layer is {short_name(first.name)}, with {(first.noise or 0.0) / total:.1%} of the noise that "
        f"all {len(noisy)} measured layers would add."
    )
    kinds = f"The noisiest kind is {kind}, with {noise:.1%} of the noise and {macs:.1%} of the multiplications."
    return f"<h2>Sensitivity</h2>\n{plot(layers_plot(plan), layers)}\n{plot(kinds_plot(plan), kinds)}"


def _frontier(report: Report) -> str:
    if not report.frontier:
        return "<h2>Share against quality</h2>\n<p>Not measured: the plan was not chosen by a solver.</p>"
    share, predicted, measured = chosen = chosen_mix(report)
    words = f"The chosen plan has {share:.1%} of the multiplications in {report.plan.precision}"
    words += f"; predicted {predicted:.1f} dB"
    words += "." if measured is None else f", measured {measured:.1f} dB."
    return (
        f"<h2>Share against quality</h2>\n{plot(frontier_plot(report.frontier, chosen, report.plan.precision), words)}"
    )


def _layers(report: Report) -> str:
    layers = layers_table(report.plan)
    return f"<h2>Layers</h2>\n<details><summary>All {len(report.plan.layers)} layers</summary>\n{layers}\n</details>"


def _making(report: Report) -> str:
    verification = report.verification
    made = {
        "prompts": f"{len(verification.prompts)} held out, seeds {verification.seed} to "
        f"{verification.seed + len(verification.prompts) - 1}",
        "settings": plain(verification.settings),
        "LoRAs": plain(verification.loras) if verification.loras else "none",
        "judge": verification.judge or "none",
        "networks": "; ".join(
            f"{name} on {each.backend}: {plain(each.precisions)}" for name, each in verification.measured.items()
        ),
        "graph": plain(report.plan.graph),
        "plan": verification.plan,
        **{str(name): plain(value) for name, value in report.plan.made.items()},
        **{str(name): plain(value) for name, value in verification.machine.items()},
    }
    return f"<h2>How it was made</h2>\n<pre>{escape(report.command)}</pre>\n{facts(made)}"
