"""Training: the state, the step, its lifting to many devices, checkpoints, the loop and its log."""
