"""Passes that need a cache or a decode loop which effpass owns."""
