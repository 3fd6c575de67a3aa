"""Several photographs of one scene: points whose depth is known up to one scale, from the photographs alone.

Comes in (`load.load_scene`): a list or a folder of photographs (`sources`), a clip (`clips`), or cameras that somebody
computed (`known`), a COLMAP model (`colmap_files`, `colmap`) or a `transforms.json` (`transforms`), with their photographs
(`by_name`), which may be stored turned (`upright`) and are read without the distortion of those cameras' lenses (`undistort`).
Goes out: a `scene.Scene`, cameras and tracks with their signals, and one sentence in `refused` where the photographs tell
nothing. `stereo` matches two photographs, `measured` says what depth follows; `writers` give a scene to other programs.

In between, `reconstruct` writes small gray pictures and has another process, with pycolmap in it, do a `job.Job`:
1. `matching`: features and verified matches; copies and photographs of something else are left out;
2. `focal`: what can be believed of the focal length, by reconstructions with several (`mapping` has pycolmap make each);
   `distortion`: whether the lens bends straight lines, which would be taken for a part of it;
3. `agreement`: one reconstruction that two others confirm, or with known cameras points that fit to the matches;
4. `signals`: what that is worth, and which observations become tracks.

Known: two photographs without any focal length are often refused, since their depth hangs on it; a given one that is
wrong by half misleads them where several fit as well, which three photographs do not let happen. Frames of a drive may
be refused for contradictions. Where the cameras are not given, two photographs do not tell the distortion of their lens, and
three and more one number of it (radial, of COLMAP's SIMPLE_RADIAL): of a fisheye lens that is too little.
Start reading at `scene.py`, then `load.py` and `reconstruct.py`.
"""
