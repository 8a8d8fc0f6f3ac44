"""Structured pruning of language models with IntraSlice, in JAX."""
