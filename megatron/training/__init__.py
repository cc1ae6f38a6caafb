"""The training program: run configuration, flags, the loop, evaluation, metrics, checkpoints of a run."""
