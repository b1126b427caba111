"""``python -m effpass``: the same as the command ``effpass``."""

from effpass.cli import main

if __name__ == "__main__":
    main()
