"""Whole loops side by side: the published one and ours, in rounds, each in a process of its own.

`05_performance.ipynb` shows the bundled model's; `ttt-depth benchmark` runs the published size on a GPU.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import reduce
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ttt_lib.adaptation.adapter import Adapter
from ttt_lib.core.config import ExperimentConfig, build_experiment, merge
from ttt_lib.core.files import write_json, write_text
from ttt_lib.core.memory import memory_mb, peak_memory_mb, reset_peak_memory
from ttt_lib.data.catalog import open_dataset
from ttt_lib.models.pretraining.stand_in import write_stand_in
from ttt_lib.runs.benchmark import machine, now
from ttt_lib.runs.catalog import experiment_file
from ttt_lib.runs.experiment import load_with_profile, open_model

log = logging.getLogger(__name__)
NO_PATCHES = {"losses": {f"local_{level}": {"weight": 0.0} for level in (4, 16, 64)}}
FULL = 512  # passes of the published recipe
MARGIN = 1.2  # a round may take so much longer than the last one
NUMBERS = ("passes", "seconds", "peak_mb", "added_mb", "memory")


def loops_to_compare(model: dict[str, Any], longest_side: int, passes: int) -> dict[str, ExperimentConfig]:
    """The published loop and ours at equal steps and views, and `recommended`, which is a shorter recipe with a gate: as
    it is, which may end before it trains, and with the gate only measuring.

    Args:
        model: section of the configuration, `name` and `num_tokens`.
        longest_side: of the views, pixels.
        passes: of all loops but `recommended`, in up to four steps.

    Returns:
        Configurations by the name of their row; the first is what the others are compared with.

    Example:
        >>> list(loops_to_compare({"name": "tiny", "num_tokens": 48}, 64, 4))[0]
        'as released'
    """
    size: dict[str, Any] = {"model": model, "views": {"longest_side": longest_side}}
    small = "demo" if model["name"] == "tiny" else None  # it leaves the patches out, and has a rate that tiny bears
    accumulation = max(1, passes // 4)

    def row(*over: dict[str, Any], profile: str | None = None, name: str = "unfreeze_encoder") -> ExperimentConfig:
        return load_with_profile(experiment_file(name), profile, reduce(merge, over, size))

    # The release trains the encoder alone in this row; all loops train what the paper says, so that they do the same work.
    parts = ["encoder", "neck", "heads"]
    steps = {"train": {"passes": passes, "accumulation": accumulation, "parts": parts}}
    together, one = ({"train": {"micro_batch": count}} for count in (2 * accumulation, 1))
    bfloat16, less = {"model": {"autocast": "bfloat16"}}, {"model": {"checkpointing": True}}
    patches = {} if small else NO_PATCHES
    return {
        "as released": row(steps, {"released": {"full_cost_alignment": True}}, profile="as_released"),
        "all terms": row(steps),
        "all terms, together": row(steps, together),
        "all terms, one view": row(steps, one),
        "all terms, one view, checkpointing": row(steps, one, less),
        "all terms, one view, bfloat16": row(steps, one, bfloat16),
        "all terms, together, bfloat16": row(steps, together, bfloat16),
        "without patches": row(steps, patches, profile=small),
        "without patches, together, bfloat16": row(steps, patches, together, bfloat16, profile=small),
        "recommended": row(profile=small, name="recommended"),
        "recommended, to its end": row({"gate": {"mode": "measure"}}, profile=small, name="recommended"),
    }


@contextmanager
def published_model() -> Iterator[dict[str, Any]]:
    """The published ViT-S at its 1500 tokens, with weights that mean nothing (`stand_in.py`): a model's section."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vits.pt"
        write_stand_in(path, device="cuda" if torch.cuda.is_available() else "cpu")
        yield {"name": str(path), "num_tokens": 1500}


def benchmark(
    output: Path, quick: bool | None = None, passes: int | None = None, minutes: float = 8.0, rounds: int = 3
) -> str:
    """Measure the loops on this machine, and write `benchmark.json` and `benchmark.md` into a folder.

    Args:
        output: the folder.
        quick: the bundled model at 256 pixels instead of the published size at 640; None: where there is no GPU.
        passes: of a loop; None: 8, or 64 on a GPU, which has more to do where more views of a step are at hand.
        minutes: no further round is begun that would end later; the first one is always finished.
        rounds: at most so many.

    Returns:
        The table and what it says of a whole published adaptation, as text.
    """
    begun, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = device.type != "cuda" if quick is None else quick
    passes = (64 if device.type == "cuda" else 8) if passes is None else passes
    image = next(iter(open_dataset(kind="motorcycle").readable())).image
    about = {**machine(device), "date": time.strftime("%Y-%m-%d"), "passes": passes}
    about["model"] = "tiny, 192 tokens, views of 256" if quick else "ViT-S stand-in, 1500 tokens, views of 640"
    output.mkdir(parents=True, exist_ok=True)

    def keep(table: pd.DataFrame) -> None:  # after each loop: nothing that was measured waits for the end
        write_json(output / "benchmark.json", {**about, "loops": table.to_dict("records")})
        write_text(output / "benchmark.md", f"```\n{_in_words(table, about)}\n```\n")

    with nullcontext({"name": "tiny", "num_tokens": 192}) if quick else published_model() as model:
        loops = loops_to_compare(model, 256 if quick else 640, passes)
        left = 60 * minutes - (time.monotonic() - begun)
        return _in_words(compare_loops(loops, image, 1, rounds, left, keep), about)


