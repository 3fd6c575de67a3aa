"""The command `ttt-depth`. Heavy imports happen inside the commands, so that `--help` answers at once.

Long: one command after the other, each hardly more than its options.
"""

from __future__ import annotations

import errno
import io
import logging
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ttt_lib.core.collector import collector_paused
from ttt_lib.core.config import ExperimentConfig
from ttt_lib.core.errors import UserError, printable, reason
from ttt_lib.core.files import absolute, check_writable
from ttt_lib.core.termination import end_in_order
from ttt_lib.runs.catalog import experiment_file, experiment_files, notebooks_folder, profile_files

LOG = logging.getLogger("ttt_lib")
HARD_BY = "points_scale_invariant/delta1"  # as the study's text says
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Test-time training of monocular geometry models: adapt to photographs, run the ablation, look at this machine.",
    epilog="Example: ttt-depth adapt photo.jpg -o outputs",
)


@app.callback()
def _say(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say on stderr what is loaded, left out and decided.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Say everything; an error shows its trace and cause.")] = False,
) -> None:
    """The level of the package's loggers, before any command."""
    if verbose or debug:
        handler = logging.StreamHandler()  # stderr
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        LOG.handlers = [handler]
        LOG.setLevel(logging.DEBUG if debug else logging.INFO)


def _complete_experiments(incomplete: str) -> list[str]:
    """For the shell: names of experiments, also after a comma."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in experiment_files() if name.startswith(last)]


def _complete_profiles(incomplete: str) -> list[str]:
    return [name for name in profile_files() if name.startswith(incomplete)]


DATA = """MoGe-layout folder, JSON of sets, images, motorcycle | synthetic | shifted; may repeat. Default: the profile's."""
HARDEST = (
    "The published protocol: N hardest, random, easy samples, seen twice, and controls. "
    "Default data: 1,000 scenes of shifted."
)
PROFILES = "demo, paper, as_released, or a YAML file; auto: demo for tiny, none for other models."
Profile = Annotated[str, typer.Option(help=PROFILES, autocompletion=_complete_profiles)]
Experiment = Annotated[str, typer.Option(help="Name or file of the experiment.", autocompletion=_complete_experiments)]
Model = Annotated[str | None, typer.Option(help="See `ttt-depth models`.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, e.g. train.passes=4.")]


def _settings(experiment: str, profile: str, model: str | None, overrides: list[str] | None) -> ExperimentConfig:
    """What `--experiment`, `--profile`, `--model` and `--set` ask for together."""
    from ttt_lib.runs.experiment import load_with_profile
    from ttt_lib.runs.plan import parse_set, put

    settings = parse_set(overrides or [])
    if model:
        put(settings, "model.name", model)
    return load_with_profile(experiment_file(experiment, "--experiment"), profile, settings)


@app.command(epilog="Example: ttt-depth ablation --data path/to/set --experiments original,recommended --runs runs")
def ablation(
    data: Annotated[list[str] | None, typer.Option(help=DATA)] = None,
    profile: Profile = "demo",
    experiments: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas. Default: all.", autocompletion=_complete_experiments),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs"),
    workers: Annotated[int, typer.Option(min=0, help="Jobs at a time; 0: one a GPU, or one a core.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, max=1024, help="Of each job. Part of the result: another count rounds differently.")
    ] = 1,
    shards: Annotated[int, typer.Option(min=1, help="Parts that the samples are cut into.")] = 1,
    scheduler: Annotated[str | None, typer.Option(help="Address of a running dask scheduler, tcp://host:port.")] = None,
    cluster: Annotated[str | None, typer.Option(help="YAML for dask-jobqueue: class and options.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples of each shard.")] = None,
    set_: Overrides = None,
    views: Annotated[bool, typer.Option(help="Also run 01_augmentation for every experiment.")] = True,
    hardest: Annotated[int | None, typer.Option(min=2, help=HARDEST)] = None,
    metric: Annotated[str, typer.Option(help="metric/score that --hardest chooses by.")] = HARD_BY,
    below: Annotated[float | None, typer.Option(help="--hardest takes only samples whose score is lower.")] = None,
) -> None:
    """Run every experiment through the notebooks, then make Table 1, the figures and the report."""
    import torch

    from ttt_lib.core.provenance import cores
    from ttt_lib.data.catalog import describe_sources
    from ttt_lib.runs.jobs import run_jobs
    from ttt_lib.runs.plan import choose_experiments, make_jobs, parse_set
    from ttt_lib.runs.protocol import choose_samples, forget_choice, with_controls

    if hardest is None and (below is not None or metric != HARD_BY):
        raise UserError("--metric and --below: say how --hardest chooses, which is not given.")
    runs, cluster = Path(absolute(runs)), absolute(cluster) if cluster else None
    overrides = parse_set(set_ or [])
    if data:
        overrides["data"] = describe_sources(data, "--data")
    workers = workers or torch.cuda.device_count() or cores()  # one a GPU, or one a core
    files = choose_experiments(experiments)
    do = partial(run_jobs, workers=workers, scheduler=scheduler, cluster_file=cluster, threads=threads)
    if hardest:
        overrides["data"] = choose_samples(runs, profile, overrides, hardest, metric, below, shards, limit, do)
        files, limit = with_controls(files), None  # the limit was of the samples to choose from
    jobs = make_jobs(files, profile, overrides, shards, limit, views)
    names = {job.parameters["model"]["name"] for job in jobs} - {"tiny"}
    if profile == "demo" and names:
        print(f"note: the profile demo (few tokens, low rates) is made for tiny; for {min(names)} try --profile paper.")
    print(f"{len(jobs)} jobs, {jobs[0].samples} samples each; results go to {runs}")
    if not hardest:
        forget_choice(runs)
    _end(do(jobs, runs), runs, threads)


