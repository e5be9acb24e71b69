"""Parts that all trainers share: the loop of steps, optimiser, checkpoints, state, monitors."""
