"""Measuring what was trained: one checkpoint, or several methods side by side."""
