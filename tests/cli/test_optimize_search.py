"""`effpass optimize --goal`: what it shows and leaves behind; bad input; stopped and gone on with."""

from __future__ import annotations

import json

import pytest

SMALL = ("--prompt", 128, "--new-tokens", 8, "--sequences", 4, "--passes", 1)


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch):
    from effpass.core import roofline

    monkeypatch.setattr("effpass.search.predict.ceilings", lambda device, dtype: roofline.known("h100"))


@pytest.fixture
def text(tmp_path):
    from effpass.search.texts import builtin_text

    (tmp_path / "text.txt").write_text(builtin_text()[:20000])
    return tmp_path / "text.txt"


def test_a_search_stopped_and_gone_on_with(run, tiny_model, text, tmp_path, monkeypatch):
    out = tmp_path / "found"
    words = ("optimize", tiny_model, "--goal", "memory", "--quality-loss", "5%", "-d", text, *SMALL, "-o", out)
    stopped = run(*words, "--trials", 1)
    assert stopped.exit_code == 0, stopped.output
    assert f"measured as many as --trials 1 asks for; go on: effpass optimize … -o {out} --resume" in stopped.stdout
    assert len(json.loads((out / "search.json").read_text())["trials"]) == 1
    assert (out / "recipe.yaml").is_file()

    ended = run(*words, "--resume")
    assert ended.exit_code == 0, ended.output
    log = json.loads((out / "search.json").read_text())
    assert log["chosen"]["confirmed"]
    chosen = log["chosen"]["recipe"]
    assert f"{chosen}: " in ended.stdout
    assert "MB of weights and cache; perplexity" in ended.stdout
    assert "left out: mla_absorption: LlamaForCausalLM has no latent attention" in ended.stdout
    assert f"{out}/recipe.yaml: effpass generate MODEL -r {out}/recipe.yaml" in ended.stdout
    shown = " ".join(ended.stdout.split())
    assert "chosen" in shown
    assert "frontier" in shown
    assert (out / "pareto.png").is_file()

    used = run("generate", tiny_model, "-r", out / "recipe.yaml", "-p", "hello", "--max-new-tokens", 4)
    assert used.exit_code == 0, used.output
    assert run("recipe", "check", out / "recipe.yaml").exit_code == 0
    other = run(*words[:5], "1%", *words[6:], "--resume")
    assert other.exit_code == 1
    assert "quality_loss 0.05 -> 0.01" in other.stderr
    other = run(*words, "--resume", "--dtype", "bfloat16")
    assert other.exit_code == 1
    assert "dtype 'torch.float32' -> 'torch.bfloat16'" in other.stderr


def test_interrupted(run, tiny_model, text, tmp_path, monkeypatch):
    from effpass.search.run import Search

    begin = Search.begin

    def interrupted(self):
        begin(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "begin", interrupted)
    out = tmp_path / "found"
    result = run("optimize", tiny_model, "--goal", "latency", "-d", text, *SMALL, "-o", out)
    assert result.exit_code == 130
    assert "nothing was measured" in result.stdout
    assert "--resume" in result.stdout
    assert (out / "search.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--goal finds a recipe and --recipe applies one: got neither"),
        (("--goal", "memory", "-r", "small-memory"), "--goal finds a recipe and --recipe applies one: got both"),
        (("--goal", "speed"), "--goal: got 'speed'; known: latency, memory, throughput"),
        (("--goal", "latancy"), "--goal: got 'latancy', did you mean 'latency'?"),
        (("--goal", "memory", "--quality-loss", "few"), "--quality-loss: got 'few', expected a share"),
        (("--goal", "memory", "--overwrite"), "--overwrite: a search replaces nothing"),
        (("-r", "small-memory", "--batch", 4), "--batch: --recipe applies a recipe, and searches nothing"),
        (("-r", "small-memory", "--resume"), "--resume: --recipe applies a recipe, and searches nothing"),
        (("--goal", "memory", "-d", "/no/text"), "--data /no/text: can't be read as UTF-8 text"),
        (("--goal", "memory", "--validation", "/no/text"), "--validation /no/text: can't be read"),
        (("--goal", "memory", "--artifact", "/no/folder"), "--artifact /no/folder: is no artifact"),
        (("--goal", "memory", "--resume"), "holds no search to go on with"),
        (("--goal", "memory"), "no file or folder '/no/such/model'"),
    ],
)
def test_bad_input(refused, tmp_path, words, message):
    assert message in refused("optimize", "/no/such/model", *words, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_bad_input(refused, tiny_model, text, tmp_path):
    words = ("optimize", tiny_model, "--goal", "memory", "-o", tmp_path / "out")
    assert "--data and --validation are the same text" in refused(*words, "-d", text, "--validation", text)
    assert "and 4 sequences of 1088 take 4352" in refused(*words, "-d", text, "--validation", _short(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "out exists\n  → choose another folder" in refused(*words)


def _short(folder):
    (folder / "short.txt").write_text("some words")
    return folder / "short.txt"
