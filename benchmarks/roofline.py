"""The work of a row against what its device could do: the roofline of Williams, Waterman and Patterson (2009).

`achieved_flops`, `share_of_peak`, `intensity` and `bound` speak of a stage of a run; times are medians over the runs,
by CUDA events where there are some. They give None where the figures are not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.errors import LatentrtError

from .dry_run import work_counter
from .results_file import Peak, Roofline, Row, Run, Work

# Components by the stage of a run in which they are called.
_STAGES = {
    "text_encoder": ("text_encoder",),
    "unet": ("unet", "controlnet"),
    "vae_decoder": ("vae_decoder",),
}


def with_roofline(
    rows: Sequence[Row],
    bundle_path: Path,
    peaks: Callable[[Row], Peak],
    on_progress: Callable[[str, int, int], None],
    *,
    prompts: Sequence[str],
) -> tuple[Row, ...]:
    """Rows with the work of their runs, and the peak it is held against.

    Peers are told the same work as latentrt: it is what has to be computed for the picture. The calls of the U-Net
    are those that were measured. A row whose work cannot be counted gets a note.

    Args:
        peaks: of the device that a row ran on, in the row's precision.
        on_progress: told of each row: what, how many are done, of how many.
        prompts: of the timed runs.

    Raises:
        ArtifactError: the folder is no bundle.
    """
    count = work_counter(open_bundle(bundle_path), prompts)
    done = []
    for index, row in enumerate(rows):
        on_progress("roofline", index, len(rows))
        if row.skipped is None and row.runs:
            try:
                work = dict(count(row.case))
            except LatentrtError as err:
                row = dataclasses.replace(row, notes=(*row.notes, f"work not counted: {err}"))
            else:
                if calls := len(row.runs[0].calls):
                    work["unet"] = dataclasses.replace(work["unet"], calls=calls)
                row = dataclasses.replace(row, roofline=Roofline(work=work, peak=peaks(row)))
        done.append(row)
    on_progress("roofline", len(rows), len(rows))
    return tuple(done)


def achieved_flops(row: Row, stage: str = "unet") -> float | None:
    """Operations a second that a stage reached.

    Args:
        stage: text_encoder, unet or vae_decoder.
    """
    work, seconds = _work(row, stage), stage_seconds(row, stage)
    if not work or not seconds:
        return None
    return sum(each.flops * each.calls for each in work) / seconds


def share_of_peak(row: Row, stage: str = "unet") -> float | None:
    """The part of the device's peak that a stage reached, from 0 to 1; None too for a stage in another precision."""
    achieved, peak = achieved_flops(row, stage), _peak_of(row, stage)
    if achieved is None or peak is None or not peak.flops:
        return None
    return achieved / peak.flops


def intensity(row: Row, stage: str = "unet") -> float | None:
    """Operations for each byte that a stage has to move at least."""
    work = _work(row, stage)
    moved = sum((each.weight_bytes + each.activation_bytes) * each.calls for each in work)
    return sum(each.flops * each.calls for each in work) / moved if moved else None


def bound(row: Row, stage: str = "unet") -> str | None:
    """What limits a stage at best on the row's device: `compute` or `memory`."""
    found, peak = intensity(row, stage), _peak_of(row, stage)
    if found is None or peak is None or not peak.flops or not peak.bandwidth:
        return None
    return "compute" if found >= peak.flops / peak.bandwidth else "memory"


def host_gap(row: Row) -> float | None:
    """Seconds a step in which the U-Net does not compute, between its first call and the end of the last step.

    On a GPU with events that includes what a call spends before and after its kernels: it is time in which the GPU
    waits for the host.
    """
    gaps = [
        run.stages["unet"] + run.stages["sampler"] - _unet_seconds(run)
        for run in row.runs
        if "unet" in run.stages and "sampler" in run.stages
    ]
    return median(gaps) / row.case.settings.steps if gaps else None


def stage_seconds(row: Row, stage: str) -> float | None:
    """Seconds of a run that a stage takes, the median over the runs."""
    if stage == "unet":
        found = [_unet_seconds(run) for run in row.runs if run.calls]
    else:
        found = [run.stages[stage] for run in row.runs if stage in run.stages]
    return median(found) if found else None


def _peak_of(row: Row, stage: str) -> Peak | None:
    """The row's peak, which is for the U-Net's precision; None for a stage whose network is in another."""
    own = {precision for name, precision in row.precisions.items() if name.startswith(_STAGES[stage])}
    unet = row.precisions.get("unet")
    other = unet is not None and any(precision != unet for precision in own)
    return None if row.roofline is None or other else row.roofline.peak


def _unet_seconds(run: Run) -> float:
    return sum(run.calls if run.gpu_calls is None else run.gpu_calls)


def _work(row: Row, stage: str) -> list[Work]:
    if row.roofline is None:
        return []
    return [work for name, work in row.roofline.work.items() if name.startswith(_STAGES[stage])]
