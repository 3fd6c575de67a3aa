"""Label-free signals, and the decision that a calibration makes of them."""
