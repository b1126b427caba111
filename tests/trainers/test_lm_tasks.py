"""Synthetic tasks: answers found by other code, lengths, determinism, options."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from effpass.core.errors import EffpassError
from effpass.trainers.lm.tasks import TASKS, Example, make_example, shortest, task_faults

LENGTHS = (160, 256, 1000, 5000)


def example(task: str, length: int, questions: int, seed: int = 0, **options: int) -> Example:
    return make_example(task, np.random.default_rng((seed, length)), length, questions, options)


def solve_needle(context: str, question: str) -> tuple[str, int]:
    codes = dict(re.findall(r" code (\w+) is (\d+)\.", context))
    return codes[question.split()[1]], len(codes)


def solve_variables(context: str, question: str) -> tuple[str, int]:
    told: dict[str, str] = {}
    for name, number, other in re.findall(r" (\w{4}) is (?:(\d{4})|(\w{4}))\.", context):
        assert name not in told
        told[name] = number or told[other]  # a name is told before it is used
    return told[question.split()[-1].rstrip(":")], len(set(told.values()))


def solve_frequent(context: str, question: str) -> tuple[str, int]:
    counts = Counter(context.lstrip(".").split())
    (first, most), (_, second) = counts.most_common(2)
    assert most > second
    return first, len(counts)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("task", "solve"), [("needle", solve_needle), ("variables", solve_variables), ("frequent", solve_frequent)]
)
def test_answers_follow_from_the_context(task, solve, length, seed):
    found = example(task, length, 8, seed)
    context = found.context.decode("ascii")
    for question, answer in found.pairs:
        solution, candidates = solve(context, question.decode())
        assert answer.decode() == f" {solution}"
    if not (task == "frequent" and length < 300):  # short lists miss some of the rare words
        assert found.chance == pytest.approx(1 / candidates)


@pytest.mark.parametrize("length", LENGTHS)
def test_copies_stand_in_the_context(length):
    found = example("copy", length, 8, letters=5)
    assert re.fullmatch(rb"[a-z]+", found.context)
    for question, answer in found.pairs:
        assert len(answer) == 5
        assert question.removeprefix(b" After ") + answer in found.context
    assert found.chance == 26**-5


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("questions", [1, 32])
def test_an_example_fills_its_length_at_every_length(task, questions):
    least = shortest(task, {})
    for length in range(least, least + 300):
        found = example(task, length, questions)
        assert len(found.text) == length
        assert 1 <= len(found.pairs) <= questions
        assert found.text.isascii()


@pytest.mark.parametrize("task", TASKS)
def test_the_shortest_example_can_be_made_from_every_seed(task):
    least = shortest(task, {})
    for seed in range(200):
        assert len(make_example(task, np.random.default_rng(seed), least, 1, {}).text) == least


def test_the_first_question_about_variables_goes_over_all_hops_and_no_answer_comes_twice():
    for seed in range(20):
        found = example("variables", 1000, 8, seed, hops=3, chains=4)
        name = found.pairs[0][0].split()[-1].rstrip(b":")
        assert b" is %b." % name not in found.context  # nothing stands behind it in its chain
        assert re.search(rb" %b is [a-z]{4}\." % name, found.context)
        answers = [answer for _, answer in found.pairs]
        assert len(set(answers)) == len(answers) == 4


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_a_function_of_the_seed(task):
    assert example(task, 500, 4, seed=1) == example(task, 500, 4, seed=1)
    assert example(task, 500, 4, seed=1) != example(task, 500, 4, seed=2)


def test_places_of_needles_are_spread_over_the_context():
    """A task whose needles stood at one end would not ask for a long memory."""
    at = [example("needle", 4000, 1, seed).context.find(b" code ") for seed in range(60)]
    places = [m.start() for s in range(60) for m in re.finditer(b" code ", example("needle", 4000, 1, s).context)]
    assert min(at) < 400
    assert np.quantile(places, [0.25, 0.75]) == pytest.approx([1000, 3000], abs=250)


def test_options_are_strict():
    assert task_faults("needle", {"keys": 4}) == []
    assert task_faults("variables", {"hop": 2}) == ["hop: unknown option, did you mean 'hops'?"]
    assert task_faults("frequent", {"words": 1}) == ["words: got 1, expected a whole number from 2 to 4096"]
    assert task_faults("copy", {"letters": True}) == ["letters: got True, expected a whole number from 1 to 4096"]


def test_too_short_a_length_says_so():
    with pytest.raises(
        EffpassError, match=r"100 bytes are too few for an example of variables with options \{'hops': 9\}"
    ):
        example("variables", 100, 1, hops=9)
    assert 10 * len(" kqzt is mnop.") < shortest("variables", {"hops": 9}) < 256
