"""Targets: where a rewritten program goes."""
