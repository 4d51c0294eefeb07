"""Dashboards: one module per service."""
