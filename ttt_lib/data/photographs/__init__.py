"""Several photographs of one scene: points whose depth is known up to one scale, from the photographs alone.

Unfinished, and no command uses this room yet. What is here: features, verified matches, reconstructions that must agree,
and their tracks and signals as a `scene.Scene`, with one sentence in `refused` where the photographs tell nothing.
A scene enters by `load.load_scene`: photographs as a list or a folder, with EXIF's focal length; a clip; a finished COLMAP
model; a `transforms.json`, by whose cameras tracks are triangulated. It leaves by `writers`, in both of these formats.
`groups` gives the photographs of a sample's scene from a set.

Known: forward motion is refused or doubtful, and small scenes may be refused. Wrongly accepted: a given focal length
far from the truth that runs away in refinement, and flat posters.

pycolmap runs in a process of its own (`worker.py`): its seeds and logs stay there, a crash of it ends one job, and the
libraries inside it do not meet those of Pillow (loaded together, the PNG encoder of one writes over the other's memory).
Start reading at `scene.py`, then `load.py` and `reconstruct.py`.
"""
