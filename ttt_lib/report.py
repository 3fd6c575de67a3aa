"""The study from a folder of runs: Table 1, paired statistics, figures, and a report that opens offline.

Everything is computed from the CSV files of the runs; nothing is remembered from elsewhere but the published table,
which is marked as such.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ttt_lib.errors import UserError
from ttt_lib.figures import inverse_depth, relative_error
from ttt_lib.metrics import TABLE1_COLUMNS
from ttt_lib.statistics import is_better_high, paired_gains, summarise

PUBLISHED = Path(__file__).parent / "assets" / "published_table1.csv"
PUBLISHED_SOURCE = (
    "Herald of Khmelnytskyi National University, 2025, issue 6 part 2 (MoGe-2 ViT-S, 50 samples, RTX 3080)"
)
COLUMN_NAMES = [f"{metric}_{score}" for metric, score in TABLE1_COLUMNS]
ORDER = (
    "original", "control_lr0", "tta", "freeze_encoder", "unfreeze_encoder", "unfreeze_encoder_normal_loss",
    "unfreeze_encoderSGD", "unfreeze_encoderSGD_lower_lr", "unfreeze_encoderSGD_higher_lr", "unfreeze_encoder_lower_lr",
    "unfreeze_encoder_higher_lr", "unfreeze_encoder_shorter", "unfreeze_encoder_longer", "freeze_encoder_render",
    "unfreeze_encoder_render",
)  # fmt: skip


@dataclass
class Runs:
    """All results of a runs folder: metrics, samples, history, left_out as tables, and the shards' folders."""

    folder: Path
    metrics: pd.DataFrame
    samples: pd.DataFrame
    history: pd.DataFrame
    left_out: pd.DataFrame
    shards: list[Path]


def _order(names: pd.Series | pd.Index) -> list[str]:
    known = {name: i for i, name in enumerate(ORDER)}
    return sorted(set(names), key=lambda name: (known.get(name, len(known)), name))


def read_runs(folder: str | Path) -> Runs:
    """Read every finished shard (those with a manifest), in an order that does not depend on how they were run.

    Raises `UserError` if the folder is missing or holds no finished shard.
    """
    folder = Path(folder)
    found = folder.glob("*/*-of-*/manifest.json")
    shards = sorted(path.parent for path in found if not path.parts[-3].startswith("."))  # .work holds unfinished ones
    if not shards:
        raise UserError(f"{folder}: holds no finished run; run `ttt-depth ablation` first or name another folder.")

    def table(name: str, keys: list[str]) -> pd.DataFrame:
        parts = [pd.read_csv(path) for s in shards if (path := s / f"{name}.csv").exists() and path.stat().st_size > 1]
        parts = [part for part in parts if len(part)]
        if not parts:
            return pd.DataFrame(columns=keys)
        joined = pd.concat(parts, ignore_index=True)
        keys = [key for key in keys if key in joined]
        return joined.sort_values(keys, kind="stable").reset_index(drop=True)

    identity = ["experiment", "dataset", "sample"]
    return Runs(
        folder,
        table("metrics", [*identity, "prediction", "metric", "score"]),
        table("samples", identity),
        table("history", [*identity, "step"]),
        table("left_out", ["dataset", "sample"]).drop_duplicates(),
        shards,
    )


def published_table() -> pd.DataFrame:
    """The published Table 1, one row an experiment; the last column is seconds an image."""
    return pd.read_csv(PUBLISHED, comment="#").set_index("experiment")


def table1(runs: Runs) -> pd.DataFrame:
    """Means over the samples, in the published columns, and seconds an image; NaN where nothing was measured."""
    final = runs.metrics[runs.metrics.prediction == "final"]
    wide = final.assign(column=final.metric + "_" + final.score).pivot_table(
        index="experiment", columns="column", values="value", aggfunc="mean"
    )
    table = wide.reindex(columns=COLUMN_NAMES)
    table["seconds"] = runs.samples.groupby("experiment")["seconds"].mean()
    return table.reindex(_order(table.index))


def best_cells(table: pd.DataFrame, decimals: int = 2) -> pd.DataFrame:
    """Which cells are the best of their column as printed (ties count), seconds excepted: a frame of booleans."""
    best = pd.DataFrame(False, index=table.index, columns=table.columns)
    for column in COLUMN_NAMES:
        values = table[column].round(decimals)
        target = values.max() if is_better_high(column.rsplit("_", 1)[-1]) else values.min()
        best[column] = values == target
    return best


def _cells(table: pd.DataFrame, decimals: int, bold: str) -> pd.DataFrame:
    best = best_cells(table, decimals)
    text = table.copy().astype(object)
    for column in table.columns:
        digits = decimals if column in COLUMN_NAMES else 3
        for row in table.index:
            value = table.loc[row, column]
            shown = "" if pd.isna(value) else f"{value:.{digits}f}"
            text.loc[row, column] = bold.format(shown) if column in best and best.loc[row, column] and shown else shown
    return text


