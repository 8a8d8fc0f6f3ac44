"""What a pruning run needs, computed from a model's description alone."""
