"""Checkpoint formats: reading and writing other frameworks' model files."""

from intraslice_jax.convert.export import export
from intraslice_jax.convert.load import load, open_stored

__all__ = ["export", "load", "open_stored"]
