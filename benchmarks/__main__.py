"""``python -m benchmarks AREA [--device cuda] [--smoke] [--json FILE]``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

AREAS = (
    "adapters",
    "backend",
    "balance",
    "cost",
    "decode",
    "export",
    "kv_offload",
    "linear_attention",
    "moe",
    "optimizer",
    "prefix_kv",
    "pruning",
    "quality",
    "search",
    "sparse_attention",
    "speculative",
    "training",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("area", choices=AREAS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--smoke", action="store_true", help="tiny models and few repetitions: does it run at all")
    parser.add_argument("--json", type=Path, help="append rows to this file, one JSON object a line")
    parser.add_argument("--case", action="append", help="only these cases")
    parser.add_argument(
        "--model", action="append", help="areas that take trained models: a folder, or a name under models/"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="areas that read texts: their folder (environment variable EFFPASS_DATA)",
    )
    arguments = parser.parse_args()
    if arguments.model:
        os.environ["EFFPASS_MODEL"] = ",".join(arguments.model)
    if arguments.data:
        os.environ["EFFPASS_DATA"] = str(arguments.data)

    from benchmarks.rows import write

    area = importlib.import_module(f"benchmarks.{arguments.area}")
    unknown = set(arguments.case or ()) - set(area.CASES)
    if unknown:
        parser.error(f"unknown case {sorted(unknown)[0]!r}; cases of {arguments.area}: {', '.join(area.CASES)}")
    for name in arguments.case or area.CASES:
        for row in area.CASES[name](arguments.device, arguments.smoke):
            write(row, arguments.json)  # at once: what was measured stays, whatever comes after
    return 0


if __name__ == "__main__":
    sys.exit(main())
