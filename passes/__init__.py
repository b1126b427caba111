"""Passes, one method per file, grouped by kind: `weights`, `graph` and `runtime` (see :mod:`effpass.core.pass_`)."""
