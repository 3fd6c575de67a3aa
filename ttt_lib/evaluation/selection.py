GROUPS = ("hard", "random", "easy")
CONTROLS = ("original", "control_lr0", "control_random_weights", "tta")
