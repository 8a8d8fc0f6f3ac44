"""Methods of the literature, for comparison: whole heads and channels leave, nothing is rotated inside a module."""
