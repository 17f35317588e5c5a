"""``fastattn bench --models``: training steps and inference of whole models."""