def _end(outcomes: list, runs: Path, threads: int) -> None:
    """The summary of what was done, and what failed with exit code 1."""
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if len(failed) < len(outcomes):
        summarise(runs, threads)
    for outcome in failed:
        print(f"failed: {outcome.experiment} {outcome.shard}: {outcome.reason}", file=sys.stderr)
    if failed:
        say = f"{len(failed)} of {len(outcomes)} jobs failed; the same command does only what is missing."
        print(say, file=sys.stderr)
        raise typer.Exit(1)


def summarise(runs: Path, threads: int) -> None:
    """Execute 03_ablation on a runs folder into `runs/summary`, in the kernel of its jobs, and print the table."""
    from ttt_lib.report.tables import summary_text
    from ttt_lib.runs.notebook import kept_kernel, one_line
    from ttt_lib.runs.results import read_runs

    output = runs / "summary"
    output.mkdir(parents=True, exist_ok=True)
    parameters = {"runs_dir": str(runs.resolve()), "output_dir": str(output.resolve())}
    notebook = "03_ablation.ipynb"
    try:
        with closing(kept_kernel(threads)) as kernel:
            kernel.execute(notebooks_folder() / notebook, output / notebook, parameters)
    except Exception as error:  # of a cell; the notebook shows it
        raise UserError(f"{output / notebook}: the summary failed ({one_line(error)}).") from error
    print(f"{summary_text(read_runs(runs))}\ntable, figures and report: {output}")


@app.command(epilog="Example: ttt-depth adapt photo.jpg -o outputs --set train.passes=8")
def adapt(
    images: Annotated[list[str], typer.Argument(help="Photographs of any size and kind, or folders of them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")] = Path("outputs"),
    experiment: Experiment = "recommended",
    profile: Profile = "auto",
    model: Model = None,
    metric_points: Annotated[
        Path | None,
        typer.Option(
            help="Known distances of one image: CSV of u,v,metres (pixels), or a sparse 16-bit depth PNG (see --metric-unit)."
        ),
    ] = None,
    metric_unit: Annotated[str | None, typer.Option(help="Of that PNG: kitti (1/256 m), mm, or metres a unit.")] = None,
    intrinsics: Annotated[str | None, typer.Option(help="Known camera: fx,fy,cx,cy in pixels, upright.")] = None,
    fov: Annotated[float | None, typer.Option(help="Known camera: horizontal field of view in degrees.")] = None,
    exif: Annotated[bool, typer.Option(help="Take the focal length from EXIF where neither is given.")] = True,
    set_: Overrides = None,
) -> None:
    """Adapt to photographs: depth (PNG, NPY), point cloud (PLY), a before/after figure and a JSON record for each.

    depth.png has 16 bits: depth = near * (far / near) ^ ((value - 1) / 65533), 65535 where there is no surface; near, far
    and the unit are in record.json (and near and far in the PNG). depth.npy is the depth itself. With a known camera
    whose principal point is off the middle, what it leaves unknown is 0 in the PNG and NaN in the NPY.
    """
    end_in_order()
    with collector_paused():  # it would take a fifth of these imports, and find nothing to free
        from ttt_lib.data.known_camera import parse_intrinsics
        from ttt_lib.data.known_distances import parse_unit
        from ttt_lib.report.photo_files import adapt_photos, find_photos, name_results
        from ttt_lib.runs.experiment import open_model

    config, output = _settings(experiment, profile, model, set_), Path(absolute(output))
    photos = name_results(find_photos(images), output)
    if photos:
        check_writable(output / next(iter(photos.values())))
    if metric_points is not None and len(photos) != 1:
        raise UserError(f"--metric-points {metric_points}: belongs to one image, but {len(photos)} are given.")
    if metric_unit is not None and metric_points is None:
        raise UserError(f"--metric-unit {metric_unit}: is that of --metric-points, which is not given.")
    unit = parse_unit(metric_unit) if metric_unit is not None else None
    camera = {"intrinsics": parse_intrinsics(intrinsics) if intrinsics is not None else None, "fov": fov, "exif": exif}
    failed = False
    for photo, folder, said in adapt_photos(photos, output, open_model(config), config, metric_points, unit, **camera):
        if folder is None:
            failed = True
            print(f"ttt-depth: {said}", file=sys.stderr)
        else:
            print(f"{printable(photo)}: {said} -> {printable(folder, 1000)}")
    if failed:
        raise typer.Exit(1)


