"""The command `effpass`. Each command lives in a module of its own and imports what it needs when it runs."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line given in `sys.argv`; exit code 0, 1 for an error, 2 for wrong usage."""
    from effpass.cli.app import app

    app(prog_name="effpass")