def _in_words(table: pd.DataFrame, about: dict[str, Any]) -> str:
    """The table under what was measured, and what it says of a whole published adaptation."""
    first, last = table.iloc[0], table.iloc[-1]
    whole = FULL * first.ms_a_pass / 1000
    lines = [f"{key}: {value}" for key, value in about.items()]
    lines.append(
        f"whole: {first.loop}, {FULL} passes: {whole:.0f} s an image; {last.loop}, {last.passes} passes: "
        f"{last.seconds:.1f} s, {whole / last.seconds:.0f} times faster"
    )
    return "\n".join([*lines, "", table.round(3).to_string(index=False)])


def _adapt_once(
    settings: dict[str, Any], image: Tensor, repeats: int, threads: int, environment: dict[str, str]
) -> dict[str, float]:
    """In a process of its own: median seconds an image, peak memory of adapting (MiB), how much of it adapting added to
    the loaded model after a plain prediction, and which of the two is to be compared."""
    os.environ.update(environment)  # a server's is of when it began
    torch.set_num_threads(threads)
    config = build_experiment(settings)
    model = open_model(config)
    model.predict(image.to(model.device))
    idle, on_gpu = memory_mb(model.device), model.device.type == "cuda"
    reset_peak_memory(model.device)  # loading took more for a while
    # A GPU plans for each new shape, for seconds, and the second step's batches may be larger than the first one's.
    passes = min(2 * config.train.accumulation, config.train.passes) if on_gpu else 1
    warm = config.model_copy(update={"train": config.train.model_copy(update={"passes": passes})})
    Adapter(model, warm).adapt(image)
    seconds, peaks = [], []
    for i in range(repeats):
        begun = now(model.device)
        if config.released.reload_model:
            model = None  # not two of them at a time
            model = open_model(config)
        peaks.append(peak_memory_mb(model.device))  # of reloading: `adapt` starts again
        result = Adapter(model, config).adapt(image, str(i))
        seconds.append(now(model.device) - begun)
        peaks.append(result.peak_memory_mb)
    peak, added = max(peaks), max(max(peaks) - idle, 0.0)
    return {
        "passes": result.passes_done, "seconds": statistics.median(seconds), "peak_mb": peak, "added_mb": added,
        "memory": peak if on_gpu else added,
    }  # fmt: skip


def _processes() -> BaseContext:
    """Fresh processes, where the system can from one that has loaded everything and computed nothing: 3 s less each."""
    # The server is spoken to through a file, whose whole name may have 107 letters.
    if "forkserver" not in get_all_start_methods() or len(tempfile.gettempdir()) > 64:
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def compare_loops(
    configs: dict[str, ExperimentConfig], image: Tensor, repeats: int = 3, rounds: int = 1,
    seconds: float = math.inf, keep: Callable[[pd.DataFrame], Any] = lambda table: None,
) -> pd.DataFrame:  # fmt: skip
    """Seconds and peak memory of adapting to one image (3,H,W) by each configuration, and ratios to the first.

    Columns loop, passes, seconds, peak_mb (MiB of the whole process, or allocated on a CUDA device), added_mb (peak less
    what the loaded model had after a plain prediction: what adapting added), memory (on a CUDA device peak_mb over the
    first's; on a CPU, where libraries would hide the difference, added_mb over the first's), rounds, failed (in words; its
    numbers are NaN then), ms_a_pass, faster (first's seconds over these). Each loop runs `rounds` times in turn, or as
    often as fits into `seconds`, `repeats` images a time, in a fresh process; `keep` is given the table of what has run
    after each.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    failed, begun, table = {}, time.monotonic(), pd.DataFrame()
    for done in range(rounds):
        if done and (time.monotonic() - begun) * (1 + MARGIN / done) > seconds:
            break
        for name, config in configs.items():
            if name in failed:
                continue
            with ProcessPoolExecutor(1, mp_context=_processes()) as pool:
                arguments = (config.as_parameters(), image.cpu(), repeats, torch.get_num_threads(), dict(os.environ))
                try:
                    found[name].append(pool.submit(_adapt_once, *arguments).result())
                except Exception as error:  # of that process: what does not fit is a row of the table, not its end
                    failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    log.info("%s: %s", name, failed[name])
            table = _table(found, failed)
            keep(table)
    return table


def _table(found: dict[str, list[dict[str, float]]], failed: dict[str, str]) -> pd.DataFrame:
    """`compare_loops`' table of the loops that have run: medians of their rounds."""
    measured = [{"loop": name, **result} for name, results in found.items() for result in results]
    by_loop = pd.DataFrame(measured, columns=["loop", *NUMBERS]).groupby("loop")
    ran = [name for name in found if found[name] or name in failed]
    table = by_loop.median().reindex(ran).rename_axis("loop").reset_index()
    table["rounds"] = [len(found[name]) for name in ran]
    table["failed"] = [failed.get(name, "") for name in ran]
    table["passes"] = table["passes"].fillna(0).astype(int)
    table["ms_a_pass"] = 1000 * table["seconds"] / table["passes"].clip(lower=1)
    table["faster"] = table["seconds"][0] / table["seconds"]
    table["memory"] = table["memory"] / table["memory"][0]
    return table
