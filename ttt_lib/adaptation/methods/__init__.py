"""Supervisions that an experiment names, in the order in which they are asked.

The teacher and the photographs are at home elsewhere and come first. `restraint` holds the weights near the original or
averages them, `statistics` works on batch normalisations. Importing this package registers them.
"""

from ttt_lib.adaptation.photographs import training  # noqa: I001  (the teacher first: it draws the views)
from ttt_lib.adaptation.methods import restraint, statistics

__all__ = ["restraint", "statistics", "training"]
