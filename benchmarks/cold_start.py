"""How long a fresh process takes to its first picture.

Each subject is started several times, the subjects taking turns there and back. One start of each comes before them and
is dropped: what ran before decides how much of the files that one finds in the system's cache, and emptying that takes
an administrator. So these are starts of programs that the machine has run not long ago.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from latentrt.runtime.errors import LatentrtError

from .bench_plan import OpenWorker, Plan, Progress, SettingsOf, by_subject, own_settings, quiet
from .results_file import ColdStart, Row


def with_cold_starts(
    rows: Sequence[Row],
    open_worker: OpenWorker,
    plan: Plan,
    count: int,
    *,
    settings_of: SettingsOf = own_settings,
    on_progress: Progress = quiet,
) -> tuple[Row, ...]:
    """Start each subject anew and draw once, with the settings of the first of its rows; that row gets the times.

    Args:
        rows: those that are skipped stay as they are.
        open_worker: starts a process, and opens a subject in it.
        plan: prompts and seed.
        count: starts of each subject; 0 for none.
        settings_of: a case's settings as its system takes them.
        on_progress: is told the row, the starts that are done, and how many there will be.

    Returns:
        The rows. One that fails has what went wrong as a note, and no times: what it was measured for stands.
    """
    filled = list(rows)
    going = [part[0] for part in by_subject(rows, [i for i, row in enumerate(rows) if row.skipped is None]).values()]
    total, done = len(going) * (count + 1), 0
    for lap in range(count + 1 if count else 0):
        for index in going[:: (-1) ** lap]:
            row = filled[index]
            on_progress(f"cold start of {row.case.subject.label}", done, total)
            done += 1
            try:
                start = _start(row, open_worker, plan, settings_of)
            except LatentrtError as err:
                filled[index] = replace(row, cold=(), notes=(*row.notes, f"cold start failed: {err}"))
                going.remove(index)
            else:
                filled[index] = replace(row, cold=(*row.cold, start) if lap else ())
    return tuple(filled)


def _start(row: Row, open_worker: OpenWorker, plan: Plan, settings_of: SettingsOf) -> ColdStart:
    subject = row.case.subject
    with open_worker(subject) as worker:
        first = worker.run(settings_of(row.case), plan.prompts_of(subject), plan.seed, timed=False)
        return ColdStart(
            process=worker.seconds_since_start,
            imports=worker.opened.imports,
            load=worker.opened.load,
            first=first.seconds,
            peak_rss=first.peak_rss,
        )
