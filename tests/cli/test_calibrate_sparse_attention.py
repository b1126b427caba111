"""`effpass calibrate sparse-attention`: an artifact that the pass reads."""

from __future__ import annotations

import json

import pytest
import torch
from families import batch, make
from tiny_checkpoint import make_checkpoint

import effpass
from effpass.core.errors import ArtifactError
from effpass.passes.runtime.mla_absorption import absorb
from effpass.runtime.sparse_channels import calibrate, load_channels

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12


def test_the_command_writes_what_the_pass_applies(run, tiny_model, tmp_path):
    data = tmp_path / "text.txt"
    data.write_text(TEXT, encoding="utf-8")
    done = run(
        "calibrate", "sparse-attention", str(tiny_model), "--data", str(data), "-o", str(tmp_path / "channels"),
        "--channels", "4", "--tokens", "200",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "4 channels of 2 layers" in done.output
    artifact, channels = load_channels(tmp_path / "channels")
    assert {index: tuple(c.shape) for index, c in channels.items()} == {0: (2, 4), 1: (2, 4)}
    assert artifact.provenance["samples"] == 5
    assert artifact.provenance["data"] == "text.txt"
    model = effpass.load_model(str(tiny_model)).model
    options = {"artifact": str(tmp_path / "channels"), "tokens": 64, "blocks": 8, "block": 16, "dense_below": 1}
    ready = effpass.prepare(model, {"version": 1, "passes": [{"sparse_attention": options}]})
    ids = torch.randint(1, 250, (1, 40))
    ready.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    (session,) = ready.effpass_engine._free.values()
    assert torch.equal(session.cache.reader.layers[0].index.channels, channels[0])
    assert session.cache.reader.layers[0].index.labels.shape[-1] == 2


def test_an_empty_text_is_refused(run, tiny_model, tmp_path):
    data = tmp_path / "text.txt"
    data.write_text(" \n", encoding="utf-8")
    done = run("calibrate", "sparse-attention", str(tiny_model), "--data", str(data), "-o", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert "there is no text in it" in done.output
    assert not (tmp_path / "out").exists()


def test_channels_are_those_with_the_largest_products():
    """One channel of the keys is made to matter: it is among those that are kept."""
    model = make("llama")
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            weight = getattr(model.model.layers[1].self_attn, name).weight
            weight.view(-1, 16, 64)[:, 5] *= 20
    artifact = calibrate(model, [batch(60)["input_ids"][:1]], channels=2)
    # Rotation turns feature 5 with feature 13.
    assert artifact.tensors["layers.1.channels"].tolist() == [[5, 13]] * 2
    assert artifact.metrics["share"]["1"] > 0.9 > artifact.metrics["share"]["0"]


def test_latents_are_calibrated_absorbed(tmp_path):
    model = make("deepseek_v3")
    assert absorb(model) == 2
    artifact = calibrate(model, [batch(50)["input_ids"][:1]], channels=8)
    assert artifact.tensors["layers.0.channels"].shape == (1, 8)
    artifact.save(tmp_path / "a")
    options = {"artifact": str(tmp_path / "a"), "tokens": 64, "blocks": 8, "block": 16, "dense_below": 1}
    ready = effpass.prepare(make("deepseek_v3"), {"version": 1, "passes": [{"sparse_attention": options}]})
    assert ready.effpass_report.hits == 2
    with pytest.raises(ArtifactError):
        effpass.prepare(make("llama"), {"version": 1, "passes": [{"sparse_attention": options}]})


def test_tensors_that_are_no_channels_are_refused(tmp_path):
    artifact = calibrate(make("llama"), [batch(50)["input_ids"][:1]], channels=4)
    artifact.tensors["layers.0.channels"] = artifact.tensors["layers.0.channels"].flip(1)
    artifact.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"layers.0.channels does not ascend"):
        load_channels(tmp_path / "a")


@pytest.mark.parametrize("command", ["prefix-kv", "sparse-attention", "sparse-verification"])
def test_a_folder_with_other_files_is_refused_before_anything_is_loaded(run, tmp_path, command):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    done = run("calibrate", command, "no/model", "--data", tmp_path / "text.txt", "-o", tmp_path / "notes")
    assert done.exit_code == 1
    assert "holds mine.txt, which is no part of an artifact" in done.output


def test_samples_are_no_longer_than_the_positions(run, tmp_path):
    place = make_checkpoint(tmp_path / "short")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = run(
        "calibrate", "sparse-attention", place, "-d", tmp_path / "text.txt", "-o", tmp_path / "c", "--channels", 4
    )
    assert done.exit_code == 0, done.output
    assert "a sample of 64 tokens" in done.output
