"""Checkpoints on disk: find them, and get their weights. Checkpoints are untrusted input."""
