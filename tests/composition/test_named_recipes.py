"""The recipes that have a name: valid, documented, and at work on the models that they are for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from families import make, padded

import effpass
from effpass.core.errors import RecipeError
from effpass.core.recipe import named_recipes

ROOT = Path(__file__).parents[2]

# Models of the class that a recipe is for, and how many places of each it rewrites.
FOR = {
    "fast-decode": {"llama": [2], "qwen3": [2], "gemma3": [1], "deepseek_v3": [2]},
    "long-context": {"llama": [2, 2], "qwen3": [2, 2], "deepseek_v3": [2, 2]},
    "small-memory": {"llama": [2], "qwen3_moe": [2], "deepseek_v3": [2]},
    "moe-serving": {"mixtral": [2], "qwen3_moe": [2], "deepseek_v3": [2]},
}
CASES = [(name, family, hits) for name, families in FOR.items() for family, hits in families.items()]


def test_every_name_is_tried_out_here():
    assert set(named_recipes()) == {*FOR, "merge-attached"}
    assert {path.name for path in named_recipes().values()} == {path.name for path in (ROOT / "recipes").iterdir()}


@pytest.mark.parametrize("name", named_recipes())
def test_each_says_what_it_is_for(name):
    text = named_recipes()[name].read_text()
    assert text.startswith("# ")
    assert effpass.Recipe.parse(text).steps == effpass.Recipe.load(name).steps


@pytest.mark.parametrize(("name", "family", "hits"), CASES)
def test_it_works_on_the_models_that_it_is_for(name, family, hits):
    model = effpass.prepare(make(family), name)
    assert [entry.hits for entry in model.effpass_report.passes] == hits
    inputs = padded(60)
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=-1)
    assert out.shape == (4, 62)
    assert torch.equal(out[:, :60], inputs["input_ids"])


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fast-decode").write_text("version: 1\npasses: [merge_lora]\n")
    assert [step.name for step in effpass.Recipe.load("fast-decode").steps] == ["merge_lora"]


def test_a_name_that_nobody_has(tmp_path):
    names = "fast-decode, long-context, merge-attached, moe-serving, small-memory"
    with pytest.raises(RecipeError, match=rf"^fast-decod: can't be read.*\n.*have a name: {names}$"):
        effpass.Recipe.load("fast-decod")
    missing = f"{tmp_path / 'r'}: can't be read: No such file or directory"
    with pytest.raises(RecipeError, match=re.escape(missing) + "$"):
        effpass.Recipe.load(tmp_path / "r")
