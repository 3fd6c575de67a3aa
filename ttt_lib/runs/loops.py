"""Whole loops side by side: the published one and ours, in rounds, each in a process of its own.

`05_performance.ipynb` shows the bundled model's; `ttt-depth benchmark` runs the published size on a GPU.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ttt_lib.adaptation.adapter import Adapter
from ttt_lib.core.config import ExperimentConfig, build_experiment, load_experiment
from ttt_lib.core.files import write_json
from ttt_lib.core.memory import memory_mb, peak_memory_mb, reset_peak_memory
from ttt_lib.data.catalog import open_dataset
from ttt_lib.models.pretraining.stand_in import write_stand_in
from ttt_lib.runs.benchmark import machine, now
from ttt_lib.runs.catalog import experiment_file
from ttt_lib.runs.experiment import open_model, resolve_profile

log = logging.getLogger(__name__)
NO_PATCHES = {"losses": {f"local_{level}": {"weight": 0.0} for level in (4, 16, 64)}}
FULL = 512  # passes of the published recipe
MARGIN = 1.2  # a round may take so much longer than the last one


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
    train = {"passes": passes, "accumulation": max(1, passes // 4)}
    small = model["name"] == "tiny"  # whose profile leaves the patches out, and has a rate that it bears

    def row(profile: str | None = None, name: str = "unfreeze_encoder", **over: Any) -> ExperimentConfig:
        laid = {**size, **over, "model": {**model, **over.get("model", {})}}
        if name != "recommended":
            laid["train"] = {**train, **over.get("train", {})}
        return load_experiment(experiment_file(name), resolve_profile(profile), laid)

    together, one = {"micro_batch": 2 * train["accumulation"]}, {"micro_batch": 1}
    without = {"profile": "demo"} if small else NO_PATCHES
    bfloat16, less = {"autocast": "bfloat16"}, {"checkpointing": True}
    return {
        "as released": row("as_released", released={"full_cost_alignment": True}),
        "all terms": row(),
        "all terms, together": row(train=together),
        "all terms, one view": row(train=one),
        "all terms, one view, checkpointing": row(train=one, model=less),
        "all terms, one view, bfloat16": row(train=one, model=bfloat16),
        "all terms, together, bfloat16": row(train=together, model=bfloat16),
        "without patches": row(**without),
        "without patches, together, bfloat16": row(**without, train=together, model=bfloat16),
        "recommended": row("demo" if small else None, "recommended"),
        "recommended, to its end": row("demo" if small else None, "recommended", gate={"mode": "measure"}),
    }


@contextmanager
def published_model() -> Iterator[dict[str, Any]]:
    """The published ViT-S at its 1500 tokens, with weights that mean nothing (`stand_in.py`): a model's section."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vits.pt"
        write_stand_in(path, device="cuda" if torch.cuda.is_available() else "cpu")
        yield {"name": str(path), "num_tokens": 1500}


def benchmark(output: Path, quick: bool | None = None, passes: int = 8, minutes: float = 8.0, rounds: int = 3) -> str:
    """Measure the loops on this machine, and write `benchmark.json` and `benchmark.md` into a folder.

    Args:
        output: the folder.
        quick: the bundled model at 256 pixels instead of the published size at 640; None: where there is no GPU.
        passes: of a loop.
        minutes: no further round is begun that would end later; the first one is always finished.
        rounds: at most so many.

    Returns:
        The table and what it says of a whole published adaptation, as text.
    """
    begun, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = device.type != "cuda" if quick is None else quick
    image = next(iter(open_dataset(kind="motorcycle").readable())).image
    about = {**machine(device), "date": time.strftime("%Y-%m-%d"), "passes": passes}
    about["model"] = "tiny, 192 tokens, views of 256" if quick else "ViT-S stand-in, 1500 tokens, views of 640"
    output.mkdir(parents=True, exist_ok=True)

    def write(table: pd.DataFrame) -> str:
        said = _in_words(table, about)
        write_json(output / "benchmark.json", {**about, "loops": table.to_dict("records")})
        (output / "benchmark.md").write_text(f"```\n{said}\n```\n", encoding="utf-8")
        return said

    with nullcontext({"name": "tiny", "num_tokens": 192}) if quick else published_model() as model:
        loops = loops_to_compare(model, 256 if quick else 640, passes)
        left = 60 * minutes - (time.monotonic() - begun)
        return write(compare_loops(loops, image, 1, rounds, left, write))


def _in_words(table: pd.DataFrame, about: dict[str, Any]) -> str:
    """The table under what was measured, and what it says of a whole published adaptation."""
    first, last = table.iloc[0], table.iloc[-1]
    whole = FULL * first.ms_a_pass / 1000
    about = {**about, "whole": (
        f"{first.loop}, {FULL} passes: {whole:.0f} s an image; {last.loop}, {last.passes} passes: "
        f"{last.seconds:.1f} s, {whole / last.seconds:.0f} times faster"
    )}  # fmt: skip
    return "\n".join([*(f"{key}: {value}" for key, value in about.items()), "", table.round(3).to_string(index=False)])


