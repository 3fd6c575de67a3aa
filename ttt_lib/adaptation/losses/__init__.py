"""Terms of the loss between a student's output and the carried target."""
