"""Several photographs of one scene: points whose depth is known up to one scale, from the photographs alone.

Comes in (`load.load_scene`): a list or a folder of photographs (`sources`, `exif`), a clip (`clips`), or cameras that
somebody computed (`known`): a COLMAP model (`colmap_files`, `colmap`) or a `transforms.json` (`transforms`), put beside
their photographs (`beside`) and turned with them (`upright`).
Goes out: a `scene.Scene`, cameras and tracks with their signals, and one sentence in `refused` where the photographs tell
nothing. `stereo` measures depth between the tracks; `writers` give a scene to other programs.

In between, `reconstruct` writes small gray pictures and lets another process (`apart`) do a `job`, in this order:
`features` (SIFT, verified matches), `matching` (copies and strangers are left out), `focal` (what is believed of the focal
length), `mapping` (pycolmap's reconstructions), `agreement` (several must agree), `signals` (what they are worth, which
observations become tracks); with known cameras `triangulation` in place of the last four.

Known: two photographs without any focal length are often refused, since their depth hangs on it; a given one that is
wrong by half misleads them where several fit as well, which three photographs do not let happen. Frames of a drive may
be refused for contradictions. Distortion of the lens is not modelled.
Start reading at `scene.py`, then `load.py` and `reconstruct.py`.
"""
