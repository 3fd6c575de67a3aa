"""Jobs: nothing half done, nothing lost, nothing mixed; failures are told and the rest goes on."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from small_jobs import job, write_without_kernel

from ttt_lib.core.errors import RunError, UserError
from ttt_lib.report.tables import table1
from ttt_lib.runs import cluster as cluster_module
from ttt_lib.runs import jobs as batch
from ttt_lib.runs.cluster import visible_gpus
from ttt_lib.runs.jobs import Job, job_lock, run_job, run_jobs
from ttt_lib.runs.results import read_runs

CELL = """
import errno, json, os, signal, time
from pathlib import Path
first = not Path(marker).exists()
if mode == "raise" and first:
    raise ValueError("it went wrong")
if mode == "full" and first:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
if mode == "die" and first:
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "worker dies" and first:
    Path(marker).touch()
    os.kill(os.getppid(), signal.SIGKILL)
rows = [f"{name},set,s{i},final,depth_metric,rel,{(i * 37 % 11) / 11}" for i in range(shard_index, 6, shard_count)]
with open(Path(output_dir, "metrics.csv"), "w") as metrics, open(Path(output_dir, "samples.csv"), "w") as samples:
    metrics.write("experiment,dataset,sample,prediction,metric,score,value\\n")
    samples.write("experiment,dataset,sample,seconds\\n")
    for row in rows:
        time.sleep(pause)
        metrics.write(row + "\\n")
        samples.write(",".join(row.split(",")[:3]) + ",0\\n")
        metrics.flush(), samples.flush()
