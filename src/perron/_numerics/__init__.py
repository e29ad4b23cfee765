"""Rounding, reductions per sample, and transforms of batches."""
