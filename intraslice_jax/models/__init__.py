"""The decoder: one definition for every family, dense or pruned."""
