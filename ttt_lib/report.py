"""The study from a folder of runs, under one name for notebooks: reading, tables, figures, and the report."""

from __future__ import annotations

from ttt_lib.html_report import image_tag, write_report
from ttt_lib.metrics import TABLE1_COLUMNS
from ttt_lib.results import Runs, read_runs
from ttt_lib.study_figures import (
    best_row,
    figure4,
    gallery,
    gallery_cloud,
    gallery_samples,
    loss_curves,
    pareto,
    prediction_file,
)
from ttt_lib.tables import (
    COLUMN_NAMES,
    ORDER,
    PUBLISHED,
    PUBLISHED_SOURCE,
    best_cells,
    confound,
    control_is_exact,
    published_table,
    table1,
    to_latex,
    to_markdown,
    to_text,
)

__all__ = [
    "COLUMN_NAMES",
    "ORDER",
    "PUBLISHED",
    "PUBLISHED_SOURCE",
    "TABLE1_COLUMNS",
    "Runs",
    "best_cells",
    "best_row",
    "confound",
    "control_is_exact",
    "figure4",
    "gallery",
    "gallery_cloud",
    "gallery_samples",
    "image_tag",
    "loss_curves",
    "pareto",
    "prediction_file",
    "published_table",
    "read_runs",
    "table1",
    "to_latex",
    "to_markdown",
    "to_text",
    "write_report",
]
