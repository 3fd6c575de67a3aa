"""The procedural world: layouts of solids with textures, seen by a ray caster; sets of it, clean and shifted."""
