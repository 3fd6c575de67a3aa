"""The command `ttt-depth`. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ttt_lib.errors import UserError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.splitlines()[0]
)
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# Modules that decide no number: a change in them does not make finished runs old.
SHOWING = (
    "batch", "benchmark", "calibration", "cli", "cluster", "figures", "kernel", "photos", "progress",
    "provenance", "reliability_figures", "report", "results", "statistics", "study_figures", "tables", "view_figures",
    "widgets", "zeroshot",
)  # fmt: skip
BUILT_IN = ("motorcycle", "synthetic", "shifted")


def notebooks_folder() -> Path:
    """Where notebooks and experiments are. Raises `UserError` if the package was installed without its checkout."""
    if not (NOTEBOOKS / "02_adaptation.ipynb").is_file():
        raise UserError(f"{NOTEBOOKS}: the notebooks are missing; install from a checkout with `pip install -e .`.")
    return NOTEBOOKS


def parse_data(entries: list[str]) -> list[dict[str, Any]]:
    """`--data` values as configuration: a built-in name, a JSON file of sets, a MoGe folder, or a folder of images."""
    from ttt_lib.moge_layout import BENCHMARKS, INDEX, read_eval_config

    result: list[dict[str, Any]] = []
    for entry in entries:
        path = Path(entry)
        if entry in BUILT_IN:
            result.append({"kind": entry})
        elif path.suffix == ".json":
            result += read_eval_config(path)
        elif path.is_dir() and (path / INDEX).is_file():
            known = BENCHMARKS.get(path.resolve().name, {})
            result.append({"kind": "moge", "path": str(path.resolve()), **known})
        elif path.is_dir() and not any(path.rglob("depth.png")):
            result.append({"kind": "images", "path": str(path.resolve())})
        elif path.is_dir():
            raise UserError(f"--data {entry}: {path / INDEX} is missing; it lists the folder of one sample a line.")
        else:
            raise UserError(f"--data {entry}: no such folder or JSON file; built in are {', '.join(BUILT_IN)}.")
    return result


def parse_set(entries: list[str]) -> dict[str, Any]:
    """`--set train.passes=4` as nested overrides; values are YAML."""
    import yaml

    overrides: dict[str, Any] = {}
    for entry in entries:
        key, separator, value = entry.partition("=")
        if not separator or not key:
            raise UserError(f"--set {entry}: must look like train.passes=4.")
        place = overrides
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml.safe_load(value)
    return overrides


def choose_experiments(names: str | None) -> list[Path]:
    """Files of the named experiments (also of those in `more/`), or of all rows of the table, `original` first."""
    folder = notebooks_folder() / "experiments"
    files = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if names:
        files |= {path.stem: path for path in sorted((folder / "more").glob("*.yaml"))}
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        unknown = [name for name in wanted if name not in files and not Path(name).is_file()]
        if unknown:
            raise UserError(f"--experiments {unknown[0]!r}: there is no such experiment; there are {', '.join(files)}.")
        return [files.get(name, Path(name)) for name in wanted]
    return sorted(files.values(), key=lambda path: (path.stem != "original", path.stem))


def default_workers() -> int:
    """One worker a GPU, or one a core."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def make_jobs(
    files: list[Path], profile: str, overrides: dict[str, Any], shards: int, limit: int | None, views: bool
) -> list:
    """One job an experiment and shard. Raises `UserError` for anything wrong in files, profile, data or model."""
    from ttt_lib.batch import Job, environment, file_hash, fingerprint
    from ttt_lib.config import load_experiment
    from ttt_lib.experiment import open_samples, resolve_profile
    from ttt_lib.models import load_model, weights_checksum

    folder = notebooks_folder()
    notebooks = tuple(
        str(folder / name)
        for name in (("01_augmentation.ipynb",) if views else ()) + ("02_adaptation.ipynb",)
        if (folder / name).is_file()
    )
    sources = [path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem not in SHOWING]
    code = fingerprint([file_hash(path) for path in sources])
    models: dict[str, str] = {}
    versions = environment()["packages"]["torch"]
    jobs = []
    for file in files:
        config = load_experiment(file, resolve_profile(profile), overrides)
        sets = open_samples(config)
        if config.model.name not in models:
            loaded = load_model(config.model.name, config.model.device)
            models[config.model.name] = weights_checksum(loaded)[:16]
        settings = config.as_parameters()
        identity = {
            "settings": fingerprint({key: value for key, value in settings.items() if key != "description"}),
            "limit": str(limit or 0),
            "shards": str(shards),
            "model": models[config.model.name],
            "data": fingerprint([s.data_hash() for s in sets]),
            "code": code,
            "torch": versions,
        }
        # The settings are complete, so the notebook lays no profile over them.
        parameters = {**settings, "profile": "", "limit": limit or 0}
        total = min(sum(len(s) for s in sets), (limit or 10**9) * shards)
        jobs += [
            Job(config.name, i, shards, parameters, identity, notebooks, -(-(total - i) // shards))
            for i in range(shards)
        ]
    return jobs


@app.command()
def ablation(
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="MoGe-layout folder, JSON of sets, image folder, or motorcycle | synthetic | shifted; may repeat. Default: the profile's."
        ),
    ] = None,
    profile: Annotated[str, typer.Option(help="demo, paper, as_released, or a YAML file.")] = "demo",
    experiments: Annotated[str | None, typer.Option(help="Names, separated by commas. Default: all.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs"),
    workers: Annotated[int, typer.Option(help="Jobs at a time; 0: one a GPU, or one a core.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="Of each job. Part of the result: another count rounds differently.")
    ] = 1,
    shards: Annotated[int, typer.Option(min=1, help="Parts that the samples are cut into.")] = 1,
    scheduler: Annotated[str | None, typer.Option(help="Address of a running dask scheduler, tcp://host:port.")] = None,
    cluster: Annotated[str | None, typer.Option(help="YAML for dask-jobqueue: class and options.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples of each shard.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting, e.g. train.passes=4.")] = None,
    views: Annotated[bool, typer.Option(help="Also run 01_augmentation for every experiment.")] = True,
) -> None:
    """Run every experiment through the notebooks, then make Table 1, the figures and the report."""
    from ttt_lib.batch import run_jobs

    overrides = parse_set(set_ or [])
    if data:
        overrides["data"] = parse_data(data)
    workers = workers or default_workers()
    jobs = make_jobs(choose_experiments(experiments), profile, overrides, shards, limit, views)
    print(f"{len(jobs)} jobs, {jobs[0].samples} samples each; results go to {runs}", flush=True)
    outcomes = run_jobs(
        jobs, runs, workers, scheduler, cluster, threads=threads, announce=lambda line: print(line, flush=True)
    )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if len(failed) < len(outcomes):
        summarise(runs)
    for outcome in failed:
        print(f"failed: {outcome.experiment} {outcome.shard}: {outcome.reason}", file=sys.stderr)
    if failed:
        print(
            f"{len(failed)} of {len(outcomes)} jobs failed; the same command does only what is missing.",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def summarise(runs: Path) -> None:
    """Execute 03_ablation on a runs folder into `runs/summary`, and print the table."""
    from ttt_lib.batch import _execute, own_kernel
    from ttt_lib.results import read_runs
    from ttt_lib.tables import table1, to_text

    output = runs / "summary"
    output.mkdir(parents=True, exist_ok=True)
    with own_kernel():
        _execute(
            notebooks_folder() / "03_ablation.ipynb", output / "03_ablation.ipynb",
            {"runs_dir": str(runs.resolve()), "output_dir": str(output.resolve())},
        )  # fmt: skip
    read = read_runs(runs)
    print("\n".join([to_text(table1(read)), *read.notes]))
    if len(read.left_out):
        print(f"left out:\n{read.left_out.to_string(index=False)}")
    print(f"table, figures and report: {output}")


@app.command()
def adapt(
    images: Annotated[list[Path], typer.Argument(help="Photographs of any size and kind.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")] = Path("outputs"),
    experiment: Annotated[str, typer.Option(help="Name or file of the experiment.")] = "recommended",
    profile: Annotated[str, typer.Option(help="demo, paper, as_released, or a YAML file.")] = "demo",
    model: Annotated[str | None, typer.Option(help="See `ttt-depth models`.")] = None,
    metric_points: Annotated[
        Path | None,
        typer.Option(help="Known distances: CSV with u,v,metres (pixels), or a sparse 16-bit depth PNG; one image."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting, e.g. train.passes=4.")] = None,
) -> None:
    """Adapt to photographs: depth (PNG, NPY), point cloud (PLY), a before/after figure and a JSON record for each."""
    from ttt_lib.config import load_experiment
    from ttt_lib.experiment import open_model, resolve_profile
    from ttt_lib.photos import adapt_photo

    overrides = parse_set(set_ or [])
    if model:
        overrides.setdefault("model", {})["name"] = model
    if metric_points is not None and len(images) != 1:
        raise UserError(f"--metric-points {metric_points}: belongs to one image, but {len(images)} are given.")
    config = load_experiment(choose_experiments(experiment)[0], resolve_profile(profile), overrides)
    loaded = open_model(config)
    failed = 0
    for image in images:
        try:
            folder = adapt_photo(image, output, loaded, config, metric_points)
            record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            print(f"{image}: {record['decision']} in {record['seconds']:.1f} s -> {folder}", flush=True)
        except UserError as error:
            failed += 1
            print(f"ttt-depth: {error}", file=sys.stderr, flush=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def hard_subset(
    data: Annotated[list[str], typer.Option(help="MoGe-layout folders or a JSON of sets; may repeat.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the subset (links and an index).")],
    metric: Annotated[str, typer.Option(help="metric/score to choose by.")] = "points_scale_invariant/delta1",
    below: Annotated[float, typer.Option(help="Only samples whose score is lower.")] = 0.5,
    count: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    profile: Annotated[str, typer.Option(help="Profile that names the model.")] = "demo",
    model: Annotated[str | None, typer.Option(help="tiny, a MoGe hub name, or a checkpoint file.")] = None,
) -> None:
    """Choose the samples on which the original model does worst, as the published study did."""
    from ttt_lib.config import load_experiment
    from ttt_lib.data import select_hard, write_subset_index
    from ttt_lib.experiment import resolve_profile, run_experiment

    entries = parse_data(data)
    if any(entry["kind"] != "moge" for entry in entries):
        raise UserError("--data: a hard subset links to samples on disk, so every set must be in the MoGe layout.")
    overrides: dict[str, Any] = {"data": entries, **({"model": {"name": model}} if model else {})}
    config = load_experiment(choose_experiments("original")[0], resolve_profile(profile), overrides)
    run = run_experiment(config)
    for row in run.left_out.itertuples():
        print(f"left out: {row.dataset}/{row.sample}: {row.reason}", file=sys.stderr)
    if run.metrics.empty:
        raise UserError("--data: none of the samples could be read and evaluated.")
    chosen = select_hard(run.metrics[run.metrics.prediction == "final"], metric, below, count)
    if chosen.empty:
        raise UserError(f"--below {below}: no sample scores that low in {metric}.")
    folders = {entry.get("name") or Path(entry["path"]).resolve().name: Path(entry["path"]) for entry in entries}
    index = write_subset_index(chosen, folders, output)
    print(chosen.to_string(index=False))
    print(f"{len(chosen)} samples: {index}")


@app.command()
def models() -> None:
    """List what --model takes."""
    from ttt_lib.models import HUB_NAMES, TRANSFORMERS_PREFIXES

    print("tiny  (bundled, works offline)")
    print("\n".join(HUB_NAMES))
    print("\n".join(f"{prefix}...  (transformers)" for prefix in TRANSFORMERS_PREFIXES))
    print("PATH  (a MoGe-1 or MoGe-2 checkpoint file, or the folder of a transformers model)")


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"ttt-depth: {error}", file=sys.stderr)
        sys.exit(2)
