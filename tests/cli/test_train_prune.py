"""`effpass train prune`: what it writes, and one message for each fault."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tuning import checkpoint

from effpass.passes.weights.keep_indices import KeepIndices


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"), num_attention_heads=8, num_key_value_heads=4)


def test_the_artifact_it_writes_is_one_that_optimize_applies(llama, tmp_path, run, recipe_file):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    words = (
        "train", "prune", llama, "--data", text, "-o", tmp_path / "keep", "--keep", 0.6, "--keep-of", "kv_groups=0.5",
        "--choose", "magnitude", "--save-model", tmp_path / "model", "--steps", 20, "--batch", 4, "--sequence-length",
        32, "--optimizer", "adamw",
    )  # fmt: skip
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "stays: 2 of 4 kv_groups, 64 of 96 ffn_channels; 0.602 of the parameters" in said
    assert "step 20/20" in said
    assert (tmp_path / "model" / "config.json").is_file()
    keep = KeepIndices.load(tmp_path / "keep")
    assert (keep.after.num_key_value_heads, keep.after.intermediate_size) == (2, 64)
    assert keep.artifact.provenance["settings"]["choose"] == "magnitude"
    recipe = recipe_file(f"- structured_pruning: {{artifact: {tmp_path / 'keep'}}}")
    assert run("optimize", llama, "-r", recipe, "-o", tmp_path / "cut").exit_code == 0
    for option, value, says in (
        ("--choose", "taylr", "--choose: got 'taylr', did you mean 'taylor'"),
        ("--keep-of", "kv_groups", "--keep-of: got 'kv_groups', expected UNITS=SHARE"),
        ("--cost", "money", "--cost: got 'money'"),
        ("--recovery", "lorra", "--recovery: got 'lorra', did you mean 'lora'"),
        ("--keep", "70", "keep: got 70.0, expected a share above 0 and below 1"),
    ):
        done = run(*words, option, value)
        assert done.exit_code == 1
        assert says in " ".join(done.stderr.split())
