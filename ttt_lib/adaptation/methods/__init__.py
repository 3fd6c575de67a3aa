"""Supervisions that an experiment names, in the order in which they are asked.

The teacher and the photographs are at home elsewhere and come first. `restraint` holds the weights near the original or
averages them, `statistics` works on batch normalisations, `random_change` is a control, and last: it changes what the others
gave. Importing this package registers them.
"""

from ttt_lib.adaptation.photographs import training  # noqa: I001  (the teacher first: it draws the views)
from ttt_lib.adaptation.methods import restraint, statistics
from ttt_lib.adaptation.methods import random_change

__all__ = ["random_change", "restraint", "statistics", "training"]
