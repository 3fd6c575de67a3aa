"""Jobs: nothing half done, nothing lost, nothing mixed; failures are told and the rest goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from ttt_lib.batch import Job, job_lock, run_job, run_jobs

CELL = """
import json, os, signal, time
from pathlib import Path
time.sleep(pause)
if mode == "raise" and not Path(marker).exists():
    raise ValueError("it went wrong")
if mode == "die" and not Path(marker).exists():
    os.kill(os.getpid(), signal.SIGKILL)
rows = [f"{name},set,s{i},final,depth_metric,rel,{(i * 37 % 11) / 11}" for i in range(shard_index, 6, shard_count)]
header = "experiment,dataset,sample,prediction,metric,score,value"
Path(output_dir, "metrics.csv").write_text("\\n".join([header, *rows]) + "\\n")
Path(output_dir, "samples.csv").write_text("experiment,dataset,sample,seconds\\n")
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


def job(notebook, name="a", shard=(0, 1), settings="1", **parameters) -> Job:
    identity = {"settings": settings, "shards": str(shard[1])}
    return Job(name, *shard, {"name": name, **parameters}, identity, (notebook,), 6, 1)


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
    assert "[1/1] done" in lines[0] and "min left" in lines[0]


def test_a_changed_setting_is_never_mixed_and_the_old_is_kept(notebook, tmp_path):
    runs = tmp_path / "runs"
    run_jobs([job(notebook)], runs, announce=lambda _: None)
    run_jobs([job(notebook, settings="2")], runs, announce=lambda _: None)
    assert json.loads((runs / "a" / "000-of-001" / "manifest.json").read_text())["identity"]["settings"] == "2"
    assert (runs / "superseded" / "a" / "000-of-001.0" / "metrics.csv").exists()
    run_jobs([job(notebook, shard=(i, 2)) for i in range(2)], runs, announce=lambda _: None)
    assert sorted(p.name for p in (runs / "a").iterdir()) == ["000-of-002", "001-of-002"]
    assert len(table(runs)) == 6


@pytest.mark.parametrize(("mode", "words"), [("raise", "it went wrong"), ("die", "Kernel died")])
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


def test_a_folder_that_cannot_be_written_is_reported_not_raised(notebook, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".work").write_text("a file where a folder should be")
    outcome = run_job(job(notebook), tmp_path / "runs")
    assert outcome.status == "failed" and "Error" in outcome.reason


def test_a_lock_keeps_others_out_and_dies_with_its_owner(notebook, tmp_path):
    path = tmp_path / "lock"
    with job_lock(path) as mine:
        assert mine
        with job_lock(path) as other:
            assert not other
        assert path.exists()
    assert not path.exists()
    path.write_text(json.dumps({"pid": 2**22 + 1, "host": __import__("socket").gethostname()}))
    with job_lock(path) as mine:
        assert mine


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_batch import job
from ttt_lib.batch import run_jobs
if __name__ == "__main__":
    jobs = [job({notebook!r}, name, (i, 2), pause=0.3) for name in ("a", "b") for i in range(2)]
    outcomes = run_jobs(jobs, {runs!r}, workers={workers})
    sys.exit(0 if all(o.status in ("done", "skipped") for o in outcomes) else 1)
"""


def start(notebook, tmp_path, runs, workers=1) -> subprocess.Popen:
    path = tmp_path / f"run{workers}.py"
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parent), notebook=notebook, runs=str(runs), workers=workers))
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)  # fmt: skip


@pytest.mark.slow
def test_killed_at_several_moments_and_resumed_gives_the_same_tables(notebook, tmp_path):
    assert start(notebook, tmp_path, tmp_path / "whole").wait(180) == 0
    runs = tmp_path / "killed"
    for moment in (2.0, 5.0, 8.0):
        process = start(notebook, tmp_path, runs)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for folder in runs.glob("[ab]/*-of-*"):  # whatever is there is whole
            assert (folder / "manifest.json").exists() and (folder / "metrics.csv").exists()
    process = start(notebook, tmp_path, runs)
    assert process.wait(180) == 0, process.stdout.read()
    pd.testing.assert_frame_equal(table(runs), table(tmp_path / "whole"))
    assert not list((runs / ".work").iterdir()) and not list((runs / ".locks").iterdir())


@pytest.mark.slow
def test_two_runs_on_one_folder(notebook, tmp_path):
    both = [start(notebook, tmp_path, tmp_path / "runs") for _ in range(2)]
    for process in both:
        process.wait(180)
    assert start(notebook, tmp_path, tmp_path / "runs").wait(180) == 0
    assert len(table(tmp_path / "runs")) == 12 and not (tmp_path / "runs" / "superseded").exists()


@pytest.mark.slow
def test_two_and_four_workers_give_the_tables_of_one(notebook, tmp_path):
    tables = []
    for workers in (1, 2, 4):
        process = start(notebook, tmp_path, tmp_path / str(workers), workers)
        assert process.wait(240) == 0, process.stdout.read()
        tables.append(table(tmp_path / str(workers)))
        if workers > 1:
            assert "dashboard: http" in process.stdout.read()
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2])
