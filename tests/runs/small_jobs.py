"""Jobs without an experiment. Light: what is started only to be killed begins within a moment."""

from __future__ import annotations

import time

from ttt_lib.runs.jobs import Job


def job(notebook, name="a", shard=(0, 1), settings="1", threads=1, **parameters) -> Job:
    identity = {"settings": settings, "shards": str(shard[1])}
    samples = len(range(shard[0], 6, shard[1]))
    return Job(name, *shard, {"name": name, **parameters}, identity, (notebook,), samples, threads)


def write_without_kernel(self, notebook, output, parameters):
    """What the notebook does, row by row, in this process."""
    with open(output.parent / "metrics.csv", "w") as file:
        file.write("experiment,dataset,sample,prediction,metric,score,value\n")
        for i in range(parameters["shard_index"], 6, parameters["shard_count"]):
            time.sleep(parameters.get("pause", 0))
            file.write(f"{parameters['name']},set,s{i},final,depth_metric,rel,{(i * 37 % 11) / 11}\n")
            file.flush()
