"""Floor 0: processes, checkpoints, the training run, logging, arguments. Imports nothing from the floors above."""
