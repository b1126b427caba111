"""What commands write: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from effpass.core.errors import EffpassError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "hide_bars",
    "megabytes",
    "print_error",
    "print_json",
    "progress",
    "quiet_libraries",
    "stderr",
    "stdout",
    "step",
]

# Packages that effpass does not depend on, and the extra that installs them.
_EXTRAS = {"transformers": "hf", "peft": "hf", "accelerate": "hf", "gguf": "hf", "psutil": "hf", "trl": "grpo"}

NOISY_LOGGERS = (
    "torch",
    "torch.onnx",
    "torch.utils._pytree",
    "torchao",
    "onnxscript",
    "onnx_ir",
    "peft",
    "accelerate",
    "huggingface_hub",
)

# Width of tables in files and pipes, where no terminal says one.
_WIDTH = 110


def stdout() -> Console:
    """Where results go."""
    return _console(to_stderr=False)


def stderr() -> Console:
    """Where progress and errors go."""
    return _console(to_stderr=True)


def _console(*, to_stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if to_stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH
    return Console(stderr=to_stderr, width=width, highlight=False)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=2, default=str))


def print_error(error: Exception) -> None:
    """One message on stderr, without a traceback."""
    from rich.text import Text

    inner = getattr(error, "inner_exception", None)  # torch.compile wraps what a backend raises
    error = inner if isinstance(inner, EffpassError) else error
    if isinstance(error, EffpassError):
        message, hint = error.message, error.hint
    elif isinstance(error, OSError) and error.strerror:
        message, hint = f"{error.filename or 'the operating system'}: {error.strerror}", None
    elif isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        message, hint = (
            f"this needs {error.name}, which is not installed",
            f"pip install 'effpass[{_EXTRAS[error.name]}]'",
        )
    else:
        message = f"unexpected {type(error).__name__}: {error}"
        hint = "`effpass --debug ...` shows where it came from"
    text = Text.assemble(("error: ", "bold red"), message)
    if hint is not None:
        text.append(f"\n  → {hint}", style="dim")
    stderr().print(text, soft_wrap=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Tell on stderr what is going on: a spinner on a terminal, a line before and after elsewhere."""
    console = stderr()
    if console.is_terminal:
        with console.status(f"{what} …"):
            yield
        return
    console.print(f"{what} …", markup=False)
    started = time.perf_counter()
    yield
    console.print(f"{what}: {time.perf_counter() - started:.1f} s", markup=False)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """For work that announces its own steps: call the yielded function at the start of each."""
    console = stderr()
    if not console.is_terminal:
        yield lambda what: console.print(f"{what} …", markup=False)
        return
    with console.status("") as status:
        yield lambda what: status.update(f"{what} …")


def quiet_libraries() -> None:
    """Keep the warnings of other libraries from the terminal."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def hide_bars() -> None:
    """Turn off the progress bars of other libraries, downloads included; before they are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")


def megabytes(count: int | float) -> str:
    """``"513.1 MB"``, in units of 10⁶ bytes; small amounts in bytes."""
    return f"{count / 1e6:,.1f} MB" if abs(count) >= 1e5 else f"{count:,} bytes"
