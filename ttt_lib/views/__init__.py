"""What the student sees: crops, mirrors, colours, other cameras; the target carried into each, with its mask.

Comes in: an image (3,H,W), its point map (H,W,3), its camera, and the section `views` of the configuration.
Goes out: `carry.View`, a batch of pictures with points in their own cameras, unknown where nobody has seen anything;
and the way back, `carry.carry_back`. `renderer` draws the point map from another camera, by torch or by pyrender.

May import: core, geometry, data. Not models: a view needs a point map, not a network.
Start reading at `draw.py`, where one function draws a batch.
"""
