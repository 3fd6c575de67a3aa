"""The report of a study: tables and figures as files, and one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import plotly.io
from matplotlib.figure import Figure

from ttt_lib.evaluation.paired import paired_gains, summarise
from ttt_lib.evaluation.scores import TABLE1_COLUMNS
from ttt_lib.report.study_figures import best_row, figure4, gallery, gallery_cloud, gallery_samples, loss_curves, pareto
from ttt_lib.report.tables import (
    PUBLISHED_SOURCE,
    cells,
    confound,
    control_is_exact,
    published_table,
    table1,
    to_latex,
    to_markdown,
)
from ttt_lib.runs.results import Runs

if TYPE_CHECKING:
    import plotly.graph_objects as go

FIGURES = ("loss_curves", "figure4", "pareto", "gallery")
STYLE = (
    "body{font-family:sans-serif;margin:2em} table{border-collapse:collapse;font-size:12px} "
    "td,th{padding:2px 6px;border:1px solid #ccc} img{max-width:100%} li{font-size:13px}"
)
VERDICTS = {
    True: "equals `original` to the last bit",
    False: "DIFFERS from `original`: the rows were not evaluated alike",
    None: "was not run on any sample of `original`",
}


def image_tag(figure: Figure) -> str:
    """A figure as an HTML image that needs no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def write_report(
    runs: Runs, output: str | Path, metric: str = "points_affine_invariant", score: str = "delta1",
    tolerance: float = 1e-3, bootstrap_samples: int = 2000,
) -> dict[str, Path]:  # fmt: skip
    """Write Table 1 (CSV, LaTeX, Markdown), statistics (CSV), Figure 4 and others (PNG), and `report.html`.

    Args:
        runs: of `read_runs`.
        output: the folder for the files.
        metric, score: what Figure 4, the front and the gallery are about.
        tolerance: a smaller difference counts as none.
        bootstrap_samples: of each interval.

    Returns:
        The files by name. What the runs do not allow (no `original`, no truth, no history) is left out, and the page
        says so.

    Raises:
        OSError: the folder cannot be written.

    Example:
        >>> from ttt_lib import read_runs, write_report
        >>> files = write_report(read_runs("runs"), "report", bootstrap_samples=20)
        >>> files["html"].name, files["table1"].name
        ('report.html', 'table1.csv')
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    gains = paired_gains(runs.metrics, metric, score)
    tables = _tables(runs, gains, tolerance, bootstrap_samples)
    files = {}
    for name, frame in tables.items():
        files[name] = output / f"{name}.csv"
        frame.to_csv(files[name], index=False)
    files["markdown"], files["latex"] = output / "table1.md", output / "table1.tex"
    table = table1(runs)
    files["markdown"].write_text(to_markdown(table), encoding="utf-8")
    files["latex"].write_text(to_latex(table), encoding="utf-8")
    figures, clouds = _figures(runs, gains, tolerance, f"{metric} {score}")
    for name in FIGURES:
        path = output / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier report, which may have had more to show
        if name in figures:
            figures[name].savefig(path, dpi=110, bbox_inches="tight")
            files[name] = path
    files["html"] = output / "report.html"
    files["html"].write_text(_page(runs, table, tables, f"{metric} {score}", figures, clouds), encoding="utf-8")
    return files


def _tables(runs: Runs, gains: pd.DataFrame, tolerance: float, bootstrap_samples: int) -> dict[str, pd.DataFrame]:
    """Every CSV of the report by its name."""
    paired = [
        summarise(paired_gains(runs.metrics, m, s), tolerance, bootstrap_samples).assign(metric=m, score=s)
        for m, s in TABLE1_COLUMNS
    ]
    filled = [frame for frame in paired if len(frame)]
    return {
        "table1": table1(runs).reset_index(),
        "paired": pd.concat(filled) if filled else paired[0],
        "paired_by_dataset": summarise(gains, tolerance, bootstrap_samples, ("experiment", "dataset")),
        "gains": gains,
        "metrics": runs.metrics,
        "samples": runs.samples,
        "left_out": runs.left_out,
    }


def _figures(
    runs: Runs, gains: pd.DataFrame, tolerance: float, title: str
) -> tuple[dict[str, Figure], list[tuple[str, go.Figure]]]:
    """The figures that these runs allow, and (title, point cloud) of the gallery's samples."""
    figures, clouds = {}, []
    if len(runs.history):
        figures["loss_curves"] = loss_curves(runs.history)
    if (gains["experiment"] != "original").any():
        figures["figure4"] = figure4(gains, tolerance, title)
        figures["pareto"], front = pareto(gains, runs.samples)
        best = best_row(front)
        if best is not None:
            chosen = gallery_samples(gains, best)
            figures["gallery"] = gallery(runs, chosen)
            found = [(f"{row.experiment}, {row.sample}", gallery_cloud(runs, row)) for row in chosen.itertuples()]
            clouds = [(name, cloud) for name, cloud in found if cloud is not None]
    return figures, clouds


def _page(
    runs: Runs, table: pd.DataFrame, tables: dict[str, pd.DataFrame], title: str, figures: dict[str, Figure],
    clouds: list[tuple[str, go.Figure]],
) -> str:  # fmt: skip
    def section(heading: str, *parts: str) -> str:
        return f"<h2>{html.escape(heading)}</h2>" + "".join(parts)

    published = published_table()
    body = [
        section("Missing", _list(runs.notes)) if runs.notes else "",
        section("Table 1", _bold(table)),
        section("Published Table 1", f"<p>{PUBLISHED_SOURCE}</p>", _bold(published)),
        section("Paired differences to original (positive is better)", _html(tables["paired"].round(4))),
        section(f"By data set: {title}", _html(tables["paired_by_dataset"].round(4))),
        section(
            "Evaluation, not training",
            f"<p>control_lr0 {VERDICTS[control_is_exact(runs)]}.</p>",
            _html(confound(published).round(3)),
        ),
        *(section(name, image_tag(figure)) for name, figure in figures.items()),
    ]
    for i, (heading, cloud) in enumerate(clouds):
        body.append(section(heading, plotly.io.to_html(cloud, include_plotlyjs=i == 0, full_html=False)))
    body.append(section("Left out", _html(runs.left_out)))
    head = f"<!doctype html><meta charset='utf-8'><title>Ablation</title><style>{STYLE}</style><h1>Ablation</h1>"
    return head + "".join(body)


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _bold(table: pd.DataFrame) -> str:
    """Table 1 with the best cells in bold; only our own tags are left unescaped."""
    return _html(cells(table, 2, "<b>{}</b>").rename(index=html.escape), escape=False)


def _html(frame: pd.DataFrame, escape: bool = True) -> str:
    return frame.to_html(escape=escape, na_rep="") if len(frame) else "<p>nothing</p>"
