"""Diagnostics and figures."""