Path(output_dir, "threads.json").write_text(json.dumps([threads, os.environ["OMP_NUM_THREADS"]]))
"""
PARAMETERS = (
    'name = ""\nmode = ""\nmarker = ""\npause = 0.0\noutput_dir = ""\nshard_index = 0\nshard_count = 1\nthreads = 0'
)


@pytest.fixture
def notebook(tmp_path) -> str:
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(CELL)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "work.ipynb")
    return str(tmp_path / "work.ipynb")


def table(runs: Path) -> pd.DataFrame:
    parts = [pd.read_csv(path) for path in runs.glob("*/*-of-*/metrics.csv") if not path.parts[-3].startswith(".")]
    return pd.concat(parts).sort_values(["experiment", "sample"]).reset_index(drop=True)


def statuses(outcomes) -> list[str]:
    return [outcome.status for outcome in outcomes]


def test_a_job_appears_whole_with_its_manifest_and_is_skipped_next_time(notebook, tmp_path):
    runs, lines = tmp_path / "runs", []
    assert statuses(run_jobs([job(notebook)], runs, announce=lines.append)) == ["done"]
    folder = runs / "a" / "000-of-001"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"identity", "settings", "packages", "git_revision", "device", "seconds", "host"} <= manifest.keys()
    executed = nbformat.read(folder / "work.ipynb", 4)
    assert executed.cells[-1].execution_count
    assert len(table(runs)) == 6
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert statuses(run_jobs([job(notebook)], runs, announce=lines.append)) == ["skipped"]
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    assert not any(ord(c) < 32 and c != "\n" for line in lines for c in line)
    assert "[1/1] done" in lines[0] and "6/6 samples, about 0.0 min left" in lines[0]


def test_a_changed_setting_is_never_mixed_and_the_old_is_kept(notebook, tmp_path):
    runs = tmp_path / "runs"
    run_jobs([job(notebook)], runs, announce=lambda _: None)
    run_jobs([job(notebook, settings="2")], runs, announce=lambda _: None)
    assert json.loads((runs / "a" / "000-of-001" / "manifest.json").read_text())["identity"]["settings"] == "2"
    assert len(list((runs / "superseded" / "a").glob("000-of-001.*/metrics.csv"))) == 1
    run_jobs([job(notebook, shard=(i, 2)) for i in range(2)], runs, announce=lambda _: None)
    assert sorted(p.name for p in (runs / "a").iterdir()) == ["000-of-002", "001-of-002"]
    assert len(table(runs)) == 6


@pytest.mark.parametrize(
    ("mode", "words"),
    [("raise", "ValueError: it went wrong"), ("full", "No space left on device"), ("die", "Kernel died")],
)
def test_a_failing_notebook_is_reported_kept_and_repeated_alone(notebook, tmp_path, mode, words):
    runs, marker = tmp_path / "runs", tmp_path / "mended"
    jobs = [job(notebook, "bad", mode=mode, marker=str(marker)), job(notebook, "good")]
    bad, good = run_jobs(jobs, runs, announce=lambda _: None)
    assert bad.status == "failed" and words in bad.reason and "\n" not in bad.reason and good.status == "done"
    assert (runs / "failed" / "bad" / "000-of-001" / "work.ipynb").exists() and not (
        runs / "bad" / "000-of-001"
    ).exists()
    marker.touch()
    assert statuses(run_jobs(jobs, runs, announce=lambda _: None)) == ["done", "skipped"]
    assert not (runs / "failed" / "bad" / "000-of-001").exists()  # what failed before is no longer of interest


@pytest.fixture
def no_kernel(monkeypatch):
    """Jobs that write their files in this process, for what does not depend on kernels."""
    monkeypatch.setattr(batch.Kernel, "execute", write_without_kernel)
    monkeypatch.setattr(batch, "environment", dict)


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_disk_that_is_full_at_the_move_is_reported_and_the_others_finish(
    notebook, tmp_path, monkeypatch, no_kernel, call
):
    """The move of one job fails (and that of its leftovers too): one line, nothing half there, done the next time."""
    runs, real = tmp_path / "runs", getattr(os, call)
    full = {"bad": True}

    def fails(source, *target):
        place = str(source) if call == "rename" else os.readlink(f"/proc/self/fd/{source}")
        if full["bad"] and "/bad.000" in place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, *target)

    monkeypatch.setattr(os, call, fails)
    jobs = [job(notebook, "bad"), job(notebook, "good")]
    bad, good = run_jobs(jobs, runs, announce=lambda _: None)
    assert bad.status == "failed" and "No space left on device" in bad.reason and "\n" not in bad.reason
    assert good.status == "done" and not (runs / "bad" / "000-of-001").exists()
    assert not list((runs / ".work").iterdir())
    full["bad"] = False
    assert statuses(run_jobs(jobs, runs, announce=lambda _: None)) == ["done", "skipped"]


def test_a_users_mistake_about_the_folder_or_the_names_is_one_sentence(notebook, tmp_path):
    with pytest.raises(UserError, match="a: is there twice"):
        run_jobs([job(notebook), job(notebook, settings="2")], tmp_path / "runs")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        run_jobs([job(notebook)], tmp_path / "file")
    with pytest.raises(UserError, match="no scheduler answers"):
        run_jobs([job(notebook)], tmp_path / "runs", scheduler="nonsense://x")


def test_samples_and_time_left_are_told_while_a_job_works(notebook, tmp_path):
    """Lines without control characters, with more samples each time, before the job's own line."""
    lines = []
    jobs = [job(notebook, "a", pause=0.4), job(notebook, "b")]
    run_jobs(jobs, tmp_path / "runs", announce=lines.append, every=0.1)
    assert not any(ord(c) < 32 and c != "\n" for line in lines for c in line)
    between = [re.fullmatch(r"\[0/2\] (\d+)/12 samples, about \d+\.\d min left", line) for line in lines]
    counts = [int(match.group(1)) for match in between if match]
    assert len(counts) >= 3 and counts == sorted(set(counts)) and counts[-1] <= 6
    assert re.fullmatch(
        r"\[1/2\] done    a 000-of-001: \d+ s; 6/12 samples, about \d+\.\d min left", lines[len(counts)]
    )
    assert lines[-1].startswith("[2/2] done") and "12/12 samples, about 0.0 min left" in lines[-1]


def test_the_threads_are_the_same_for_every_number_of_workers_and_are_stated(notebook, tmp_path):
    """Whoever made the jobs divided the cores among the workers: the numbers must not follow that."""
    runs = tmp_path / "runs"
    run_jobs([job(notebook, threads=2)], runs, announce=lambda _: None)
    folder = runs / "a" / "000-of-001"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert json.loads((folder / "threads.json").read_text()) == [1, "1"]
    assert manifest["threads"] == 1 and manifest["identity"]["threads"] == "1"
    assert statuses(run_jobs([job(notebook, threads=5)], runs, announce=lambda _: None)) == ["skipped"]
    assert statuses(run_jobs([job(notebook)], runs, announce=lambda _: None, threads=2)) == ["done"]
    assert list((runs / "superseded" / "a").glob("000-of-001.*"))  # another count is another setting


