"""``python -m benchmarks.lanes FOLDER QUEUE...``: many benchmarks side by side on the GPUs of a machine.

A queue is a file whose name is ``NAME@GPU``, or ``NAME.COUNT@GPU`` for COUNT jobs at a time, or ``NAME@GPU,GPU`` for
jobs on several GPUs, which should have them for themselves. Its lines are jobs: a name, a limit in seconds and a
command for bash, in which ``$ROWS`` is a file for the job's rows; or ``need`` with the names of other jobs, for which
the queue waits that long::

    fit|120|python -m benchmarks moe --device cuda --case fit --json $ROWS
    -|300|need decode
    mixtral|200|EFFPASS_TOKENS=128 python -m benchmarks moe --device cuda --case mixtral-8x7b --json $ROWS

While a job times something, all other jobs of its GPU are stopped (:mod:`benchmarks.alone`). FOLDER gets ``rows/``,
``log/``, and ``status``, which also goes to the terminal. Lines that are added to a queue while it runs are run too.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.alone import LANE, go_on, nothing_timed

__all__ = ["run"]


class _Queue:
    """The lines of a file, handed out to its threads."""

    def __init__(self, path: Path) -> None:
        self.path, self.taken, self.lock = path, 0, threading.Lock()
        name, _, gpus = path.name.partition("@")
        self.gpus = gpus.split(",")
        self.threads = int(name.partition(".")[2] or 1)
        self.waits_since: float | None = None

    def take(self, done: set[str]) -> tuple[str, float, str] | bool | None:
        """A job's name, limit and command; True to come again, as another job is needed first; None at the end."""
        with self.lock:
            lines = [line for line in self.path.read_text().splitlines() if line.strip() and not line.startswith("#")]
            while self.taken < len(lines):
                name, limit, command = lines[self.taken].split("|", 2)
                if command.startswith("need "):
                    self.waits_since = self.waits_since or time.monotonic()
                    if not done.issuperset(command.split()[1:]) and time.monotonic() < self.waits_since + float(limit):
                        return True
                self.taken, self.waits_since = self.taken + 1, None
                if not command.startswith("need "):
                    return name, float(limit), command
            return None


def run(folder: Path, queues: list[Path]) -> int:
    """Run all queues to their ends.

    Args:
        folder: folder for rows, logs and the status.
        queues: files as above.

    Returns:
        The number of jobs that failed or were ended at their limit.
    """
    for name in ("rows", "log"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    done: set[str] = set()
    failed: list[str] = []
    began = time.monotonic()

    def say(text: str) -> None:
        line = f"{time.monotonic() - began:6.0f} s  {text}"
        print(line, flush=True)
        with (folder / "status").open("a") as status:
            status.write(line + "\n")

    def work(queue: _Queue) -> None:
        while (job := queue.take(done)) is not None:
            if isinstance(job, bool):
                time.sleep(0.2)
                continue
            name, limit, command = job
            say(f"begin {name}")
            started = time.monotonic()
            code = _run_job(folder, queue.gpus, name, limit, command)
            if code != 0:
                failed.append(name)
            done.add(name)
            say(f"{'end' if code == 0 else 'FAILED'} {name}: {code}, {time.monotonic() - started:.0f} s")

    threads = [threading.Thread(target=work, args=(q,)) for q in map(_Queue, queues) for _ in range(q.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(failed)


def _run_job(folder: Path, gpus: list[str], name: str, limit: float, command: str) -> int | str:
    """Exit code, or "limit"."""
    lanes = [folder / "lanes" / gpu for gpu in gpus]
    for lane in lanes:
        lane.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != LANE}
    environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "ROWS": str(folder.absolute() / "rows" / f"{name}.jsonl")}
    if len(lanes) == 1:
        environment[LANE] = str(lanes[0].absolute())
    with ExitStack() as stack, (folder / "log" / f"{name}.log").open("w") as log:
        for lane in lanes:
            stack.enter_context(nothing_timed(lane))
        process = subprocess.Popen(
            ["bash", "-c", command], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        files = [lane / str(process.pid) for lane in lanes]
        for file in files:
            file.touch()
    code: int | str = "limit"
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for file, lane in zip(files, lanes, strict=True):
        file.unlink()
        go_on(lane)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lanes", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("queue", type=Path, nargs="+")
    arguments = parser.parse_args()
    return min(run(arguments.folder, arguments.queue), 1)


if __name__ == "__main__":
    sys.exit(main())
