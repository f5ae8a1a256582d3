"""Parallel-independent training: trainers without a common step, and a coordinator that merges what they report."""