@app.command(epilog="Example: ttt-depth scene photo_1.jpg photo_2.jpg -o kitchen")
def scene(
    photographs: Annotated[
        list[Path],
        typer.Argument(help="Two or more photographs of one scene, their folder, a clip, or a COLMAP model."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")] = Path("scene"),
    experiment: Experiment = "scene",
    profile: Profile = "auto",
    model: Model = None,
    cameras: Annotated[Path | None, typer.Option(help="Known cameras: transforms.json, or a COLMAP model.")] = None,
    focal: Annotated[float | None, typer.Option(help="Known focal length over the width; else EXIF's.")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="Each so many of the photographs or frames.")] = None,
    count: Annotated[int | None, typer.Option(min=2, help="So many, spread evenly (of a clip some 14).")] = None,
    save_weights: Annotated[
        Path | None, typer.Option(help="Keep the adapted weights for this place; needs scene_trained, which trains.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Begin with weights that were kept for this place.")] = None,
    set_: Overrides = None,
) -> None:
    """Adapt to several photographs of one scene: depth in one scale, one point cloud, cameras, pictures and a record."""
    end_in_order()
    with collector_paused():  # as in `adapt`
        from ttt_lib.report.scene_files import adapt_photographs

    config = _settings(experiment, profile, model, set_)
    source = photographs[0] if len(photographs) == 1 else photographs
    options = {"every": every, "count": count, "focal": focal, "cameras": cameras}

    def say(line: str) -> None:
        print(printable(line, 1000))

    adapt_photographs(source, Path(absolute(output)), config, options, save_weights, weights, say)


@app.command(epilog="Example: ttt-depth benchmark -o times")
def benchmark(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the table and its JSON.")] = Path("times"),
    quick: Annotated[
        bool | None, typer.Option("--quick/--published", help="Bundled model, or published size. Default: by the GPU.")
    ] = None,
    passes: Annotated[int | None, typer.Option(min=1, max=512, help="Of a loop. Default: 8, on a GPU 64.")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="No further round begins that would end later.")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="At most so many.")] = 3,
) -> None:
    """Time and peak memory of the published loop beside ours on this machine, by rounds in processes of their own."""
    from ttt_lib.runs.loops import benchmark as measure

    print(measure(Path(absolute(output)), quick, passes, minutes, rounds))


@app.command(epilog="Example: ttt-depth models")
def models() -> None:
    """List what --model takes."""
    from ttt_lib.models.load import list_models

    print("\n".join(list_models()))
    print("PATH  (a MoGe-1 or MoGe-2 checkpoint file, or the folder of a transformers model)")


@app.command(epilog="Example: ttt-depth doctor")
def doctor() -> None:
    """Look at this machine: packages, torch, GPU, GL, hub, model, notebooks; and say what to do. Exit code 1: cannot work."""
    from ttt_lib.doctor import report

    if not report():
        raise typer.Exit(1)


# What a user can put right without knowing where in the program it happened.
FULL_OR_FORBIDDEN = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def _is_the_users(error: OSError) -> bool:
    """Whether an error of the system is about the disk, about permissions, or about something on the command line."""
    if error.errno in FULL_OR_FORBIDDEN:
        return True
    places = [absolute(argument.rpartition("=")[2]) for argument in sys.argv[1:]]
    return isinstance(error.filename, str | Path) and absolute(error.filename) in places


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, with `--debug` below its trace and cause."""
    for stream in (sys.stdout, sys.stderr):  # names of files hold more than some consoles can show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a log shows each line at once
    try:
        app(prog_name="ttt-depth")
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and not _is_the_users(error):
            raise  # a mistake of this program: its trace says where
        LOG.debug("what happened:", exc_info=True)
        if isinstance(error, OSError):
            place = f"{printable(error.filename)}: " if error.filename else ""
            error = f"{place}{reason(error)}."
        print(f"ttt-depth: {error}", file=sys.stderr)
        sys.exit(2)
