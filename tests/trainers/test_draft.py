"""Learning an EAGLE-3 head: its steps, its loss, what it learns from, and runs that end and resume."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make
from speculative_drafts import sure_checkpoint
from tiny_tuning import checkpoint, metrics, quiet, sums, weights, write
from transformers import LlamaConfig, Trainer

import effpass
from effpass.core.errors import EffpassError, ModelError
from effpass.runtime.speculative import EagleHead, HeadConfig, read_head
from effpass.trainers.afa_lora import LoraSettings
from effpass.trainers.draft.answers import answer, read_prompts
from effpass.trainers.draft.head import frequent_tokens, head_config
from effpass.trainers.draft.loss import accepted, divergence
from effpass.trainers.draft.run import train_draft
from effpass.trainers.draft.settings import RATE, Settings
from effpass.trainers.draft.unrolled import unroll
from effpass.trainers.finetune.samples import Sample
from effpass.trainers.finetune.settings import Anneal
from effpass.trainers.lm.config import OptimizerConfig, Schedule
from effpass.trainers.lm.tokenizer import byte_tokenizer

ADAMW = OptimizerConfig(lr=1e-2, name="adamw", weight_decay=0.0)
SETTINGS = Settings(
    ADAMW, schedule=Schedule(warmup=0), steps=8, batch=4, accumulate=2, vocabulary=60, unrolled=3, answers=8,
    temperature=0.0, log_every=2, save_every=4,
)  # fmt: skip


def make_head(layers: int = 1, vocabulary: int = 40) -> EagleHead:
    torch.manual_seed(1)
    layer = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    head = EagleHead(HeadConfig(layer, vocabulary, (0, 1), norm_before_residual=True))
    if head.d2t is not None:
        head.choose_tokens(torch.arange(vocabulary) * 2)
    head.share(make("llama"))
    return head.eval()


# -- steps and loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_every_step_is_the_head_in_use(layers: int) -> None:
    """At each token against the head run on the text so far, with its own states behind; two texts share a row."""
    head, steps, sizes = make_head(layers), 3, (7, 6)
    ids, tapped = torch.randint(3, 96, (1, 13)), torch.randn(1, 13, 128)
    places = torch.cat([torch.arange(size) for size in sizes])[None]
    with torch.no_grad():
        found = unroll(head, ids, places, tapped, steps)
        head.set_attn_implementation("eager")
        first = 0
        for size in sizes:
            for t in range(size):
                features = head.features(tapped[:, first : first + t + 1])
                for step in range(steps):
                    if t + 1 + step >= size:
                        break
                    given = ids[:, first + 1 : first + t + 2 + step]
                    count = given.shape[1]
                    mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
                    out = head(given, torch.arange(1, count + 1)[None], features, attention_mask=mask)
                    expected = out.logits[:, -1]
                    torch.testing.assert_close(found[step][:, first + t], expected, rtol=1e-4, atol=1e-5)
                    features = torch.cat((features, out.hidden[:, -1:]), 1)
            first += size


def test_loss_and_acceptance_by_loops() -> None:
    torch.manual_seed(0)
    steps, sizes, tokens = 3, (40, 30), torch.arange(0, 20, 2)
    places = torch.cat([torch.arange(size) for size in sizes])[None]
    owner = [text for text, size in enumerate(sizes) for _ in range(size)]
    target, proposed = torch.randn(1, 70, 20) * 3, [torch.randn(1, 70, 10) * 3 for _ in range(steps)]
    graded = torch.rand(1, 70) < 0.7
    for step in range(2):  # some proposals are right
        best = target[:, 1 + step :].argmax(-1)
        right = torch.nn.functional.one_hot(best // 2, 10) * (best % 2 == 0)[..., None] * 20.0
        proposed[step][:, : 69 - step] += right * (torch.rand(1, 69 - step, 1) < 0.8)
    loss = divergence(proposed, target, tokens, places, graded.float() * 0.25, 0.5)
    expected, runs, starts = 0.0, 0, 0
    for t in range(70):
        run, is_whole = 0, t + 1 + steps < 70 and owner[t] == owner[t + 1 + steps]
        alive = is_whole and bool(graded[0, t + 2])
        starts += alive
        for step in range(steps):
            if t + 2 + step < 70 and owner[t] == owner[t + 2 + step] and graded[0, t + 2 + step]:
                p, q = target[0, t + 1 + step, tokens].softmax(-1), proposed[step][0, t].softmax(-1)
                expected += 0.5**step * 0.25 * float((p * (p / q).log()).sum())
            if alive:
                alive = bool(tokens[proposed[step][0, t].argmax()] == target[0, t + 1 + step].argmax())
                run += alive
        runs += run
    assert float(loss) == pytest.approx(expected / (1 + 0.5 + 0.25), rel=1e-4)
    found = accepted(proposed, target, tokens, places, graded)
    assert [float(x) for x in found] == [runs, starts]
    assert 0 < runs < 3 * starts


def test_a_head_like_the_model_loses_nothing() -> None:
    target = torch.randn(1, 9, 12)
    proposed = [torch.nn.functional.pad(target[:, 1 + step :], (0, 0, 0, 1 + step)) for step in range(3)]
    places, every = torch.arange(9)[None], torch.ones(1, 9)
    assert float(divergence(proposed, target, torch.arange(12), places, every, 0.8)) == pytest.approx(0, abs=1e-6)
    run, starts = accepted(proposed, target, torch.arange(12), places, every.bool())
    assert float(run) == 3 * float(starts) > 0


# -- what is learned from ---------------------------------------------------------------------------------------------


def test_prompts_are_read_without_their_answers(tmp_path: Path) -> None:
    tokenizer = effpass.load_model(checkpoint(tmp_path / "model")).tokenizer
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    path = write(
        tmp_path / "d.jsonl", {"messages": turns}, {"prompt": "1+1=", "completion": "2"}, {"messages": turns[:1]}
    )
    texts = [byte_tokenizer().decode(prompt) for prompt in read_prompts(path, tokenizer)]
    assert texts == ["<user>a?<end><assistant>", "1+1=", "<user>a?<end><assistant>"]
    for row, message in (
        ({"text": "x"}, "neither 'messages' nor a 'prompt' to answer, but 'text'\n  → --answers 0"),
        ({"messages": turns[1:]}, "messages: all are the assistant's"),
        ({"messages": []}, "expected a list of messages"),
        ({"prompt": ""}, "neither 'messages' nor a 'prompt'"),
    ):
        with pytest.raises(EffpassError) as caught:
            read_prompts(write(tmp_path / "bad.jsonl", row), tokenizer)
        assert message in str(caught.value)


def test_answers_are_the_model_s_own_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = effpass.load_model(checkpoint(tmp_path / "model"))
    prompts = [np.arange(3, 3 + n, dtype=np.int32) for n in (4, 9, 6, 20)]
    how: dict[str, Any] = {"most": 6, "length": 20, "temperature": 0.0, "seed": 0, "say": quiet}
    samples = answer(loaded, prompts, tmp_path / "a.jsonl", **how)
    assert [sample.line for sample in samples] == [1, 2, 3]  # the last prompt leaves no room
    for sample, prompt in zip(samples, prompts, strict=False):
        ids = torch.from_numpy(prompt).long()[None]
        expected = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=257)
        assert sample.tokens.tolist() == expected[0].tolist()
        assert sample.graded.tolist() == [i >= len(prompt) for i in range(len(sample.tokens))]
    monkeypatch.setattr("effpass.trainers.draft.answers._ROWS", 1)
    whole = answer(loaded, prompts, tmp_path / "b.jsonl", **{**how, "temperature": 1.0})
    lines = (tmp_path / "b.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "c.jsonl").write_text(lines[0] + lines[1][:9])  # stopped while it wrote
    again = answer(loaded, prompts, tmp_path / "c.jsonl", **{**how, "temperature": 1.0})
    assert [s.tokens.tolist() for s in again] == [s.tokens.tolist() for s in whole]
    with pytest.raises(EffpassError, match="answers other prompts"):
        answer(loaded, prompts[1:], tmp_path / "c.jsonl", **how)
    with pytest.raises(EffpassError, match="every prompt has 4 tokens or more"):
        answer(loaded, prompts, tmp_path / "d.jsonl", **{**how, "length": 4})


def test_the_head_knows_the_most_frequent_tokens() -> None:
    samples = [Sample(np.array([9, 9, 2, 7, 7, 7, 5]), np.array([False, True, True, True, True, True, True]), 1)]
    assert frequent_tokens(samples, 2, 12).tolist() == [2, 7]
    assert frequent_tokens(samples, 6, 12).tolist() == [0, 1, 2, 5, 7, 9]
    assert head_config(make("llama").config, None, 500, 2).taps == (0, 1)
    assert head_config(make("llama").config, None, 500, 30).taps == (2, 15, 27)
    assert head_config(make("llama").config, None, 500, 2).draft_vocabulary == 96


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sure_checkpoint(tmp_path_factory.mktemp("llama"))


def run(model: Path, folder: Path, settings: Settings = SETTINGS, **options: Any) -> Path:
    data = folder / "data.jsonl"
    if not data.exists():
        sums(data)
    return train_draft(str(model), data, folder / "head", settings, say=options.pop("say", quiet), **options)


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = replace(SETTINGS, steps=60, evaluate_every=25, save_every=0, log_every=10)
    return run(llama, tmp_path_factory.mktemp("finished"), settings)


def test_a_run_learns_what_the_model_says(llama: Path, finished: Path) -> None:
    lines = [line for line in metrics(finished) if "eval_acceptance_length" in line]
    assert [line["step"] for line in lines] == [0, 25, 50, 60]
    lengths = [line["eval_acceptance_length"] for line in lines]
    assert lengths[0] < 1.5
    assert lengths[-1] > 2.5  # of four
    assert lines[-1]["eval_loss_validation"] < lines[0]["eval_loss_validation"] / 3
    assert lines[-1]["tokens"] == 60 * 4 * json.loads((finished / "training.json").read_text())["sequence_length"]
    assert {p.name for p in finished.iterdir()} == {
        "config.json", "model.safetensors", "metrics.jsonl", "training.json", "acceptance.png",
    }  # fmt: skip
    assert not finished.with_name("head.training").exists()


def test_what_was_learned_drafts(llama: Path, finished: Path) -> None:
    loaded = effpass.load_model(llama)
    ids = loaded.tokenizer(["3+4=", "5+1="], return_tensors="pt")["input_ids"]
    how = {"input_ids": ids, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 257}
    expected = loaded.model.generate(**how)
    ready = effpass.prepare(loaded.model, {"version": 1, "passes": []})
    for _ in range(2):  # the first call begins with plain steps, to learn what they take
        assert torch.equal(ready.generate(**how, draft=finished, tree="chain:3"), expected)
    assert ready.effpass_engine.last_speculation.acceptance_length > 3


class _StoppedError(Exception):
    pass


def test_a_resumed_run_is_the_whole_run(llama: Path, tmp_path: Path) -> None:
    whole = run(llama, _folder(tmp_path, "whole"))
    part = _folder(tmp_path, "part")

    def stop(line: str) -> None:
        if line.startswith("step 6/"):
            raise _StoppedError

    with pytest.raises(_StoppedError):
        run(llama, part, say=stop)
    assert not (part / "head").exists()
    again = run(llama, part, resume=True)
    a, b = weights(whole), weights(again)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(whole) == metrics(again)
    with pytest.raises(EffpassError, match="exists"):
        run(llama, part)


def _folder(place: Path, name: str) -> Path:
    (place / name).mkdir()
    return place / name


def test_other_settings_are_another_run(llama: Path, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("step 4/"):
            raise _StoppedError

    with pytest.raises(_StoppedError):
        run(llama, tmp_path, say=stop)
    with pytest.raises(EffpassError, match=r"not the run that began in .*: unrolled 3 -> 4"):
        run(llama, tmp_path, replace(SETTINGS, unrolled=4), resume=True)


@pytest.mark.parametrize("method", ["lora", "afa-lora"])
def test_an_adapter_on_a_head(llama: Path, finished: Path, tmp_path: Path, method: str) -> None:
    adapter = replace(SETTINGS, method=method, lora=LoraSettings(2), anneal=Anneal(end=0.5), steps=6, save_every=0)
    adapted = run(llama, tmp_path, adapter, start=finished)
    before, after = weights(finished), weights(adapted)
    assert before.keys() == after.keys()  # a stock head again
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "proj" in name or name == "fc.weight"}
    assert read_head(adapted).head_config.taps == read_head(finished).head_config.taps
    annealed = [line["anneal"] for line in metrics(adapted) if "anneal" in line]
    assert annealed[-1:] == ([0] if method == "afa-lora" else [])


def test_a_run_in_bfloat16_casts_by_itself(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, the Trainer's own context casts nothing, and accelerate casts in `forward` alone."""
    monkeypatch.setattr(Trainer, "compute_loss_context_manager", lambda self: ExitStack())
    half = replace(SETTINGS, dtype="bfloat16", steps=20, save_every=0, evaluate_every=20)
    lines = [line for line in metrics(run(llama, tmp_path, half)) if "eval_loss_validation" in line]
    assert lines[-1]["eval_loss_validation"] < lines[0]["eval_loss_validation"] / 2


