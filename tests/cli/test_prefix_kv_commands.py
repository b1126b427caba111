"""`effpass calibrate prefix-kv`, and `effpass generate` with a budget and with images."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_vision import make_image, make_vision_checkpoint

from effpass.runtime.prefix_kv.profile import Profile

TEXT = "The quick brown fox jumps over the lazy dog, and the lazy dog does not mind it much. " * 8

needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="pillow is not installed")


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_checkpoint(tmp_path_factory.mktemp("vision"))


def test_a_profile_from_text_is_used_by_a_recipe(run, tiny_model, recipe_file, tmp_path):
    (tmp_path / "data.txt").write_text(TEXT)
    out = run("calibrate", "prefix-kv", tiny_model, "--data", tmp_path / "data.txt", "-o", tmp_path / "profile",
              "--samples", 3, "--tokens", 150)  # fmt: skip
    assert out.exit_code == 0, out.output
    assert "3 prompts; at a budget of 20 % the layers keep" in out.stdout
    profile = Profile.load(tmp_path / "profile")
    assert profile.shares.shape[1] == 2
    assert profile.artifact.provenance["tokens"] == 450
    assert profile.artifact.provenance["data"] == "data.txt"
    recipe = recipe_file("- prefix_kv: {budget: 0.5, artifact: ./profile}")
    out = run("generate", tiny_model, "-p", TEXT[:200], "-r", recipe, "--max-new-tokens", 5)
    assert out.exit_code == 0, out.output


def test_a_profile_from_lines(run, tiny_model, tmp_path):
    lines = [{"text": TEXT[: 140 + 10 * i]} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = run("calibrate", "prefix-kv", tiny_model, "--data", tmp_path / "data.jsonl", "-o", tmp_path / "profile",
              "--samples", 2, "--importance", "full", "--pool", 3)  # fmt: skip
    assert out.exit_code == 0, out.output
    artifact = Profile.load(tmp_path / "profile").artifact
    assert artifact.provenance["tokens"] == 140 + 150
    assert (artifact.options["importance"], artifact.options["pool"]) == ("full", 3)


def test_neighbors_have_a_middle(run, tiny_model, tmp_path):
    (tmp_path / "data.txt").write_text(TEXT)
    out = run("calibrate", "prefix-kv", tiny_model, "--data", tmp_path / "data.txt", "-o", tmp_path / "p", "--pool", 4)
    assert out.exit_code == 1
    assert "pool: got 4, expected an odd number" in out.output
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", "", "holds no tokens"),
        ("data.txt", "short", "prompt 0 has 5 tokens; a profile needs 128 or more"),
        ("data.jsonl", "", "there is no prompt to calibrate with"),
        ("data.jsonl", '{"text": "a"}\n{oops', "data.jsonl:2: no JSON"),
        ("data.jsonl", '{"words": "a"}', "data.jsonl:1: expected an object with 'text'"),
        ("data.jsonl", json.dumps({"text": "a" * 300}), "prompt 0 has 300 tokens, and the model 256 positions"),
    ],
)
def test_data_that_will_not_do(run, tiny_model, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    out = run("calibrate", "prefix-kv", tiny_model, "--data", tmp_path / name, "-o", tmp_path / "profile")
    assert out.exit_code == 1
    assert message in " ".join(out.stderr.split())
    assert not (tmp_path / "profile").exists()


def test_data_that_is_not_there(run, tiny_model, tmp_path):
    out = run("calibrate", "prefix-kv", tiny_model, "--data", tmp_path / "none.txt", "-o", tmp_path / "profile")
    assert out.exit_code == 1
    assert "none.txt: can't be read as text" in " ".join(out.stderr.split())


# -- images -----------------------------------------------------------------------------------------------------------


@needs_pillow
def test_an_image_is_looked_at(run, vision_model, tmp_path):
    images = [make_image(tmp_path / f"{seed}.png", seed) for seed in range(2)]
    answers = []
    for image in images:
        out = run("generate", vision_model, "-p", "What is this?", "--image", image, "--max-new-tokens", 8)
        assert out.exit_code == 0, out.output
        answers.append(out.stdout)
    assert answers[0] != answers[1]


@needs_pillow
def test_a_vision_language_model_with_a_budget(run, vision_model, recipe_file, tmp_path):
    make_image(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": TEXT[:200], "image": "a.png"}))
    out = run("calibrate", "prefix-kv", vision_model, "--data", tmp_path / "data.jsonl", "-o", tmp_path / "profile")
    assert out.exit_code == 0, out.output
    assert Profile.load(tmp_path / "profile").artifact.provenance["tokens"] == 200 + 16
    answers = []
    for budget in ("1.0", "0.3"):
        recipe = recipe_file(f"- prefix_kv: {{budget: {budget}, artifact: ./profile, recent: 4}}")
        out = run("generate", vision_model, "-p", TEXT[:200], "--image", tmp_path / "a.png", "-r", recipe,
                  "--max-new-tokens", 12)  # fmt: skip
        assert out.exit_code == 0, out.output
        answers.append(out.stdout)
    plain = run("generate", vision_model, "-p", TEXT[:200], "--image", tmp_path / "a.png", "--max-new-tokens", 12)
    assert answers[0] == plain.stdout


@needs_pillow
def test_images_that_nobody_can_see(run, tiny_model, vision_model, tmp_path):
    image = make_image(tmp_path / "a.png")
    out = run("generate", tiny_model, "-p", "What?", "--image", image)
    assert out.exit_code == 1
    assert "has the model type 'llama', which reads no images" in " ".join(out.stderr.split())
    out = run("generate", vision_model, "-p", "<image>What?", "--image", image)
    assert out.exit_code == 1
    assert "the text has <image> in it, and images stand before the text" in " ".join(out.stderr.split())
    (tmp_path / "b.png").write_text("no picture")
    for name in ("b.png", "c.png"):
        out = run("generate", vision_model, "-p", "What?", "--image", tmp_path / name)
        assert out.exit_code == 1
        assert f"{name}: no image that can be read" in " ".join(out.stderr.split())
    (vision_model / "processor_config.json").rename(tmp_path / "away")
    try:
        out = run("generate", vision_model, "-p", "What?", "--image", image)
        assert out.exit_code == 1
        assert "processor" in " ".join(out.stderr.split())
    finally:
        (tmp_path / "away").rename(vision_model / "processor_config.json")