def _headers() -> list[str]:
    short = {"metric": "metric", "scale_invariant": "scale-inv.", "affine_invariant": "affine-inv."}
    names = []
    for metric, score in TABLE1_COLUMNS:
        quantity, alignment = metric.split("_", 1)
        names.append(f"{quantity} {short[alignment]} {'Rel ↓' if score == 'rel' else 'δ1 ↑'}")
    return [*names, "s / image"]


def to_markdown(table: pd.DataFrame, decimals: int = 2) -> str:
    """The table with the best cells in bold."""
    cells = _cells(table, decimals, "**{}**")
    lines = ["| experiment | " + " | ".join(_headers()) + " |", "|---" * (len(cells.columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in zip(cells.index, cells.to_numpy())]
    return "\n".join(lines) + "\n"


def to_latex(table: pd.DataFrame, decimals: int = 2) -> str:
    """A `tabular` with the best cells in bold; needs booktabs."""
    cells = _cells(table, decimals, r"\textbf{{{}}}")
    arrows = {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "δ1": r"$\delta_1$"}
    head = " & ".join(["experiment", *_headers()])
    for symbol, code in arrows.items():
        head = head.replace(symbol, code)
    rows = [" & ".join([name.replace("_", r"\_"), *row]) + r" \\" for name, row in zip(cells.index, cells.to_numpy())]
    columns = "l" + "r" * len(cells.columns)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head + r" \\", r"\midrule", *rows,
                      r"\bottomrule", r"\end{tabular}", ""])  # fmt: skip


def to_text(table: pd.DataFrame, decimals: int = 3) -> str:
    """The table for a terminal: short column names, one row an experiment."""
    short = table.copy()
    alignments = {"metric": "met", "scale_invariant": "sc", "affine_invariant": "aff"}
    short.columns = [
        *(f"{m.split('_', 1)[0][0]}.{alignments[m.split('_', 1)[1]]}.{'rel' if s == 'rel' else 'd1'}" for m, s in TABLE1_COLUMNS),
        "seconds",
    ]  # fmt: skip
    legend = (
        "d: depth, p: points; met: metric, sc: scale-invariant, aff: affine-invariant; rel: lower, d1: higher is better"
    )
    return f"{short.round(decimals).to_string(na_rep='-')}\n({legend})"


def confound(table: pd.DataFrame) -> pd.DataFrame:
    """The part of a gain that is not training, on the published numbers or ours.

    `unfreeze_encoderSGD_lower_lr` hardly changes the model: its metric columns equal `original`'s. Where its aligned
    columns differ from `original`'s all the same, so does the evaluation. Returns original, the near-zero row, their
    difference, and the best row's difference, one row a column.
    """
    rows = [name for name in ("original", "unfreeze_encoderSGD_lower_lr", "control_lr0") if name in table.index]
    view = table.loc[rows, COLUMN_NAMES].T
    for name in rows[1:]:
        view[f"{name} - original"] = view[name] - view["original"]
    if "unfreeze_encoder" in table.index:
        view["unfreeze_encoder - original"] = table.loc["unfreeze_encoder", COLUMN_NAMES] - view["original"]
    return view


def control_is_exact(runs: Runs) -> bool | None:
    """Whether `control_lr0` gives exactly the numbers of `original`; None if one of them was not run."""
    final = runs.metrics[runs.metrics.prediction == "final"]
    keys = ["dataset", "sample", "metric", "score"]
    both = [
        final[final.experiment == name].set_index(keys)["value"].sort_index() for name in ("original", "control_lr0")
    ]
    if not len(both[0]) or not len(both[1]):
        return None
    return both[0].index.equals(both[1].index) and np.array_equal(
        both[0].to_numpy(), both[1].to_numpy(), equal_nan=True
    )


# ----------------------------------------------------------------------------------------------------- figures


