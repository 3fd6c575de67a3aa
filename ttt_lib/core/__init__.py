"""What every room stands on: what travels, what is configured, what is named, what goes wrong.

Comes in: YAML and JSON that people write; names of losses, shifts and models.
Goes out: `types.Sample` and `types.Prediction`, which travel through all rooms; `config.ExperimentConfig`, validated;
`registry.LOSSES`, `SHIFTS` and `MODELS`, which name what other rooms fill in; `errors.UserError`, one sentence.

May import: no other room. Knows no geometry, no network and no file format of its own.
Start reading at `types.py`, then `schema.py`: every setting there is, with its meaning.
"""
