"""Merge language-model checkpoints on Ray."""
