"""Adaptation to several photographs of one scene: their tracks correct, train and decide.

In: a model, a `Scene` of `data/photographs` (cameras, tracks, and depth measured between them), an experiment with a
section `supervision.photographs`. Out: of each photograph an `AdaptResult`, all in one scale.
What a photograph knows and what that makes of a prediction: `evidence.py`; what the student learns: `training.py`; who
wins, by tracks that neither of these two has seen: `decision.py`. Start reading at `scene.py`, which puts them together.
"""
