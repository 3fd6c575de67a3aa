"""The method: train the student on views of one image, predict, decide, and put the weights back bit by bit.

Comes in: a model, an image (3,H,W), an `ExperimentConfig`, perhaps known distances.
Goes out: `result.AdaptResult`: predictions before and after, the decision with its reason, the history of the loss.
`photographs/` does the same for several photographs of a scene at once. `losses/` are the terms, `gate/` the decision without
truth, `ensemble` the mean over predictions of one network, `methods/` what other papers add, by name.

May import: core, geometry, data, models, views.
Start reading at `adapter.py` (one image from beginning to end), then `loop.py` (the steps).
"""
