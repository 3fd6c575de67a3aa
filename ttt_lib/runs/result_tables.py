"""The tables of a run while it goes on: in memory, and on the disk as far as they are. `results.py` reads them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ttt_lib.adaptation.result import AdaptResult
from ttt_lib.core.files import replacing_file
from ttt_lib.core.types import KEYS, Sample
from ttt_lib.evaluation.scores import Scores, scores_of


def _append(rows: pd.DataFrame, path: Path | None, before: list[pd.DataFrame]) -> None:
    """Add rows to a CSV at once, so that a run that ends early keeps what it has.

    A sample may bring columns that none had before (signals after one that failed): then the file is written again.
    """
    if path is None or not len(rows):
        return
    known = list(dict.fromkeys(column for table in before for column in table.columns)) if path.exists() else []
    if not known or set(rows.columns) <= set(known):
        rows.reindex(columns=known or rows.columns).to_csv(path, mode="a", header=not known, index=False)
        return
    with replacing_file(path) as work:
        pd.concat([*before, rows], ignore_index=True).to_csv(work, index=False)


def scores_of_result(result: AdaptResult, sample: Sample) -> dict[str, Scores]:
    """Scores of what a result holds of `original`, `final`, `adapted` and `blended`; of the same prediction the same object."""
    held = {kind: getattr(result, kind) for kind in ("original", "final", "adapted", "blended")}
    different = {id(each): each for each in held.values() if each is not None}
    scores = {key: scores_of(each, sample) for key, each in different.items()}
    return {kind: scores[id(each)] for kind, each in held.items() if each is not None}


class ResultTables:
    """The tables of `core.types.KEYS`, in memory and, as they grow, as CSV files of a folder (None: no files)."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.parts = folder, {name: [] for name in KEYS}

    def add(self, **tables: pd.DataFrame) -> None:
        """Rows at the end of the tables of these names."""
        for name, rows in tables.items():
            _append(rows, self.folder / f"{name}.csv" if self.folder else None, self.parts[name])
            if len(rows):
                self.parts[name].append(rows)

    def leave_out(self, dataset: str, sample: str, why: str) -> None:
        """Note a sample that has no result."""
        self.add(left_out=pd.DataFrame([(dataset, sample, why)], columns=["dataset", "sample", "reason"]))

    def joined(self) -> dict[str, pd.DataFrame]:
        """Whole tables by name, empty ones without columns."""
        return {
            name: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame() for name, parts in self.parts.items()
        }
