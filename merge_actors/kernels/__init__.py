"""Compiled kernels: the hot formulas of `methods` in one pass over the inputs, with the same bits."""
