"""Rewrites: one file, one method; `weights`, `graph` and `runtime` by where a pass can act."""
