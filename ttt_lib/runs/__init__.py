"""Experiments over sets of samples: one in a notebook, many as papermill jobs on cores, GPUs and hosts.

Comes in: names of experiments, a profile, sets of samples, a folder for the results.
Goes out: a folder a job: the executed notebook, tidy CSV files, a manifest with the identity of everything the result
depends on. A killed run goes on where it was; a changed setting never mixes with old results.

May import: every room but report.
Start reading at `experiment.py` (one experiment), then `plan.py` and `jobs.py` (all of them).
"""
