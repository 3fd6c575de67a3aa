"""Samples and where they come from: files in MoGe's layout, photographs, the motorcycle, procedural scenes.

Comes in: a name, a folder, a file or a JSON of sets (`catalog.describe_sources`).
Goes out: a `samples.SampleSet`, whose `core.types.Sample`s are read when they are asked for; a damaged one is left out
with its reason. `shifts` turns clear weather into bad, `scenes/` draws the procedural world.

May import: core, geometry. Never a model: data is the same for all of them.
Start reading at `catalog.py` (which sets there are), then `samples.py`.
"""
