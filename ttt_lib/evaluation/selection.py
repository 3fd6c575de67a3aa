GROUPS = ("hard", "random", "easy")
CONTROLS = ("original", "control_lr0", "control_random_weights", "control_random_prediction", "tta")
