"""A whole search on a tiny model: against measuring everything, stopped, killed and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from effpass.core.errors import EffpassError
from effpass.core.recipe import Recipe
from effpass.search import run
from effpass.search.explore import best, holding, quality_loss
from effpass.search.log import Log
from effpass.search.measure import try_out
from effpass.search.recipes import DENSE


@pytest.fixture(scope="module")
def measured():
    """Every trial of this module, once: a second measurement of a time would be another one."""
    return {}


@pytest.fixture(autouse=True)
def _measured_once(measured, monkeypatch):
    """With a clock that counts bytes: steps of this model take less time than whatever else the machine does."""

    def once(load, candidate, texts, workload):
        if candidate.key not in measured:
            trial = measured[candidate.key] = try_out(load, candidate, texts, workload)
            trial.step_seconds = 1e-9 * (trial.weight_bytes + trial.cache_bytes)
            trial.tokens_per_second = 1 / (trial.step_seconds + 1e-5) if trial.is_measured else 0.0
        return replace(measured[candidate.key])

    monkeypatch.setattr(run, "try_out", once)


@pytest.mark.parametrize(
    ("goal", "limit"), [("memory", 0.004), ("memory", 0.05), ("latency", 0.004), ("throughput", 0.05)]
)
def test_within_five_percent_of_measuring_every_legal_recipe(new_search, goal, limit):
    search = new_search(goal, limit)
    assert search.run()
    found = best(search.trials, goal, limit)
    looked_at = len(search.trials)
    assert quality_loss(search.trials, found) <= limit
    for candidate in search.candidates:
        if candidate not in search.trials:
            search.measure(candidate)
    everything = best(search.trials, goal, limit)
    assert max(len(candidate.choices) for candidate in search.candidates) >= 2
    assert search.trials[found].of(goal) <= 1.05 * search.trials[everything].of(goal)
    assert looked_at < len(search.candidates)
    assert len(holding(search.trials, limit)) > 1


def test_the_folder_holds_what_was_found(new_search):
    search = new_search("memory", 0.05)
    search.run()
    chosen = search.confirm()
    search.picture()
    folder = search.log.folder
    assert chosen != DENSE
    recipe = Recipe.load(folder / "recipe.yaml")
    assert [step.name for step in recipe.steps] == [choice.name for choice in chosen.choices]
    assert str(folder) not in (folder / "recipe.yaml").read_text()  # the folder can be moved
    log = json.loads((folder / "search.json").read_text())
    assert log["chosen"] == {"recipe": chosen.key, "confirmed": True}
    assert set(log["trials"]) == {candidate.key for candidate in search.trials}
    assert set(log["predicted"]) == {candidate.key for candidate in search.candidates}
    assert log["trials"][chosen.key]["confirmed"] != log["trials"][chosen.key]["losses"]
    assert "mla_absorption" in log["left_out"]
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert quality_loss(search.trials, chosen, confirmed=True) <= 0.05
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_search_goes_on_where_it_was_stopped(new_search, monkeypatch):
    whole = new_search("memory", 0.004, name="whole")
    whole.run()
    parts = new_search("memory", 0.004, name="parts")
    assert not parts.run(2)
    assert list(parts.log.trials) == list(whole.log.trials)[:2]
    assert Recipe.load(parts.log.folder / "recipe.yaml") is not None
    # Nothing is calibrated or predicted again.
    monkeypatch.setattr("effpass.search.run.trace", lambda *args: pytest.fail("traced again"))
    monkeypatch.setattr("effpass.core.artifact.Artifact.save", lambda *args: pytest.fail("learned again"))
    again = new_search("memory", 0.004, name="parts", resume=True)
    assert len(again.trials) == 2
    assert again.run()
    assert list(again.log.trials) == list(whole.log.trials)
    assert again.confirm().key == whole.confirm().key


def test_what_does_not_hold_on_the_last_text_is_not_chosen(new_search, monkeypatch):
    search = new_search("memory", 0.05)
    search.run()
    first = best(search.trials, "memory", 0.05)
    bad = iter([[1.0, 2.0], [1.5, 2.5]])  # the dense model's, then those of the best
    monkeypatch.setattr(run, "losses_of", lambda *args: next(bad, [1.0, 2.0]))
    chosen = search.confirm()
    assert chosen not in (first, DENSE)
    assert search.trials[first].confirmed == [1.5, 2.5]
    assert search.log.chosen == {"recipe": chosen.key, "confirmed": True}


def test_interrupted_while_measuring(new_search, monkeypatch, measured):
    search = new_search("memory", 0.05)
    count = iter(range(2))

    def interrupted(load, candidate, texts, workload):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return replace(measured[candidate.key])

    monkeypatch.setattr(run, "try_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search.run()
    found = Log.open(search.log.folder, search.log.settings, resume=True)
    assert len(found.trials) == 2
    assert found.chosen["recipe"] in found.trials
    assert Recipe.load(search.log.folder / "recipe.yaml")


def test_another_search_is_not_gone_on_with(new_search, tmp_path):
    new_search("memory", 0.05)
    with pytest.raises(EffpassError, match=r"is not the search in .*: limit 0.05 -> 0.01\n.*start anew"):
        new_search("memory", 0.01, resume=True)
    with pytest.raises(EffpassError, match=r"exists\n.*--resume"):
        new_search("memory", 0.05)
    with pytest.raises(EffpassError, match="holds no search to go on with"):
        new_search("memory", 0.05, name="other", resume=True)
    (tmp_path / "search" / "search.json").write_text('{"schema": 2}')
    with pytest.raises(EffpassError, match="schema 2, and this effpass reads 1"):
        new_search("memory", 0.05, resume=True)
    (tmp_path / "search" / "search.json").write_text("[1")
    with pytest.raises(EffpassError, match="can't be read"):
        new_search("memory", 0.05, resume=True)


def test_prompts_that_the_model_has_no_positions_for(new_search):
    search = new_search("memory", 0.05)
    search.workload = replace(search.workload, prompt=256)
    with pytest.raises(EffpassError, match="prompts of 256 tokens and 8 behind them, and the model has 256 positions"):
        search.begin()


def test_a_model_that_can_not_be_measured(new_search, monkeypatch):
    from effpass.search.measure import Trial

    search = new_search("memory", 0.05)
    monkeypatch.setattr(run, "try_out", lambda *args: Trial("failed", "no room"))
    with pytest.raises(EffpassError, match="the model as it is can't be measured: no room"):
        search.run()
