"""Checkpoints on disk: headers, ranges, output layout, writing."""
