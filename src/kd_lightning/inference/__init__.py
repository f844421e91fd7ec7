"""Inference with trained students, from run directories and exported files."""
