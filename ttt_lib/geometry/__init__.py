"""Cameras, warps and alignments: pure functions of tensors, tested against known answers and against MoGe's.

Comes in: depth (H,W), points (H,W,3), intrinsics (3,3) normalised by width and height, transforms (4,4).
Goes out: the same under another camera (`cameras`, `warp`), and the scale and shift that fit one point map to another
(`exact_alignment`: the optimum, for scores; `fast_alignment`: cheap and exact enough, for training).

May import: core. OpenCV camera: x right, y down, z forward; pixel centres at (i + 0.5).
Start reading at `cameras.py`; conventions stand in its docstring.
"""
