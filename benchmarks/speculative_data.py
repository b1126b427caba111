"""Prompts of area `speculative`: five test sets, and prompts to learn drafts from that are in none of them.

``python -m benchmarks.speculative_data --data FOLDER -o prompts.jsonl`` writes the latter: GSM8K's training questions,
passages of `FOLDER/text` and `FOLDER/wikitext-2` to sum up or go on with, functions of the standard library to
complete, questions about its modules, and everyday tasks, each about many topics.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SETS", "test_prompts", "training_prompts"]

SETS = ("mt_bench", "humaneval", "gsm8k", "summarization", "qa")
_LONGEST = 1500  # characters of a passage
_TASKS = ("Summarize: {}", "Go on with this text:\n\n{}", "What is this text about?\n\n{}")
_QUESTIONS = (
    "What does Python's module {} do?",
    "When would you use Python's module {}? Give an example.",
    "Explain {} to somebody who has never programmed.",
)
_EVERYDAY = (
    "What is {}?",
    "Who knows most about {}, and how did they come to it?",
    "When did people first think about {}?",
    "Why does {} matter?",
    "How does {} work?",
    "Name three books about {}.",
    "Explain {} to a child of ten.",
    "Write a short story in which {} plays a part.",
    "Write a poem of eight lines about {}.",
    "Write an email to a colleague who asked about {}. Be polite and brief.",
    "Give me five tips that have to do with {}, as a numbered list.",
    "What are the advantages and disadvantages of {}?",
    "Plan a lesson about {} for a class of twelve-year-olds.",
    "You are an expert on {}. Introduce yourself and your work.",
    "Pretend to be a journalist and interview somebody about {}.",
    "Compare {} with something that is often confused with it.",
    "Write an outline of an essay about {}, with headings.",
    "Is it true that {} will be forgotten in a hundred years? Argue for both sides.",
    "Draft a speech of two minutes about {}.",
    "Write a Python function that has to do with {}, with an example of its use.",
    "Which numbers describe {} best, and how are they measured?",
    "Write a dialogue between two friends who disagree about {}.",
    "What would change for a small town without {}?",
    "Put the history of {} into a table with years and events.",
    "What should a beginner know about {}?",
)
_TOPICS = (
    "photosynthesis, inflation, volcanoes, the printing press, chess, jazz, vaccines, black holes, compost, "
    "democracy, earthquakes, the stock market, sleep, cheese, glaciers, electric cars, bees, the Roman Empire, "
    "recursion, gravity, coral reefs, coffee, marathons, public libraries, encryption, the moon, bread, opera, "
    "traffic lights, rainbows, antibiotics, knitting, the Silk Road, prime numbers, tides, trains, poetry, solar "
    "panels, dinosaurs, friendship, tea, bridges, the human heart, weather forecasts, football, sorting "
    "algorithms, oceans, museums, money, wolves, languages, databases, gardening, the Renaissance, radio, yoga, "
    "insurance, mushrooms, maps, supply and demand, the brain, cinema, chemical bonds, deserts, elections, "
    "magnets, whales, cooking oil, swimming, satellites, folk tales, probability, taxes, steel, migration of "
    "birds, headaches, operating systems, spices, windmills, the piano, climate change, shipping, drama, "
    "batteries, soil, negotiation, mountain climbing, dreams, glass, machine learning, rivers, painting, "
    "calendars, honesty, bicycles, genes, lighthouses"
)


@cache
def _data() -> Path:
    place = os.environ.get("EFFPASS_DATA")
    if place is None:
        raise SystemExit("speculative: set EFFPASS_DATA (or --data) to the folder that holds prompts/ and gsm8k/")
    return Path(place)


def test_prompts(name: str, count: int) -> list[str]:
    """The first turns of `count` prompts of a test set, evenly chosen."""
    if name == "gsm8k":
        rows = [json.loads(line)["question"] for line in (_data() / "gsm8k" / "test.jsonl").open()]
    else:
        rows = [json.loads(line)["turns"][0] for line in (_data() / "prompts" / f"{name}.jsonl").open()]
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]


def training_prompts(count: int, seed: int = 0) -> list[str]:
    """`count` prompts of all kinds, in an order of their own."""
    rng = np.random.default_rng(seed)
    kinds = [list(kind()) for kind in (_questions, _passages, _functions, _modules, _tasks)]
    chosen: list[str] = []
    for kind in kinds:
        order = rng.permutation(len(kind))[: count // len(kinds) + 1]
        chosen += [kind[i] for i in order]
    while len(chosen) < count:  # the smaller kinds have fewer
        chosen.append(kinds[0][int(rng.integers(len(kinds[0])))])
    return [chosen[i] for i in rng.permutation(len(chosen))[:count]]


def _questions() -> Iterator[str]:
    for line in (_data() / "gsm8k" / "train.jsonl").open():
        yield json.loads(line)["question"]


def _passages() -> Iterator[str]:
    for path in [*sorted((_data() / "text").glob("*.txt")), _data() / "wikitext-2" / "valid.txt"]:
        text = path.read_text(encoding="utf-8")
        for number, first in enumerate(range(0, len(text) - _LONGEST, _LONGEST)):
            yield _TASKS[number % len(_TASKS)].format(text[first : first + _LONGEST].strip())


def _sources() -> Iterator[tuple[str, str]]:
    """Modules of the standard library with their text."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.stem, path.read_text(encoding="utf-8", errors="replace")


def _functions() -> Iterator[str]:
    for _, text in _sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (told := ast.get_docstring(node)):
                head = f"def {node.name}({ast.unparse(node.args)}):\n    '''{inspect.cleandoc(told)}'''\n"
                if len(head) < _LONGEST:
                    yield f"Complete the code I provided.\n\n{head}"


def _modules() -> Iterator[str]:
    for name, _ in _sources():
        if not name.startswith("_"):
            yield from (question.format(name) for question in _QUESTIONS)


def _tasks() -> Iterator[str]:
    for topic in _TOPICS.split(", "):
        yield from (task.format(topic) for task in _EVERYDAY)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculative_data", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of texts (environment variable EFFPASS_DATA)")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments: Any = parser.parse_args()
    if arguments.data:
        os.environ["EFFPASS_DATA"] = str(arguments.data)
    with arguments.output.open("w") as file:
        for prompt in training_prompts(arguments.count):
            file.write(json.dumps({"messages": [{"role": "user", "content": prompt}]}) + "\n")


if __name__ == "__main__":
    main()