def test_texts_as_they_are(llama: Path, tmp_path: Path) -> None:
    folder = run(llama, tmp_path, replace(SETTINGS, answers=0, steps=2, save_every=0))
    assert json.loads((folder / "training.json").read_text())["graded"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "afa-lora"}, "afa-lora adapts a head that there is\n  → --from HEAD"),
        ({"taps": (0, 2)}, "taps [0, 2] of a model with 2 layers\n  → name layers from 0 to 1"),
        ({"sequence_length": 512}, "sequence_length: got 512"),
    ],
)
def test_runs_that_can_not_be(llama: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(EffpassError) as caught:
        run(llama, tmp_path, replace(SETTINGS, **change))
    assert message in str(caught.value)
    assert not list(tmp_path.glob("head*"))


def test_texts_that_are_too_long_leave_no_folder(llama: Path, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", {"text": "1 + 2 = 3, 2 + 3 = 5"}, {"text": "1"})
    with pytest.raises(EffpassError, match=r"data.jsonl:1: \d+ tokens, and a row has 8"):
        run(llama, tmp_path, replace(SETTINGS, answers=0, sequence_length=8))
    assert not list(tmp_path.glob("head*"))


def test_a_head_of_another_model(llama: Path, finished: Path, tmp_path: Path) -> None:
    other = sure_checkpoint(tmp_path / "wide", hidden_size=96)
    with pytest.raises(EffpassError, match=r"is a head of width 64 with .* tokens, and the model has 96"):
        run(other, tmp_path, start=finished)


def test_settings_that_can_not_be() -> None:
    for change, message in (
        ({"unrolled": 0}, "unrolled: got 0"),
        ({"decay": 0.0}, "decay: got 0.0"),
        ({"batch": 3}, "a batch of 3 rows can't be cut into 2"),
        ({"save_every": 3}, "save_every: got 3"),
    ):
        with pytest.raises(EffpassError, match=message):
            replace(SETTINGS, **change)


def test_the_command(llama: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from effpass.cli.app import app

    sums(tmp_path / "d.jsonl")
    command = [
        "train", "draft", str(llama), "--data", str(tmp_path / "d.jsonl"), "-o", str(tmp_path / "head"), "--steps", "2",
        "--batch", "2", "--vocabulary", "50", "--unrolled", "2", "--answers", "4", "--taps", "0,1", "--log-every", "1",
        "--save-every", "0", "--dtype", "float32",
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert read_head(tmp_path / "head").head_config.draft_vocabulary == 50


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="has no tokenizer"):
        run(tmp_path / "bare", tmp_path)


def test_the_rate_that_the_help_names() -> None:
    from typer.testing import CliRunner

    from effpass.cli.app import app

    shown = CliRunner().invoke(app, ["train", "draft", "--help"], env={"COLUMNS": "200"}).output
    (line,) = [line for line in shown.splitlines() if "--lr " in line]
    assert float(line.partition("[default:")[2].partition("]")[0].strip(" ()")) == RATE
