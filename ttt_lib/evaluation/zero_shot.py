"""How good a model is before any adaptation, beside a constant plane and an untrained network."""

from __future__ import annotations

import pandas as pd
import torch

from ttt_lib.core.types import Prediction, Sample
from ttt_lib.data.catalog import open_dataset
from ttt_lib.data.samples import SampleSet
from ttt_lib.evaluation.scores import scores_of
from ttt_lib.geometry.cameras import unproject
from ttt_lib.models.base import GeometryModel

SHOWN = (("depth_scale_invariant", "delta1"), ("depth_affine_invariant", "delta1"), ("depth_affine_invariant", "rel"),
         ("points_affine_invariant", "delta1"))  # fmt: skip


def constant_plane(sample: Sample) -> Prediction:
    """The guess that looks at nothing: depth 1 everywhere, points on the rays of the true camera."""
    depth = torch.ones_like(sample.depth)
    return Prediction(unproject(depth, sample.intrinsics), depth, None, None, "scale_invariant")


def zero_shot_sets(count: int = 40) -> dict[str, SampleSet]:
    """Held-out scenes (clean), the same under shifts by severity, and the motorcycle."""
    shifted = open_dataset(kind="shifted", count=count)
    by_severity = {k: [name for name in shifted.names if name.endswith(f"_{k}")] for k in range(1, 6)}
    return {
        "held-out synthetic": open_dataset(kind="synthetic", count=count),
        **{f"shifted, severity {k}": shifted.only(names) for k, names in by_severity.items()},
        "motorcycle": open_dataset(kind="motorcycle"),
    }


def zero_shot_table(models: dict[str, GeometryModel], count: int = 40) -> pd.DataFrame:
    """Mean scores of each model and of the constant plane on each set: columns set, model, samples and the scores.

    An affine-invariant alignment gives the plane nothing to scale: its best fit is the weighted median depth.
    """
    rows = []
    for title, samples in zero_shot_sets(count).items():
        found: dict[str, list[dict[str, float]]] = {name: [] for name in [*models, "constant plane"]}
        for sample in samples.readable():
            predictions = {name: model.predict(sample.image) for name, model in models.items()}
            predictions["constant plane"] = constant_plane(sample)
            for name, prediction in predictions.items():
                scores = scores_of(prediction, sample)
                found[name].append({f"{metric} {score}": scores[metric][score] for metric, score in SHOWN})
        for name, values in found.items():
            rows.append({"set": title, "model": name, "samples": len(values), **pd.DataFrame(values).mean().to_dict()})
    return pd.DataFrame(rows)
