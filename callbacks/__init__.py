"""Callbacks, one module per training framework."""
