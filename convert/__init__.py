"""Checkpoint formats: reading and writing other frameworks' model files."""

from intraslice_jax.convert.export import export
from intraslice_jax.convert.load import load

__all__ = ["export", "load"]
