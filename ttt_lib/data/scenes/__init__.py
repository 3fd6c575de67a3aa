"""The procedural world: `layouts` of `solids` with `textures` and `detail`, seen by a ray caster (`raycast`).

`generate` makes scenes, single pictures and sets of them, clean and shifted; `tours` show one scene from several places,
`failures` are tours that deceive a reconstruction.
"""
