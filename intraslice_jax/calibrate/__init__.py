"""Calibration: text to token windows, and the statistics that pruning takes from them."""
