"""The training step of a small network as one call: :class:`TrainingStep`."""

from fastattn.training.step import TrainingStep

__all__ = ["TrainingStep"]
