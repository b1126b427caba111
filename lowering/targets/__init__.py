"""Targets: the file formats that a rewritten program can be exported to."""
