"""The report of a study: tables and figures as files, and one HTML page that needs no other file and no network."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from ttt_lib.evaluation.paired import paired_gains, summarise
from ttt_lib.evaluation.scores import TABLE1_COLUMNS
from ttt_lib.evaluation.selection import GROUPS
from ttt_lib.report import study_figures, tables
from ttt_lib.report.figures import encoded, picture
from ttt_lib.runs.results import Runs

FIGURES = ("chosen_samples", "loss_curves", "figure4", "pareto", "gallery")
PAGE = Environment(autoescape=True).from_string("""<!doctype html><meta charset="utf-8"><title>Ablation</title>
<style>
body{font-family:sans-serif;margin:2em} table{border-collapse:collapse;font-size:12px}
td,th{padding:2px 6px;border:1px solid #ccc} img{max-width:100%} div{margin:1em 0} li{font-size:13px}
</style>
<h1>Ablation</h1>
{% if notes %}<h2>Missing</h2><ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
{% for heading, content in sections.items() %}<h2>{{ heading }}</h2>{% for part in content %}<div>{{ part }}</div>{% endfor %}
{% endfor %}""")
VERDICTS = {
    True: "equals `original` to the last bit",
    False: "DIFFERS from `original`: the rows were not evaluated alike",
    None: "was not run on any sample of `original`",
}


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
        The files by name. Where samples were chosen by a score (`runs.selection`), `beyond_selection` says what is left of the
        gains, `table1_GROUP` are the groups' tables, and everything else is of the random samples. What the runs do not
        allow (no `original`, no truth, no history) is left out, and the page says so.

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
    shown, title = runs.group("random"), f"{metric} {score}"  # no score chose these
    gains = paired_gains(shown.metrics, metric, score)
    frames, selected = _frames(runs, gains, tolerance, bootstrap_samples), None
    if runs.selection is not None:
        selected, beyond = _selection(runs, bootstrap_samples)
        frames |= {"beyond_selection": beyond}
        frames |= {f"table1_{name}": tables.table1(runs.group(name)).reset_index() for name in GROUPS}
    figures, clouds = _figures(shown, gains, tolerance, title)
    if selected is not None:
        figures["chosen_samples"] = study_figures.selection_figure(selected)
    files = {}
    for name, frame in frames.items():
        files[name] = output / f"{name}.csv"
        frame.to_csv(files[name], index=False)
    for name in FIGURES:
        path = output / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier report, which may have had more to show
        if name in figures:
            figures[name].savefig(path, dpi=110, bbox_inches="tight")
            files[name] = path
    table = tables.table1(shown)
    page = _page(runs, table, frames, selected, title, figures, clouds)
    texts = {"markdown": tables.to_markdown(table), "latex": tables.to_latex(table), "html": page}
    for name, place in (("markdown", "table1.md"), ("latex", "table1.tex"), ("html", "report.html")):
        files[name] = output / place
        files[name].write_text(texts[name], encoding="utf-8")
    return files


def _frames(runs: Runs, gains: pd.DataFrame, tolerance: float, bootstrap_samples: int) -> dict[str, pd.DataFrame]:
    """Every CSV of the report by its name, but for those about chosen samples."""
    shown = runs.group("random")
    paired = [
        summarise(paired_gains(shown.metrics, m, s), tolerance, bootstrap_samples).assign(metric=m, score=s)
        for m, s in TABLE1_COLUMNS
    ]
    return {
        "table1": tables.table1(shown).reset_index(),
        "paired": pd.concat([frame for frame in paired if len(frame)] or paired[:1]),
        "paired_by_dataset": summarise(gains, tolerance, bootstrap_samples, ("experiment", "dataset")),
        "gains": gains, "metrics": runs.metrics, "samples": runs.samples, "left_out": runs.left_out,
    }  # fmt: skip


def _selection(runs: Runs, bootstrap_samples: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`selection_table` in the score that chose the samples, and in those of Table 1; their losses are looked for once."""
    by = tables.chosen_by(runs)
    table = tables.selection_table(runs, bootstrap_samples, list(dict.fromkeys([*TABLE1_COLUMNS, by])))
    scores = list(zip(table["metric"], table["score"]))
    return table[[each == by for each in scores]], table[[each in TABLE1_COLUMNS for each in scores]]


def _figures(
    runs: Runs, gains: pd.DataFrame, tolerance: float, title: str
) -> tuple[dict[str, Figure], list[tuple[str, go.Figure]]]:
    """The figures that these runs allow, and (title, point cloud) of the gallery's samples."""
    figures, clouds = {}, []
    if len(runs.history):
        figures["loss_curves"] = study_figures.loss_curves(runs.history)
    if (gains["experiment"] != "original").any():
        figures["figure4"] = study_figures.figure4(gains, tolerance, title)
        figures["pareto"], front = study_figures.pareto(gains, runs.samples)
        best = study_figures.best_row(front)
        if best is not None:
            chosen = study_figures.gallery_samples(gains, best)
            figures["gallery"] = study_figures.gallery(runs, chosen)
            for row in chosen.itertuples():
                if (cloud := study_figures.gallery_cloud(runs, row)) is not None:
                    clouds.append((f"{row.experiment}, {row.sample}", cloud))
    return figures, clouds


def _page(
    runs: Runs, table: pd.DataFrame, frames: dict[str, pd.DataFrame], selected: pd.DataFrame | None, title: str,
    figures: dict[str, Figure], clouds: list[tuple[str, go.Figure]],
) -> str:  # fmt: skip
    published, sections = tables.published_table(), {}
    if selected is not None:
        sections["Chosen samples: what is left beyond selection"] = [
            tables.SELECTION_LEGEND, _html(tables.selection_cells(selected)),
            "All below is of the random samples, which no score chose.",
        ]  # fmt: skip
    sections |= {
        "Table 1": [_table1(table)],
        "Published Table 1": [tables.PUBLISHED_SOURCE, _table1(published)],
        "Paired differences to original (positive is better)": [_html(frames["paired"].round(4))],
        f"By data set: {title}": [_html(frames["paired_by_dataset"].round(4))],
        "Evaluation, not training": [
            f"control_lr0 {VERDICTS[tables.control_is_exact(runs)]}.", _html(tables.confound(published).round(3))
        ],
    }  # fmt: skip
    sections |= {name: [_image(figure)] for name, figure in figures.items()}
    for i, (heading, cloud) in enumerate(clouds):
        sections[heading] = [Markup(cloud.to_html(include_plotlyjs=i == 0, full_html=False))]
    sections["Left out"] = [_html(runs.left_out)]
    return PAGE.render(notes=runs.notes, sections=sections)


def _image(figure: Figure) -> Markup:
    """A figure that needs no other file."""
    content = encoded(picture(figure, "png", dpi=90, bbox_inches="tight"))
    return Markup('<img src="data:image/png;base64,{}">').format(content)


def _table1(table: pd.DataFrame) -> Markup:
    return Markup(tables.styled(table, "font-weight: bold", "html").to_html()) if len(table) else Markup("nothing")


def _html(frame: pd.DataFrame) -> Markup:
    return Markup(frame.to_html(na_rep="")) if len(frame) else Markup("nothing")
