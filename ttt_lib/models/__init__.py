"""Networks behind one interface: load by name, predict, run with gradients, choose what trains, undo.

Comes in: a name (`tiny`, a hub name, a file or folder, `FAMILY:REST`) and images (B,3,H,W) in [0,1].
Goes out: a `base.GeometryModel`, whose `predict` gives a `core.types.Prediction` and whose `forward` gives raw outputs
with gradients. `pretraining/` is how the bundled model was made.

May import: core, geometry, data. Knows nothing of views or of adapting.
Start reading at `base.py` (the interface), then `moge.py` (two families and how they are registered).
"""

from ttt_lib.models.torchvision import hide_broken_torchvision

hide_broken_torchvision()  # before transformers looks for one