def _adapt_once(settings: dict[str, Any], image: Tensor, repeats: int, threads: int) -> dict[str, float]:
    """In a process of its own: median seconds an image, peak memory of adapting (MiB), and how much of it adapting
    added to the loaded model after a plain prediction."""
    torch.set_num_threads(threads)
    config = build_experiment(settings)
    model = open_model(config)
    model.predict(image.to(model.device))
    idle = memory_mb(model.device)
    reset_peak_memory(model.device)  # loading took more for a while
    passes = config.train.passes if model.device.type == "cuda" else 1  # a GPU plans for each new shape, for seconds
    warm = config.model_copy(update={"train": config.train.model_copy(update={"passes": passes})})
    Adapter(model, warm).adapt(image)
    seconds, reload_seconds, peak = [], [], 0.0
    for i in range(repeats):
        begun = now(model.device)
        if config.released.reload_model:
            model = None  # not two of them at a time
            model = open_model(config)
        reload_seconds.append(now(model.device) - begun)
        peak = max(peak, peak_memory_mb(model.device))  # of reloading: `adapt` starts again
        result = Adapter(model, config).adapt(image, str(i))
        seconds.append(now(model.device) - begun)
        peak = max(peak, result.peak_memory_mb)
    return {
        "seconds": statistics.median(seconds), "reload": statistics.median(reload_seconds), "passes": result.passes_done,
        "peak_mb": peak, "idle_mb": idle, "added_mb": max(peak - idle, 0.0),
        "cuda": float(model.device.type == "cuda"),
    }  # fmt: skip


def _fresh_processes() -> BaseContext:
    """How each loop gets a process in which none has run. Without CUDA, which no fork bears, they come from one that has
    loaded all modules and done nothing else: three seconds less each."""
    if torch.cuda.is_available() or "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def compare_loops(
    configs: dict[str, ExperimentConfig], image: Tensor, repeats: int = 3, rounds: int = 1,
    seconds: float = float("inf"), keep: Callable[[pd.DataFrame], Any] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Seconds and peak memory of adapting to one image (3,H,W) by each configuration, and ratios to the first.

    Columns loop, passes, seconds, ms_a_pass, peak_mb (MiB of the whole process, or allocated on a CUDA device),
    added_mb (peak less what the loaded model had after a plain prediction: what adapting added), rounds, faster (first's
    seconds over these), memory (on a CUDA device peak_mb over the first's; on a CPU, where libraries would hide the
    difference, added_mb over the first's), failed (in words; its numbers are NaN then). Each loop runs `rounds` times in
    turn, or as often as fits into `seconds`, `repeats` images a time, in a fresh process; `keep` is given the table of
    what has run after each.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    failed, begun = dict.fromkeys(configs, ""), time.monotonic()
    for done in range(rounds):
        if done and (time.monotonic() - begun) * (1 + MARGIN / done) > seconds:
            break
        for name, config in configs.items():
            if failed[name]:
                continue
            with ProcessPoolExecutor(1, mp_context=_fresh_processes()) as pool:
                arguments = (config.as_parameters(), image.cpu(), repeats, torch.get_num_threads())
                try:
                    found[name].append(pool.submit(_adapt_once, *arguments).result())
                except Exception as error:  # of that process: what does not fit is a row of the table, not its end
                    failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    log.info("%s: %s", name, failed[name])
            if keep is not None:
                keep(_table(found, failed))
    return _table(found, failed)


def _table(found: dict[str, list[dict[str, float]]], failed: dict[str, str]) -> pd.DataFrame:
    """`compare_loops`' table of the loops that have run."""
    keys, rows = ("passes", "seconds", "peak_mb", "added_mb"), []
    for name, results in found.items():
        if results or failed[name]:
            row = {key: statistics.median([result[key] for result in results] or [float("nan")]) for key in keys}
            row = {**row, "ms_a_pass": 1000 * row["seconds"] / max(row["passes"], 1), "rounds": len(results)}
            rows.append({"loop": name, **row, "passes": int(row["passes"]) if results else 0, "failed": failed[name]})
    table = pd.DataFrame(rows)
    table["faster"] = table.seconds[0] / table.seconds
    on_gpu = any(result["cuda"] for results in found.values() for result in results)
    compared = table.peak_mb if on_gpu else table.added_mb
    table["memory"] = compared / compared[0]
    return table[["loop", *keys, "ms_a_pass", "rounds", "faster", "memory", "failed"]]