@pytest.mark.slow
def test_memory_of_the_parent_stays_flat_over_2000_jobs(notebook, tmp_path, monkeypatch, no_kernel):
    """2,000 jobs of 6 samples: what the parent holds after the first hundred hardly grows, a kilobyte a job at most."""
    monkeypatch.setattr(batch, "_sync", lambda folder: None)  # two minutes of waiting for the disk
    jobs = [job(notebook, f"e{i}") for i in range(2000)]
    held, ended = [], 0

    def announce(line):
        nonlocal ended
        ended += 1
        if ended in (100, 2000):
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        outcomes = run_jobs(jobs, tmp_path / "runs", announce=announce)
    finally:
        tracemalloc.stop()
    assert statuses(outcomes) == ["done"] * 2000
    assert held[1] - held[0] < 1900 * 1000, held


def test_a_folder_that_cannot_be_written_is_reported_not_raised(notebook, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".work").write_text("a file where a folder should be")
    outcome = run_job(job(notebook), tmp_path / "runs")
    assert outcome.status == "failed" and "Error" in outcome.reason


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path):
    path = tmp_path / "locks" / "a"
    with job_lock(path) as mine:
        assert mine
        with job_lock(path) as other:
            assert not other
        with job_lock(path) as other:  # the one that was refused has freed nothing
            assert not other
    with job_lock(path) as mine:
        assert mine


@pytest.mark.parametrize(
    "owner",
    [{"pid": 2**22 + 1}, {"pid": os.getpid()}, {"pid": 1, "host": "elsewhere"}, {}, None],
    ids=["dead", "reused", "elsewhere", "nameless", "empty"],
)
def test_a_lock_file_that_nobody_holds_stops_nobody(tmp_path, owner):
    """Left by a dead process, with a number that a living one got since, of another machine, or empty."""
    content = "" if owner is None else json.dumps({"host": socket.gethostname(), **owner})
    (tmp_path / "lock").write_text(content)
    with job_lock(tmp_path / "lock") as mine:
        assert mine


HOLD = """
import builtins, fcntl, os, random, sys, time
from pathlib import Path
from ttt_lib.runs.jobs import job_lock

def slow(owner, name):
    real = getattr(owner, name)
    def later(*arguments, **options):
        time.sleep(random.random() * 0.01)
        return real(*arguments, **options)
    setattr(owner, name, later)

folder, rounds, steps = Path(sys.argv[1]), int(sys.argv[2]), (os.open, os.unlink)
for place in ((os, "open"), (os, "unlink"), (Path, "unlink"), (Path, "read_text"), (builtins, "open"), (fcntl, "flock")):
    slow(*place)  # every step of taking a lock, so that two processes meet between any two of them
print("ready", flush=True)
taken = 0
for i in range(rounds):
    while not (folder / f"go{i}").exists():
        time.sleep(0.0005)
    with job_lock(folder / "locks" / f"lock{i}") as mine:
        if mine:
            os.close(steps[0](folder / f"inside{i}", os.O_CREAT | os.O_EXCL))  # raises if another is inside
            time.sleep(0.03)
            steps[1](folder / f"inside{i}")
            taken += 1
    (folder / f"done{i}.{os.getpid()}").touch()
print(taken, flush=True)
"""


def test_two_processes_that_race_for_a_stale_lock_never_both_have_it(tmp_path):
    """Forty locks of a dead process, and two processes that go for each at the same moment."""
    (tmp_path / "locks").mkdir()
    rounds = 40
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(rounds)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
    for i in range(rounds):
        (tmp_path / "locks" / f"lock{i}").write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))
        (tmp_path / f"go{i}").touch()
        while not all(r.poll() is not None or (tmp_path / f"done{i}.{r.pid}").exists() for r in racers):
            time.sleep(0.001)
    ended = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], ended
    assert sum(int(out) for out, _ in ended) >= rounds  # each lock was free for the one that came first


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    code = f"""
import time
from pathlib import Path
from ttt_lib.runs.jobs import job_lock
with job_lock(Path({str(tmp_path / "lock")!r})) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    with job_lock(tmp_path / "lock") as mine:
        assert not mine
    process.kill()
    process.wait()
    with job_lock(tmp_path / "lock") as mine:
        assert mine


def test_folders_of_killed_runs_are_removed_and_those_of_running_ones_are_not(notebook, tmp_path, no_kernel):
    work = tmp_path / "runs" / ".work"
    for name in ("a.000-of-001.x", "other.b.000-of-002.y", "busy.000-of-001.z"):
        (work / name).mkdir(parents=True)
    with job_lock(tmp_path / "runs" / ".locks" / "busy.000-of-001") as mine:
        assert mine and statuses(run_jobs([job(notebook)], tmp_path / "runs", announce=lambda _: None)) == ["done"]
        assert [p.name for p in work.iterdir()] == ["busy.000-of-001.z"]


SCRIPT = """
import sys, time
sys.modules["rfc3987_syntax"] = None  # a grammar of web addresses, a second of every process that reads notebooks
sys.path[:0] = [{tests!r}]
from small_jobs import job, write_without_kernel
from ttt_lib.runs import jobs as batch
from ttt_lib.runs.jobs import run_jobs
batch.environment = dict  # which loads torch, also in dask's workers, which run this far too
if __name__ == "__main__":
    if not {kernel}:
        batch.Kernel.execute = write_without_kernel
    jobs = [job({notebook!r}, name, (i, 2), pause=0.05) for name in {names!r} for i in range(2)]
    print("ready", flush=True)
    outcomes = run_jobs(jobs, {runs!r}, workers={workers})
    sys.exit(0 if all(o.status in ("done", "skipped") for o in outcomes) else 1)
