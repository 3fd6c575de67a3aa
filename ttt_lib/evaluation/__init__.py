"""Predictions against truth: scores, their differences between runs, and what a gate's thresholds gave.

Comes in: a `Prediction` and a `Sample` with truth; or tables of scores of many.
Goes out: `scores`: the twelve metrics of the study, aligned as MoGe's evaluation aligns; `paired`: gains with intervals;
`calibration`: thresholds of the gate that are safe on scenes they were not chosen on; `zero_shot`: models beside controls.

May import: core, geometry, data, models, views, adaptation.
Start reading at `scores.py`.
"""
