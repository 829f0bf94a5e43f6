"""The tables of a report that hold what speed costs: the pictures' distances, and which rows no other beats in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from .pareto import PRICES, ParetoPoint, ParetoTable, Price, pareto
from .report_cells import EMPTY, Cell, Table, Unit, digits, framed, interval, time_unit
from .results_file import Quality, Results

_HEADS: Mapping[Price, str] = {"psnr": "PSNR, dB", "finest_psnr": "PSNR of\nsettings, dB", "accuracy": "accuracy"}


def quality_table(results: Results) -> Table:
    """What the pictures of each row cost against the reference."""
    found = [(row, row.quality) for row in results.rows if row.quality is not None]
    prompts = sorted({quality.prompts for _, quality in found})
    words = (
        f"{' or '.join(map(str, prompts))} prompts, against {results.reference}. Means over the pictures, under them "
        "the worst; latents by their relative L2 distance after the last step."
    )
    if any(quality.finest_psnr for _, quality in found):
        words += " PSNR of settings is against fp32 pictures of many steps: it counts what few steps cost too."
    head = (_HEADS["psnr"], "SSIM", "LPIPS", "latents", _HEADS["finest_psnr"], _HEADS["accuracy"])
    return framed(results, "Quality", words, head, [(row, _quality_cells(quality)) for row, quality in found])


def pareto_table(results: Results) -> Table:
    """Speed against every price that was measured, and which rows no other beats in both."""
    prices = measured_prices(results)
    points = [{point.row: point for group in table.groups for point in group.points} for table in prices]
    times = {place: point for found in points for place, point in found.items()}
    unit = time_unit(point.seconds for point in times.values())
    words = (
        "Rows of one size and batch are held against each other where they draw the same, with 95 % intervals. A row "
        "is on the front unless another is at least as good in both and better in one beyond the intervals."
    )
    return framed(
        results,
        "Speed against its price",
        words,
        (f"a picture, {unit.name}", *(_HEADS[table.price] for table in prices)),
        [
            (
                results.rows[place],
                (
                    _seconds_cell(times[place], unit),
                    *(_price_cell(table.price, found.get(place)) for table, found in zip(prices, points, strict=True)),
                ),
            )
            for place in sorted(times)
        ],
    )


def measured_prices(results: Results) -> list[ParetoTable]:
    """The prices in which there are rows to compare."""
    tables = [pareto(results.rows, price=price) for price in PRICES]
    return [table for table in tables if table.groups]


def _quality_cells(quality: Quality) -> Sequence[Cell]:
    return (
        _over_pictures(quality.psnr, min, "{:.1f}"),
        _over_pictures(quality.ssim, min, "{:.4f}"),
        _over_pictures(quality.lpips, max, "{:.4f}"),
        Cell(digits(quality.latent_l2[-1])) if quality.latent_l2 else EMPTY,
        _over_pictures(quality.finest_psnr, min, "{:.1f}"),
        EMPTY if quality.accuracy is None else Cell(_percent(quality.accuracy)),
    )


def _over_pictures(values: Sequence[float], worst: Callable[[Sequence[float]], float], form: str) -> Cell:
    return Cell(form.format(fmean(values)), (f"worst {form.format(worst(values))}",)) if values else EMPTY


def _seconds_cell(point: ParetoPoint, unit: Unit) -> Cell:
    return Cell(unit.text(point.seconds), interval(point.seconds_interval, unit.text))


def _price_cell(price: Price, point: ParetoPoint | None) -> Cell:
    if point is None:
        return EMPTY
    text = _percent if price == "accuracy" else digits
    place = "on the front" if point.beaten_by is None else f"beaten by {point.beaten_by + 1}"
    return Cell(text(point.quality), (*interval(point.quality_interval, text), place))


def _percent(share: float) -> str:
    return f"{share:.1%}"
