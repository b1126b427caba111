"""Starts the processes of one group, and waits for all of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["start_ranks", "told_by_ranks"]


def start_ranks(command: Sequence[str], world: int, **env: str) -> tuple[list[int], str]:
    """Run a Python script in `world` processes, each with its RANK, which find one another on this machine.

    Args:
        command: the script and its arguments.
        world: how many.
        env: more of the environment.

    Returns:
        What the processes returned, by rank, and what all of them printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0", **env}
    common["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), common.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "\n".join(outputs)


def told_by_ranks(script: Path, folder: Path, world: int, *arguments: str, **env: str) -> list[Any]:
    """What each of `world` processes of a script, which all come to a good end, leaves in its RANK.json of a folder."""
    returned, output = start_ranks([str(script), str(folder), *arguments], world, **env)
    assert returned == [0] * world, output[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
