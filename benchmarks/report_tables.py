"""All tables of a report, in their order."""

from __future__ import annotations

from .cost_tables import disk_table, memory_table, missing_table, roofline_table
from .quality_tables import pareto_table, quality_table
from .report_cells import Table
from .results_file import Results
from .speed_tables import cold_table, latency_table, ratios_table, stages_table


def all_tables(results: Results) -> tuple[Table, ...]:
    """The tables that have rows."""
    tables = (
        latency_table(results),
        ratios_table(results),
        stages_table(results),
        cold_table(results),
        memory_table(results),
        disk_table(results),
        roofline_table(results),
        quality_table(results),
        pareto_table(results),
        missing_table(results),
    )
    return tuple(table for table in tables if table.rows)
