"""Checkpoint formats: reading and writing other frameworks' model files."""
