"""Several photographs of one scene: points whose depth is known up to one scale, from the photographs alone.

Goes out: a `scene.Scene`, cameras and tracks from features, verified matches and reconstructions that must agree, with their
signals, and one sentence in `refused` where the photographs tell nothing; `stereo` measures depth between the tracks.
A scene enters by `load.load_scene`: photographs as a list or a folder, with EXIF's focal length; a clip; a finished COLMAP
model; a `transforms.json`, by whose cameras tracks are triangulated. It leaves by `writers`, in both of these formats.
`groups` gives the photographs of a sample's scene from a set.

Known: two photographs without any focal length are often refused, since their depth hangs on it; a given one that is
wrong by half misleads them where several fit as well, which three photographs do not let happen. Frames of a drive may
be refused for contradictions. Distortion of the lens is not modelled.

pycolmap runs in a process of its own (`worker.py`): its seeds and logs stay there, a crash of it ends one job, and the
libraries inside it do not meet those of Pillow (loaded together, the PNG encoder of one writes over the other's memory).
Start reading at `scene.py`, then `load.py` and `reconstruct.py`.
"""
