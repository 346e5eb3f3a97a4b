"""Training FACE-net: configuration, losses (30)-(32), data, checkpoints and the trainer."""
