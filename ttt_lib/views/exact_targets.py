"""What a wrong target costs, measured: views of procedural scenes beside the exact geometry that their cameras see.

A student that sees a view perfectly ought to have no loss. `score_targets` gives it the exact geometry of the view and
takes the loss to the target that was carried there: what is left is the fault of the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pandas as pd
import torch
from moge.utils.alignment import align_points_scale_z_shift
from torch import Tensor
from torch.nn import functional as F

from ttt_lib.core.schema import ViewConfig
from ttt_lib.data.scenes.generate import make_scenes, place_cameras
from ttt_lib.data.scenes.raycast import Picture, Scenes, draw, make_atlas
from ttt_lib.data.scenes.textures import make_textures
from ttt_lib.geometry.cameras import MIRROR, mirror_intrinsics, mirror_points, rotation_between, unproject
from ttt_lib.views.carry import View
from ttt_lib.views.draw import make_views
from ttt_lib.views.renderer import NovelViewRenderer

FAR = 20.0  # the sky, relative to the farthest surface, where a target claims that there is something
ALIGN = 10  # points a side that the alignment uses; its cost grows with the fourth power
WRONG = 0.05  # a point further off than this, relative to its depth, is wrong

_STILL = {"photometric": {"severity": 0}}
_MIRROR = {"mirror": 1.0, "crop": {"probability": 0.0}}
_CROP = {"mirror": 0.0, "crop": {"scale": (0.5, 0.5)}}
_NOVEL = {
    "mirror": 0.0,
    "crop": {"probability": 0.0},
    "novel_view": {"probability": 1.0, "severity": 4, "minimum_known": 0.0},
}

# name: (what the views do, how the target is made)
TARGETS = {
    "mirror, x negated": (_MIRROR, "right"),
    "mirror, x kept (the release)": (_MIRROR, "keeps x"),
    "crop, recentred": (_CROP, "right"),
    "crop, plain (as published)": ({**_CROP, "crop": {**_CROP["crop"], "kind": "plain"}}, "off centre"),
    "novel view, masked": (_NOVEL, "right"),
    "novel view, no mask": (_NOVEL, "no mask"),
}


@dataclass
class ExactScene:
    """One procedural scene: its solids, the camera of the original picture (1,4,4) and that picture (batch of 1)."""

    scenes: Scenes
    world: Tensor
    picture: Picture


@lru_cache(maxsize=16)
def exact_scene(kind: str, seed: int, size: tuple[int, int] = (120, 160)) -> ExactScene:
    """A scene of `data.scenes.generate.KINDS` from a seed, drawn at `size` (H, W)."""
    scenes, places = make_scenes([kind], seed, _atlas())
    world, intrinsics = place_cameras([kind], places, seed, size[1] / size[0])
    return ExactScene(scenes, world, draw(scenes, world, intrinsics, size))


@lru_cache(maxsize=1)
def _atlas() -> list[Tensor]:
    return make_atlas(make_textures(0))


def truth_of(scene: ExactScene, view: View) -> Tensor:
    """What the views' cameras see of the scene, drawn anew: points (B,h,w,3), NaN for the sky."""
    result = []
    for transform, intrinsics in zip(view.transform, view.intrinsics):
        mirrored = bool(torch.linalg.det(transform[:3, :3]) < 0)
        if mirrored:
            transform, intrinsics = MIRROR @ transform, mirror_intrinsics(intrinsics)
        size = tuple(view.image.shape[-2:])
        points = draw(scene.scenes, (transform @ scene.world[0])[None], intrinsics[None], size, shadows=False).points[0]
        result.append(mirror_points(points) if mirrored else points)
    return torch.stack(result)


def target_views(scene: ExactScene, name: str, count: int, seed: int = 0) -> tuple[View, Tensor]:
    """`count` views with the target made as `TARGETS[name]` says, and what a perfect student says of them, (B,h,w,3).

    The student knows the view's exact geometry. Like MoGe, it takes the view for a picture whose centre is on the
    optical axis; of a plain crop, whose centre is not, it therefore sees the geometry turned. "no mask" draws the
    mesh uncut, so that every pixel has a target.
    """
    config, how = TARGETS[name]
    picture = scene.picture
    renderer = NovelViewRenderer("torch", edge_rtol=1e6 if how == "no mask" else 0.04)
    view = make_views(
        picture.image[0], picture.points[0], picture.mask[0], picture.intrinsics[0], ViewConfig(**_STILL, **config),
        count, torch.Generator().manual_seed(seed), renderer, mirror_keeps_x=how == "keeps x",
    )  # fmt: skip
    points = truth_of(scene, view)
    sky = torch.isnan(points[..., 2])
    far = FAR * torch.where(sky, 0.0, points[..., 2]).amax((1, 2), keepdim=True)
    points = torch.where(sky[..., None], unproject(far.expand_as(points[..., 2]), view.intrinsics), points)
    if how == "off centre":
        axis = torch.tensor([0.0, 0.0, 1.0])
        centre = torch.linalg.inv(view.intrinsics) @ torch.tensor([0.5, 0.5, 1.0])
        points = points @ rotation_between(centre, axis.expand_as(centre))[:, None].mT
    return view, points


def score_targets(student: Tensor, target: Tensor) -> dict[str, Tensor]:
    """How far a perfect student is from its target, after the alignment (scale and z-shift) that the loss makes.

    student (B,h,w,3), target (B,h,w,3) with NaN where unknown. Each value is (B,): `known` share of the pixels; `loss`,
    the affine-invariant one of MoGe (CVPR 2025), mean over pixels and axes of |s p + t - q| / z; `error`, mean over the
    known pixels of the distance |s p + t - q| / z; `wrong`, the share of known pixels where that is above `WRONG`.
    """
    known = torch.isfinite(target).all(-1)
    q = torch.where(known[..., None], target, 0.0)

    def few(maps: Tensor) -> Tensor:
        return F.interpolate(maps.movedim(-1, 1), (ALIGN, ALIGN), mode="nearest-exact").flatten(2).mT

    weight = few(known[..., None].float())[..., 0] / few(q)[..., 2].clamp_min(1e-2)
    scale, shift = align_points_scale_z_shift(few(student), few(q), weight, trunc=1.0)
    offset = (scale[:, None, None, None] * student + shift[:, None, None] - q) / q[..., 2:].clamp_min(1e-6)
    offset, count = torch.where(known[..., None], offset, 0.0), known.sum((1, 2))
    distance = offset.norm(dim=-1)
    return {
        "known": known.float().mean((1, 2)),
        "loss": offset.abs().mean((1, 2, 3)),
        "error": distance.sum((1, 2)) / count,
        "wrong": (distance > WRONG).sum((1, 2)) / count,
    }


def compare_targets(scenes: list[tuple[str, int]], count: int = 4) -> pd.DataFrame:
    """`score_targets` for every entry of `TARGETS` over scenes (kind, seed): a row a view, columns target, scene and
    the scores."""
    rows = []
    for kind, seed in scenes:
        scene = exact_scene(kind, seed)
        for name in TARGETS:
            view, student = target_views(scene, name, count, seed)
            scores = {key: value.tolist() for key, value in score_targets(student, view.points).items()}
            rows.append(pd.DataFrame({"target": name, "scene": f"{kind} {seed}", **scores}))
    return pd.concat(rows, ignore_index=True)