"""


def start(notebook, tmp_path, runs, workers=1, names="ab", kernel=True) -> subprocess.Popen:
    """`run_jobs` in a process of its own: two shards of each name; says `ready` when it begins."""
    values = {
        "tests": str(Path(__file__).parent),
        "notebook": notebook,
        "runs": str(runs),
        "workers": workers,
    }
    path = tmp_path / f"run{workers}.py"
    path.write_text(SCRIPT.format(**values, names=names, kernel=kernel))
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)  # fmt: skip


def end(process) -> None:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out


def check_resumed(runs, whole):
    """The tables of a run that was killed and resumed are those of an undisturbed one, and nothing else is left."""
    pd.testing.assert_frame_equal(table(runs), table(whole), check_exact=True)
    one, two = (table1(read_runs(folder)) for folder in (runs, whole))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert not list((runs / ".work").iterdir()) and not (runs / "superseded").exists()


@pytest.mark.slow
def test_killed_at_ten_random_moments_and_resumed_gives_the_same_tables(notebook, tmp_path):
    """Killed ten times while it works; what is there in between is always whole."""
    names, runs, rng = "abcdefghijklmnopqrst", tmp_path / "killed", random.Random(5)
    end(start(notebook, tmp_path, tmp_path / "whole", names=names, kernel=False))
    progress = []
    for _ in range(10):
        process = start(notebook, tmp_path, runs, names=names, kernel=False)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.7))
        assert process.poll() is None  # there was something to kill
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        finished = list(runs.glob("[a-t]/*-of-*"))
        for folder in finished:
            assert (folder / "manifest.json").exists() and len(pd.read_csv(folder / "metrics.csv")) == 3
        progress.append(len(finished))
    assert progress == sorted(progress) and 0 < progress[-1] < 40
    end(start(notebook, tmp_path, runs, names=names, kernel=False))
    check_resumed(runs, tmp_path / "whole")


@pytest.mark.slow
def test_killed_runs_leave_orphaned_kernels_that_disturb_nothing(notebook, tmp_path):
    """Only the parent dies, its kernel may go on for a moment; the next run has folders of its own."""
    end(start(notebook, tmp_path, tmp_path / "whole"))
    runs = tmp_path / "killed"
    moments = {".work/*": "a job has begun", ".work/*/metrics.csv": "a kernel writes", "a/*-of-*": "a job has ended"}
    for sign in moments:
        process = start(notebook, tmp_path, runs)
        assert process.stdout.readline() == "ready\n"
        while not list(runs.glob(sign)):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        process.kill()
        process.wait()
    end(start(notebook, tmp_path, runs))
    check_resumed(runs, tmp_path / "whole")


@pytest.mark.slow
def test_a_worker_that_dies_costs_only_its_try(notebook, tmp_path):
    jobs = [job(notebook, "bad", mode="worker dies", marker=str(tmp_path / "mended")), job(notebook, "good")]
    outcomes = run_jobs(jobs, tmp_path / "runs", workers=2, announce=lambda _: None)
    assert statuses(outcomes) == ["done", "done"] and (tmp_path / "mended").exists()
    assert len(table(tmp_path / "runs")) == 12 and not list((tmp_path / "runs" / ".work").iterdir())


@pytest.mark.slow
def test_a_real_adaptation_gives_the_same_numbers_with_one_and_two_workers(tmp_path):
    """Two samples of the bundled model: one worker and one shard, two workers and two shards, equal to the last bit.

    The jobs ask for the cores divided by the workers, as their maker may; on one thread more the numbers differ.
    """
    settings = {
        "name": "unfreeze_encoder", "seed": 0, "data": [{"kind": "synthetic", "count": 2, "height": 64, "width": 96}],
        "model": {"name": "tiny", "num_tokens": 48}, "train": {"passes": 2, "accumulation": 1, "optimizer": {"learning_rate": 1e-3}},
        "losses": {"global": {"align_resolution": 6}}, "views": {"longest_side": 96}, "profile": "",
    }  # fmt: skip
    notebook = str(Path(__file__).parents[2] / "notebooks" / "02_adaptation.ipynb")
    tables = []
    for workers in (1, 2):
        jobs = [
            Job(
                settings["name"],
                i,
                workers,
                settings,
                {"shards": str(workers)},
                (notebook,),
                2 // workers,
                2 // workers,
            )
            for i in range(workers)
        ]
        outcomes = run_jobs(jobs, tmp_path / str(workers), workers=workers, announce=lambda _: None)
        assert statuses(outcomes) == ["done"] * workers, outcomes
        runs = read_runs(tmp_path / str(workers))
        assert len(runs.samples) == 2 and (runs.samples["decision"] == "adapted").all()
        tables.append((runs.metrics, runs.history.drop(columns="seconds")))
    for one, two in zip(*tables):
        pd.testing.assert_frame_equal(one, two, check_exact=True)


@pytest.mark.slow
def test_two_runs_on_one_folder(notebook, tmp_path):
    both = [start(notebook, tmp_path, tmp_path / "runs") for _ in range(2)]
    for process in both:
        process.communicate(timeout=240)
    end(start(notebook, tmp_path, tmp_path / "runs"))
    assert len(table(tmp_path / "runs")) == 12 and not (tmp_path / "runs" / "superseded").exists()


@pytest.mark.slow
def test_two_and_four_workers_give_the_tables_of_one(notebook, tmp_path):
    tables = []
    for workers in (1, 2, 4):
        process = start(notebook, tmp_path, tmp_path / str(workers), workers)
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0 and ("dashboard: http" in out) == (workers > 1), out
        tables.append(table(tmp_path / str(workers)))
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2])


def test_the_gpus_of_the_workers_are_those_that_the_user_may_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_gpus() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(cluster_module.shutil, "which", lambda name: "/usr/bin/" + name)
    listing = "GPU 0: one (UUID: GPU-a)\nGPU 1: two (UUID: GPU-b)\n  MIG 1g: ignored\n"
    monkeypatch.setattr(cluster_module.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listing))
    assert visible_gpus() == ["0", "1"]


@pytest.mark.parametrize("failing", ["scale", "Client", "announce"])
def test_a_cluster_that_was_started_is_closed_whatever_fails_after_it(tmp_path, monkeypatch, failing):
    did = []

    class SLURMCluster:
        def __init__(self, cores):
            did.append(f"started {cores}")

        def scale(self, jobs):
            did.append(f"scaled {jobs}")
            if failing == "scale":
                raise RuntimeError("sbatch: not found")

        def close(self):
            did.append("closed")

    class Client:
        dashboard_link = "http://nowhere"

        def __init__(self, cluster):
            if failing == "Client":
                raise TimeoutError("no answer")

        def close(self):
            did.append("client closed")
            raise OSError("it is gone")  # which keeps nobody from closing the cluster

    monkeypatch.setitem(sys.modules, "dask_jobqueue", SimpleNamespace(SLURMCluster=SLURMCluster))
    monkeypatch.setattr("distributed.Client", Client)
    (tmp_path / "slurm.yaml").write_text("class: SLURMCluster\noptions: {cores: 1}")
    words = {"scale": "sbatch: not found", "Client": "no client can connect .*no answer", "announce": "gone"}
    with pytest.raises(Exception, match=words[failing]) as caught:
        with cluster_module.open_client(3, None, str(tmp_path / "slurm.yaml"), lambda line: [][0]):
            did.append("worked")
    assert did[:2] == ["started 1", "scaled 3"] and did[-1] == "closed" and "worked" not in did
    assert isinstance(caught.value, RunError) == (failing != "announce")
