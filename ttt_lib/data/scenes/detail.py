"""Fine structure on the surfaces of a scene, as matching needs it: grain, bricks, planks, print and pictures.

Everything is a function of the place on the surface (solid, face, metres), so all cameras see the same. No pattern
repeats: values come from a table of random numbers by the cell's whole-numbered coordinates. What is finer than a pixel
fades out (cells are filtered by a box as wide as the pixel), so that near and far views agree.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ttt_lib.data.scenes.raycast import look_up
from ttt_lib.data.scenes.textures import TEXTURES

TABLE = 1 << 18  # random numbers
ROW = 162_013  # 2^18 over the golden ratio, odd: cells that share a number are some 500 cells apart
OCTAVES = [(1.6 * 0.55**k, 0.7 * k + 0.3) for k in range(12)]  # size of a cell (metres), angle of the grid (radians)
GRAIN = 0.45  # log brightness of one octave

# length and height of a unit (metres), half its joint, log brightness of units and of joints; the share of solids
COURSES = torch.tensor([
    [1.00, 1.000, 0.00, 0.0, 0.0],  # nothing but grain
    [0.24, 0.080, 0.04, 0.6, 0.9],  # bricks
    [0.35, 0.350, 0.02, 0.4, 1.0],  # tiles
    [1.30, 0.140, 0.02, 0.5, 0.8],  # planks
    [0.07, 0.045, 0.15, 1.2, 0.0],  # print
])  # fmt: skip
PICTURES = [i for i in range(TEXTURES // 8, TEXTURES) if i % 3 == 0]  # photographs of `make_textures`


def _turned(uv: Tensor, angle: float) -> Tensor:
    cosine, sine = np.cos(angle), np.sin(angle)
    return torch.stack([cosine * uv[:, 0] - sine * uv[:, 1], sine * uv[:, 0] + cosine * uv[:, 1]], -1)


class Detail:
    """The fine structure of one scene, from a seed; a `Scenes.detail`.

    atlas: of the scene, for its pictures. repeat: the period (metres) at which all of it comes again, for scenes that
    deceive matching (None: never). rays: along each side of a pixel, that are averaged by whoever draws.
    """

    def __init__(self, seed: int, atlas: list[Tensor], repeat: float | None = None, rays: int = 1) -> None:
        values = np.random.default_rng([seed, 4]).uniform(-1, 1, TABLE)
        self.table = torch.from_numpy(values).float()
        self.atlas, self.repeat, self.rays = atlas, repeat, rays

    def _value(self, cell: Tensor, start: Tensor) -> Tensor:
        """The random number in [-1, 1] of each whole-numbered cell (N,2), from `start` (N,)."""
        return self.table[(cell[:, 0] + ROW * cell[:, 1] + start) & (TABLE - 1)]

    def _mosaic(self, place: Tensor, start: Tensor, width: Tensor) -> Tensor:
        """Cells of size 1, each with its number, seen through a box `width` (N,) <= 1 wide: (N,2) -> (N,).

        With width 1 this is the bilinear interpolation of the numbers at the cells' middles.
        """
        edge = place.round()
        share = ((place - edge) / width[:, None] + 0.5).clamp(0, 1)
        cell = edge.long()
        base = cell[:, 0] + ROW * cell[:, 1] + start
        left, right = share[:, 0], share[:, 1]
        mask = TABLE - 1
        above = torch.lerp(self.table[(base - 1 - ROW) & mask], self.table[(base - ROW) & mask], left)
        below = torch.lerp(self.table[(base - 1) & mask], self.table[base & mask], left)
        return torch.lerp(above, below, right)

    def _grain(self, uv: Tensor, start: Tensor, span: Tensor) -> Tensor:
        """Log brightness of mosaics from 1.6 m down to what the pixel still shows, with crooked edges: (N,)."""
        total = torch.zeros_like(span)
        for k, (size, angle) in enumerate(OCTAVES):
            shown = torch.nonzero(span < 0.7 * size)[:, 0]
            if not len(shown):
                break
            ratio = span[shown] / size
            place = _turned(uv[shown] / size, angle)
            place = place + 0.22 * torch.sin(2.3 * place.flip(-1) + start[shown, None])
            value = self._mosaic(place, start[shown] + 7919 * k, ratio.clamp(0.15, 1.0))
            total[shown] += value * ((0.7 - ratio) / 0.4).clamp(0, 1)
        return GRAIN * total

    def _courses(self, uv: Tensor, start: Tensor, span: Tensor, kind: Tensor) -> Tensor:
        """Log brightness of bricks, tiles, planks or print by `kind` (N,), a row of `COURSES`: (N,)."""
        length, height, joint, units, joints = COURSES[kind].unbind(-1)
        row = (uv[:, 1] / height).floor()
        offset = self._value(torch.stack([row.long(), row.long() * 0], -1), start) * (kind > 2) + 0.5 * (row % 2)
        place = torch.stack([uv[:, 0] / length + offset, uv[:, 1] / height], -1)
        cell = place.floor()
        inside = (0.5 - (place - cell - 0.5).abs()) * torch.stack([length, height], -1)  # metres from the nearest edge
        value = self._value(cell.long(), start)
        value = torch.where(kind == 4, -(value > -0.3).float(), value)  # ink or none
        line = joint * height
        between = ((line - inside.amin(-1)) / span + 0.5).clamp(0, 1)
        fade = ((0.8 - span / height) / 0.5).clamp(0, 1)
        return fade * torch.lerp(units * value, -joints, between)

    def _pictures(self, albedo: Tensor, uv: Tensor, start: Tensor, span: Tensor, extent: Tensor) -> Tensor:
        """Upright pictures, at most one in each cell of a coarse grid, over the albedo (N,3) of upright faces."""
        size = extent.clamp(0.1, 4).sqrt() * 0.8
        place = uv / size[:, None]
        cell = place.floor()
        whole = cell.long()
        draws = [self._value(whole, start + 104_729 * k) * 0.5 + 0.5 for k in range(5)]
        half = 0.22 + 0.2 * torch.stack(draws[:2], -1)
        middle = 0.5 + (0.5 - half) * (torch.stack(draws[2:4], -1) * 2 - 1)
        inner = (place - cell - middle) / half * 0.5 + 0.5
        shown = torch.nonzero(((inner > 0) & (inner < 1)).all(-1) & (draws[4] < 0.55))[:, 0]
        if len(shown):
            which = torch.tensor(PICTURES)[(draws[4][shown] * 1e4).long() % len(PICTURES)]
            footprint = span[shown] / (2 * half[shown].amin(-1) * size[shown])
            near = (0.5 - (inner[shown] - 0.5).abs()).amin(-1, keepdim=True) < 0.03
            picture = look_up(self.atlas, which, inner[shown], footprint)
            albedo = albedo.index_copy(0, shown, torch.where(near, 0.03, picture))
        return albedo

    def __call__(self, albedo: Tensor, index: Tensor, face: Tensor, uv: Tensor, span: Tensor, extent: Tensor) -> Tensor:
        """The albedo (N,3) with fine structure: see `Scenes.detail`."""
        span = span / self.rays
        start = index * 7_907 + face * 51_431
        draw = self.table[start & (TABLE - 1)] * 0.5 + 0.5
        kind = (draw * len(COURSES)).long().clamp_max(len(COURSES) - 1)
        if self.repeat:
            uv = uv % self.repeat
        upright = torch.nonzero((face != 1) & (extent > 0.08))[:, 0]
        pictures = self._pictures(albedo[upright], uv[upright], start[upright], span[upright], extent[upright])
        albedo = albedo.index_copy(0, upright, pictures)
        scale = extent.clamp(0.06, 1.0)
        total = self._grain(uv, start, span) + self._courses(uv / scale[:, None], start, span / scale, kind)
        return (albedo.clamp(0.04, 0.9) * total.clamp(-1.8, 1.3)[:, None].exp()).clamp(0, 1)
