"""Files of this program's own: checkpoints and the atomic folder they are written through."""
