"""Several photographs of one scene: points whose depth is known up to one scale, from the photographs alone.

Comes in: photographs (paths or tensors), a folder, a clip, a finished COLMAP model or a `transforms.json` (`load.py`).
Goes out: a `scene.Scene`: photographs with their cameras and tracks, signals, who was left out and why, and, where the
photographs tell nothing, one sentence in `refused`. A scene that cannot be reconstructed is no error; bad input is.

pycolmap runs in a process of its own (`worker.py`): its seeds and logs stay there, a crash of it ends one job, and the
libraries inside it do not meet those of Pillow (loaded together, the PNG encoder of one writes over the other's memory).
Start reading at `scene.py`, then `load.py` and `reconstruct.py`.
"""
