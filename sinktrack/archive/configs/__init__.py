"""Saved configurations, as transformers' own."""
