"""The training pipeline: data, optimizer, loop, checkpoints, logging. It never asks which stage."""
