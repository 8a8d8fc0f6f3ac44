"""Pruning: pure functions from weights and second moments to smaller weights, and the loop over layers."""
