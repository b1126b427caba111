"""Kills a process at every step that it takes in the file system, to see what it leaves."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm.auto import tqdm

__all__ = ["killed_at_each_step", "killed_in_each_write"]

# Audit events before which a process may be killed: each makes, renames, cuts or removes a file or folder.
STEPS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "ctypes.dlsym",
)

_SECONDS = 60


def killed_at_each_step(action: Callable[[], object], folder: Path) -> Iterator[int]:
    """Run `action` in copies of this process, the n-th of which is killed before its n-th step in `folder`.

    Yields after each death, so that the caller can look at `folder` and put it in order again. The last copy has no
    step left to die before: it must end well, and what it made stands there when the iteration ends.
    """
    for number in itertools.count():
        if not _died(action, _before_step(number, str(folder))):
            return
        yield number


def killed_in_each_write(action: Callable[[], object], sizes: tuple[int, ...]) -> Iterator[int]:
    """Run `action` in copies of this process that are killed as soon as a file grows beyond so many bytes."""
    for size in sizes:
        if _died(action, lambda size=size: _at_size(size)):
            yield size


def _died(action: Callable[[], object], prepare: Callable[[], None]) -> bool:
    child = os.fork()
    if not child:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            tqdm.set_lock(threading.RLock())  # its own is shared with this process, and would stay locked
            prepare()
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, -signal.SIGKILL, -signal.SIGXFSZ), f"the copy failed with {code}"
            return code != 0
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the copy did not end in {_SECONDS} s")


def _before_step(number: int, folder: str) -> Callable[[], None]:
    left = iter(range(number, -1, -1))

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in STEPS or not _concerns(event, arguments, folder):
            return
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def _concerns(event: str, arguments: tuple[object, ...], folder: str) -> bool:
    if event == "ctypes.dlsym":
        return arguments[1] == "renameat2"
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return False
    # A name without a folder is relative to an open one, as rmtree has it.
    paths = [os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, os.PathLike))]
    return any(path.startswith(folder) or not path.startswith("/") for path in paths)


def _at_size(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