def figure4(gains: pd.DataFrame, tolerance: float = 1e-3, title: str = "") -> Figure:
    """Per-sample before and after of every experiment, and how many improved and got worse."""
    experiments = [name for name in _order(gains["experiment"]) if name != "original"]
    columns = min(5, max(len(experiments), 1))
    rows = -(-len(experiments) // columns)
    figure = plt.figure(figsize=(2.4 * columns, 2.4 * rows + 3))
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1] * rows + [1.2], hspace=0.6, wspace=0.35)
    for i, name in enumerate(experiments):
        axis = figure.add_subplot(grid[i // columns, i % columns])
        group = gains[gains.experiment == name]
        axis.scatter(group["before"], group["after"], s=8, c=np.where(group["gain"] >= 0, "tab:green", "tab:red"))
        low, high = (f(group[["before", "after"]].to_numpy().ravel()) for f in (np.min, np.max))
        axis.plot([low, high], [low, high], "k--", linewidth=0.6)
        axis.set_title(name.replace("unfreeze_encoder", "unfreeze"), fontsize=7)
        axis.tick_params(labelsize=6)
    axis = figure.add_subplot(grid[rows, :])
    table = summarise(gains[gains.experiment != "original"], tolerance, samples=2).set_index("experiment")
    table = table.reindex(experiments)
    axis.bar(range(len(table)), table["improved"], color="tab:green", label="improved")
    axis.bar(range(len(table)), -table["worse"], color="tab:red", label="worse")
    axis.axhline(0, color="k", linewidth=0.6)
    axis.set_xticks(range(len(table)), table.index, rotation=40, ha="right", fontsize=7)
    axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    plt.close(figure)
    return figure


def loss_curves(history: pd.DataFrame) -> Figure:
    """Mean loss over the samples, by optimizer step, relative to the first step."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for name in _order(history["experiment"]) if len(history) else []:
        rows = history[history.experiment == name]
        first = rows[rows.step == 1].set_index(["dataset", "sample"])["loss"].rename("first")
        relative = rows.join(first, on=["dataset", "sample"])
        curve = (relative["loss"] / relative["first"]).groupby(relative["passes"]).mean()
        axis.plot(curve.index, curve.to_numpy(), marker=".", label=name)
    axis.set(xlabel="passes", ylabel="loss / loss of the first step")
    axis.legend(fontsize=6, ncol=2)
    figure.tight_layout()
    plt.close(figure)
    return figure


def pareto(gains: pd.DataFrame, samples: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Mean gain against seconds an image, and the table with those that nothing beats in both (`front`)."""
    table = pd.DataFrame({
        "gain": gains.groupby("experiment")["gain"].mean(),
        "seconds": samples.groupby("experiment")["seconds"].mean(),
    }).dropna()  # fmt: skip
    table["front"] = [
        not ((table.gain >= row.gain) & (table.seconds <= row.seconds) & ((table.gain > row.gain) | (table.seconds < row.seconds))).any()
        for row in table.itertuples()
    ]  # fmt: skip
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.scatter(table.seconds, table.gain, c=np.where(table.front, "tab:orange", "tab:gray"))
    front = table[table.front].sort_values("seconds")
    axis.plot(front.seconds, front.gain, "tab:orange", linewidth=1)
    for row in table.itertuples():
        axis.annotate(row.Index, (row.seconds, row.gain), fontsize=6)
    axis.set(xscale="log", xlabel="seconds an image", ylabel="mean gain")
    axis.axhline(0, color="k", linewidth=0.5)
    figure.tight_layout()
    plt.close(figure)
    return figure, table


def gallery_samples(gains: pd.DataFrame, experiment: str, count: int = 2) -> pd.DataFrame:
    """The best and the worst samples of an experiment, `count` each, best first."""
    rows = gains[gains.experiment == experiment].sort_values("gain", ascending=False)
    return pd.concat([rows.head(count), rows.tail(count)]).drop_duplicates(["dataset", "sample"])


def prediction_file(runs: Runs, experiment: str, dataset: str, sample: str) -> Path | None:
    """Where the small copies of a sample's prediction lie."""
    name = f"{dataset}__{sample}".replace("/", "_") + ".npz"
    return next(
        (p for s in runs.shards if s.parent.name == experiment and (p := s / "predictions" / name).exists()), None
    )


def gallery(runs: Runs, chosen: pd.DataFrame) -> Figure:
    """Image, both depths and both error maps of each chosen row (experiment, dataset, sample, gain)."""
    titles = ("image", "before", "after", "error before", "error after")
    figure, axes = plt.subplots(max(len(chosen), 1), 5, figsize=(12, 2.1 * max(len(chosen), 1)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, row in zip(axes, chosen.itertuples()):
        path = prediction_file(runs, row.experiment, row.dataset, row.sample)
        if path is None:
            continue
        data = {
            key: value.astype(np.float32) if value.dtype == np.float16 else value
            for key, value in np.load(path).items()
        }
        pictures = [data["image"], inverse_depth(data["depth_original"]), inverse_depth(data["depth_final"])]
        if "depth_truth" in data:
            pictures += [relative_error(data[key], data["depth_truth"]) for key in ("depth_original", "depth_final")]
        for i, (axis, picture) in enumerate(zip(line, pictures)):
            axis.imshow(picture, **({} if i == 0 else {"cmap": "magma"} if i < 3 else {"vmin": 0, "vmax": 0.5}))
            axis.set_title(titles[i] if i else f"{row.sample}: {row.gain:+.3f}", fontsize=8)
    figure.tight_layout()
    plt.close(figure)
    return figure


def gallery_cloud(runs: Runs, row, which: str = "final"):
    """Plotly point cloud of a gallery row; which: `original`, `final` or `truth`."""
    import torch

    from ttt_lib.figures import point_cloud
    from ttt_lib.geometry import unproject

    path = prediction_file(runs, row.experiment, row.dataset, row.sample)
    if path is None:
        return None
    data = np.load(path)
    depth = torch.from_numpy(data[f"depth_{which}"].astype(np.float32))
    points = unproject(depth, torch.from_numpy(data["intrinsics"]).float())
    return point_cloud(torch.from_numpy(data["image"]).permute(2, 0, 1).float() / 255, points)


# ------------------------------------------------------------------------------------------------------- report


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

    metric and score: what Figure 4, the front and the gallery are about. Returns the files by name.
    """
    import plotly.io

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    table, gains = table1(runs), paired_gains(runs.metrics, metric, score)
    summary = pd.concat(
        [
            summarise(paired_gains(runs.metrics, m, s), tolerance, bootstrap_samples).assign(metric=m, score=s)
            for m, s in TABLE1_COLUMNS
            if len(paired_gains(runs.metrics, m, s))
        ]
        or [pd.DataFrame()]
    )
    by_dataset = (
        summarise(gains, tolerance, bootstrap_samples, ("experiment", "dataset")) if len(gains) else pd.DataFrame()
    )
    tables = {
        "table1": table.reset_index(), "paired": summary, "paired_by_dataset": by_dataset, "gains": gains,
        "metrics": runs.metrics, "samples": runs.samples, "left_out": runs.left_out,
    }  # fmt: skip
    files = {}
    for name, frame in tables.items():
        files[name] = output / f"{name}.csv"
        frame.to_csv(files[name], index=False)
    files["markdown"], files["latex"] = output / "table1.md", output / "table1.tex"
    files["markdown"].write_text(to_markdown(table), encoding="utf-8")
    files["latex"].write_text(to_latex(table), encoding="utf-8")
    figures = {"loss_curves": loss_curves(runs.history)}
    clouds = []
    if len(gains) and (gains.experiment != "original").any():
        figures["figure4"] = figure4(gains, tolerance, f"{metric} {score}")
        figures["pareto"], front = pareto(gains, runs.samples)
        best = front.drop(index=["original", "control_lr0"], errors="ignore")["gain"].idxmax()
        chosen = gallery_samples(gains, best)
        figures["gallery"] = gallery(runs, chosen)
        for row in chosen.itertuples():
            if (cloud := gallery_cloud(runs, row)) is not None:
                clouds.append((f"{row.experiment}, {row.sample}", cloud))
    for name, figure in figures.items():
        files[name] = output / f"{name}.png"
        figure.savefig(files[name], dpi=110, bbox_inches="tight")

    def section(title: str, *parts: str) -> str:
        return f"<h2>{html.escape(title)}</h2>" + "".join(parts)

    exact = control_is_exact(runs)
    verdict = {True: "equals `original` to the last bit", False: "DIFFERS from `original`", None: "was not run"}[exact]
    published = published_table()
    body = [
        section("Table 1", _html(_cells(table, 2, "<b>{}</b>"), escape=False)),
        section(
            "Published Table 1", f"<p>{PUBLISHED_SOURCE}</p>", _html(_cells(published, 2, "<b>{}</b>"), escape=False)
        ),
        section("Paired differences to original (positive is better)", _html(summary.round(4))),
        section(f"By data set: {metric} {score}", _html(by_dataset.round(4))),
        section("Evaluation, not training", f"<p>control_lr0 {verdict}.</p>", _html(confound(published).round(3))),
        *(section(name, image_tag(figure)) for name, figure in figures.items()),
    ]
    for i, (title, cloud) in enumerate(clouds):
        body.append(section(title, plotly.io.to_html(cloud, include_plotlyjs=i == 0, full_html=False)))
    body.append(section("Left out", _html(runs.left_out)))
    style = (
        "body{font-family:sans-serif;margin:2em} table{border-collapse:collapse;font-size:12px} "
        "td,th{padding:2px 6px;border:1px solid #ccc} img{max-width:100%}"
    )
    files["html"] = output / "report.html"
    files["html"].write_text(
        f"<!doctype html><meta charset='utf-8'><title>Ablation</title><style>{style}</style><h1>Ablation</h1>"
        + "".join(body),
        encoding="utf-8",
    )
    return files


def _html(frame: pd.DataFrame, escape: bool = True) -> str:
    return frame.to_html(escape=escape, na_rep="") if len(frame) else "<p>nothing</p>"
