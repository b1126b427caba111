"""`effpass calibrate sparse-verification`, what the pass makes of it, and `effpass inspect --redundancy`."""

from __future__ import annotations

import json

from effpass.runtime.speculative.calibrated import load_calibrated

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12


def test_calibrated_anchors_serve_generate(run, tiny_model, recipe_file, tmp_path):
    data = tmp_path / "text.txt"
    data.write_text(TEXT, encoding="utf-8")
    done = run(
        "calibrate", "sparse-verification", tiny_model, "--data", data, "-o", tmp_path / "found", "--tokens", 200,
        "--block", 8, "--nodes", 12, "--similarity", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "2 of 2 layers choose blocks: 0, 1" in done.output
    artifact = load_calibrated(tmp_path / "found")
    assert artifact.options == {"attention": 0.25, "block": 8, "similarity": 1.0}
    assert artifact.provenance["data"] == "text.txt"
    assert artifact.metrics["tokens"][0] == 200
    assert set(artifact.metrics["blocks"]) == {"0", "1"}
    recipe = recipe_file("- sparse_verification: {artifact: ./found, block: 8, dense_below: 16}")
    done = run("generate", tiny_model, "-r", recipe, "-p", TEXT[:120], "--draft", "ngram", "--max-new-tokens", 8)
    assert done.exit_code == 0, done.output


def test_redundancy_of_a_recipe(run, tiny_model, recipe_file, tmp_path):
    data = tmp_path / "text.txt"
    data.write_text(TEXT, encoding="utf-8")
    recipe = recipe_file("- sparse_verification: {block: 16, channels: 0.5}")
    done = run("inspect", tiny_model, "-r", recipe, "--redundancy", data, "--tokens", 0, "--predict-for", "h100")
    assert done.exit_code == 0, done.output
    assert "what 32 consecutive tokens read alike" in done.output
    assert "model.layers.1.mlp" in done.output
    as_json = run(
        "inspect", tiny_model, "-r", recipe, "--redundancy", data, "--tokens", 0, "--predict-for", "h100", "--json"
    )
    found = json.loads(as_json.stdout)["redundancy"]
    assert set(found["channels"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert all(0.5 <= union <= 1 and 0 < held <= 1 for union, held in found["channels"].values())
    assert set(found["blocks"]) == {"0", "1"}
    assert len(found["similar"]) == 2


def test_a_recipe_for_trees_needs_a_draft(run, recipe_file, tmp_path):
    """Before the model is loaded: there is none."""
    done = run("generate", tmp_path / "no model", "-r", recipe_file("- sparse_verification"), "-p", "a")
    assert done.exit_code == 1
    assert "acts on the trees of a draft, and none was given" in done.stderr


def test_a_text_that_is_none(run, tiny_model, recipe_file, tmp_path):
    recipe = recipe_file("- sparse_verification")
    missing = run("inspect", tiny_model, "-r", recipe, "--redundancy", tmp_path / "no.txt")
    assert missing.exit_code == 1
    assert "--redundancy" in missing.stderr
    assert "can't be read as UTF-8 text" in missing.stderr
    (tmp_path / "short.txt").write_text("a few words", encoding="utf-8")
    short = run("calibrate", "sparse-verification", tiny_model, "-d", tmp_path / "short.txt", "-o", tmp_path / "found")
    assert short.exit_code == 1
    assert "of which the last 32 stand for a tree's nodes" in short.stderr
    assert not (tmp_path / "found").exists()
