"""Building blocks: configuration, model, data, optimizers, checkpoints. Never imports `megatron.training`."""
