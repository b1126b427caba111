"""Supervised fine-tuning: what is graded, packing, runs that end and resume, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import batch, make
from tiny_tuning import checkpoint, metrics, quiet, sums, weights, write
from torch.nn.functional import cross_entropy

import effpass
from effpass.core.errors import EffpassError, ModelError
from effpass.trainers.afa_lora import AnnealSchedule, LoraSettings
from effpass.trainers.finetune.loop import check_packing, held_out_loss
from effpass.trainers.finetune.memory import estimate
from effpass.trainers.finetune.packing import PackedBatches, make_rows
from effpass.trainers.finetune.run import tune
from effpass.trainers.finetune.samples import Sample, read_samples
from effpass.trainers.finetune.settings import Anneal, Settings
from effpass.trainers.finetune.trained import make_trained
from effpass.trainers.lm.config import OptimizerConfig, Schedule
from effpass.trainers.lm.tokenizer import byte_tokenizer
from effpass.trainers.loop import Loop

ROOT = Path(__file__).parents[2]
ADAMW = OptimizerConfig(lr=1e-2, name="adamw", weight_decay=0.0)
SETTINGS = Settings(
    ADAMW, method="afa-lora", steps=8, batch=4, accumulate=2, sequence_length=32, lora=LoraSettings(4, dropout=0.1),
    anneal=Anneal(end=0.8), log_every=2, save_every=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return run(llama, folder)


def run(model: Path, folder: Path, settings: Settings = SETTINGS, *, resume: bool = False, say=quiet, **files) -> Path:
    data = files.get("data") or sums(folder / "data.jsonl")
    held_out = sums(folder / "validation.jsonl", 6, 40)
    return tune(str(model), data, folder / "out", settings, validation=held_out, resume=resume, say=say)


def graded_text(sample: Sample) -> str:
    return byte_tokenizer().decode(sample.tokens[sample.graded])


# -- samples ----------------------------------------------------------------------------------------------------------


def test_completions_and_the_assistants_turns_are_graded_and_texts_whole(llama, tmp_path):
    tokenizer = effpass.load_model(llama).tokenizer
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b!"},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d!"},
    ]
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "1+1=", "completion": "2", "further": 1},
        "",
        {"messages": turns},
        {"text": "abc"},
    )
    prompted, chat, text = read_samples(path, tokenizer)
    assert tokenizer.decode(prompted.tokens) == "1+1=2<end>"
    assert graded_text(prompted) == "2<end>"
    assert tokenizer.decode(chat.tokens) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert graded_text(chat) == "b!<end>d!<end>"
    assert graded_text(text) == "bc<end>"  # nothing stands before the a
    assert [sample.line for sample in (prompted, chat, text)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a"}, r"d\.jsonl:2: field 'completion' is missing; it has 'prompt'"),
        ({"prompt": "a", "completion": 3}, r"d\.jsonl:2: field 'completion' is 3, expected a string"),
        ({"prompt": "a", "completion": ""}, r"d\.jsonl:2: field 'completion' is empty"),
        ({"question": "a", "answer": "b"}, r"d\.jsonl:2: the fields 'question', 'answer'; expected one of 'messages'"),
        ({"prompt": "a", "completion": "b", "text": "c"}, r"d\.jsonl:2: both 'prompt' and 'text'"),
        ({"messages": [{"role": "user"}]}, r"d\.jsonl:2: messages\[0\]: field 'content' is missing"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"d\.jsonl:2: messages: none is the assistant's"),
        ({"messages": []}, r"d\.jsonl:2: messages: got \[\], expected a list of messages"),
        ("{bad", r"d\.jsonl:2: not JSON"),
        ("[1]", r"d\.jsonl:2: got list, expected an object"),
    ],
)
def test_a_faulty_line_is_named_with_its_field(tmp_path, row, says):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(EffpassError, match=says):
        read_samples(write(tmp_path / "d.jsonl", {"text": "ok"}, row), tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(EffpassError, match=r"messages\[1\]: the chat template renders earlier turns in another way"):
        read_samples(write(tmp_path / "d.jsonl", {"messages": talk}), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        read_samples(write(tmp_path / "d.jsonl", {"messages": talk}), tokenizer)


# -- packing ----------------------------------------------------------------------------------------------------------


def some_samples(count: int = 23, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for line in range(count):
        size = int(rng.integers(2, 20))
        graded = np.arange(size) >= rng.integers(1, size)
        found.append(Sample(rng.integers(3, 96, size).astype(np.int32), graded, line + 1))
    return found


def test_every_sample_is_read_once_an_epoch_and_every_graded_token_weighs_the_same():
    samples = some_samples()
    batches = PackedBatches(samples, length=32, batch=4, accumulate=2, epochs=2, seed=3)
    seen = sorted(n for row in batches.rows for n in row)
    assert seen == sorted([*range(23)] * 2)
    assert len(batches) == 2 * batches.steps
    for step in range(batches.steps):
        micro = [batches[2 * step + part] for part in range(2)]
        weights = torch.stack([m["weights"] for m in micro])
        graded = weights[weights > 0]
        assert len(set(graded.tolist())) == 1
        assert float(weights.sum() / 2) == pytest.approx(1)  # the Trainer divides by two micro-batches
    assert batches.passes == 2
    half = PackedBatches(samples, length=32, batch=4, steps=2, seed=3)
    rows = PackedBatches(samples, length=32, batch=4, epochs=1, seed=3).rows
    assert half.passes == pytest.approx(8 / len(rows))
    one = PackedBatches(samples, length=32, batch=4, accumulate=1, epochs=2, seed=3)
    assert torch.equal(one[0]["input_ids"], torch.cat([batches[0]["input_ids"], batches[1]["input_ids"]]))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3", "deepseek_v3", "gpt2"])
def test_packed_samples_get_the_losses_that_they_have_alone(family):
    model, samples = make(family), some_samples(7)
    check_packing(model, torch.float32)
    packed = PackedBatches(samples, length=48, batch=2, epochs=1)
    alone = []
    with torch.no_grad():
        for sample in samples:
            ids = torch.from_numpy(sample.tokens.astype(np.int64))[None]
            losses = cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
            alone.append(losses[torch.from_numpy(sample.graded[1:])])
    found = held_out_loss(model, samples, packed)
    every = torch.cat(alone).double()
    assert max(len(row) for row in packed.rows) > 1
    assert found.tokens == len(every)
    assert found.loss == pytest.approx(float(every.mean()), abs=2e-6)
    sums_, counts = torch.stack([a.double().sum() for a in alone]), torch.tensor([float(len(a)) for a in alone])
    spread = ((sums_ - found.loss * counts) ** 2).sum() * 7 / 6
    assert found.error == pytest.approx(float(spread.sqrt() / counts.sum()), rel=1e-4)


def test_a_model_whose_samples_see_each_other_is_refused():
    model = make("llama")
    inner = model.model.layers[1].self_attn.o_proj
    inner.register_forward_hook(lambda module, args, out: out + out.cumsum(1))  # a state along the row
    with pytest.raises(ModelError, match="lets packed samples see each other"):
        check_packing(model, torch.float32)


def test_a_hybrid_that_takes_no_packed_samples_trains_on_single_ones():
    from transformers import StableLmConfig, StableLmForCausalLM

    from effpass.runtime.linear_attention import GatedDeltaSettings, make_hybrid

    config = StableLmConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = StableLmForCausalLM(config).eval()
    make_hybrid(model, (1,), GatedDeltaSettings("kda", 2, 2, 16, 16))
    with pytest.raises(ModelError, match="takes no packed samples: a row holds several documents") as refused:
        check_packing(model, torch.float32)
    assert "--no-packing" in str(refused.value.hint)
    rows = make_rows([[sample] for sample in some_samples(2)], 48, pad=0)
    model(input_ids=rows["input_ids"] % 96, position_ids=rows["position_ids"], use_cache=False)


def test_padding_and_prompts_have_no_gradient():
    samples = some_samples(3)
    rows = make_rows([[samples[0], samples[1]], [samples[2]]], 48, pad=0)
    assert int(rows["graded"].sum()) == sum(int(s.graded.sum()) for s in samples)
    assert rows["position_ids"][0, len(samples[0].tokens)] == 0
    assert torch.equal(rows["position_ids"][1], torch.arange(48)), "padding is taken for another sample"
    assert not rows["graded"][:, 0].any()


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_a_stock_adapter_and_its_record(finished, llama):
    lines = metrics(finished)
    first, last = (line for line in lines if "eval_loss_validation" in line)
    assert last["eval_loss_validation"] < first["eval_loss_validation"] - 0.3
    assert [first["anneal"], last["anneal"]] == [1, 0]
    assert {path.name for path in finished.iterdir()} >= {"loss.png", "training.json", "adapter_model.safetensors"}
    assert not finished.with_name("out.training").exists()
    record = json.loads((finished / "training.json").read_text())
    assert record["steps"] == 8
    assert record["settings"]["anneal"] == {"activation": "relu", "start": 0.0, "end": 0.8, "kind": "cosine"}
    model, tokenizer = effpass.load_model(llama).model, effpass.load_model(llama).tokenizer
    folded = effpass.prepare(model, {"version": 1, "passes": [{"merge_lora": {"adapter": str(finished)}}]})
    samples = read_samples(finished.parent / "validation.jsonl", tokenizer)
    like = PackedBatches(samples, length=32, batch=4, epochs=1)
    assert held_out_loss(folded, samples, like).loss == pytest.approx(last["eval_loss_validation"], abs=1e-5)


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "mona"])
def test_an_interrupted_run_resumes_to_the_bit(llama, finished, tmp_path, monkeypatch, optimizer):
    settings = replace(SETTINGS, optimizer=replace(ADAMW, name=optimizer))
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = finished if optimizer == "adamw" else run(llama, tmp_path / "whole", settings)
    folder = tmp_path / "cut"
    stop_after(monkeypatch, 6)
    with pytest.raises(_KilledError):
        run(llama, folder, settings)
    monkeypatch.undo()
    assert not (folder / "out").exists()
    again = run(llama, folder, settings, resume=True)
    assert metrics(again) == metrics(whole)
    one, two = weights(again), weights(whole)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def stop_after(monkeypatch, steps: int, error: type[BaseException] = _KilledError) -> None:
    """Kill the run in step `steps`, when the last checkpoint is older."""
    original = Loop.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == steps:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "training_step", step)


def test_a_run_that_is_stopped_says_how_to_go_on_and_may_go_on_in_smaller_pieces(llama, tmp_path, monkeypatch):
    settings = replace(SETTINGS, lora=LoraSettings(4))
    said: list[str] = []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = run(llama, tmp_path / "whole", settings)
    stop_after(monkeypatch, 6, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "cut", settings, say=said.append)
    monkeypatch.undo()
    assert said[-1] == "stopped: --resume goes on from step 4"
    again = run(llama, tmp_path / "cut", replace(settings, accumulate=4), resume=True, say=said.append)
    assert "going on from step 4" in said
    assert said[-1] == f"saved {again}"
    one, two = weights(again), weights(whole)
    # Gradients are the same but for the order of sums; Adam divides them by their size, and shows small ones' rounding.
    assert max(float((one[name] - two[name]).abs().max()) for name in two) < 1e-2 * ADAMW.lr


def test_adapters_under_autocast_compute_the_same_without_their_detour_over_float32():
    model = make("llama").to(torch.bfloat16)
    trained = make_trained(model, "afa-lora", LoraSettings(4), Anneal(), AnnealSchedule(4))
    with torch.no_grad():
        for parameter in trained.afa.parameters():
            parameter.add_(0.1)
    found, dtypes = [], []
    layer = model.model.layers[0].mlp.up_proj.lora_A["default"]
    layer.register_forward_pre_hook(lambda module, given: dtypes.append(given[0].dtype))
    for around in (nullcontext(), trained.under_autocast()):
        model.zero_grad()
        with around, torch.autocast("cpu", torch.bfloat16):
            model(**batch(12), labels=batch(12)["input_ids"], use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in trained.afa.parameters()])
    assert dtypes == [torch.float32, torch.bfloat16]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("method", ["full", "afa-lora"])
def test_the_activations_that_are_said_are_what_autograd_keeps_of_packed_rows(method):
    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 1024}
    lora, rows, length = LoraSettings(4), 4, 512
    model = make("llama", **sizes).to(torch.float32 if method == "full" else torch.bfloat16)
    trained = make_trained(model, method, lora, Anneal(), AnnealSchedule(4))
    batches = PackedBatches(some_samples(400), length=length, batch=rows, epochs=1)
    given = {name: value for name, value in batches[0].items() if name != "weights"}
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with trained.under_autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**given, use_cache=False).logits
        cross_entropy(logits.float().flatten(0, 1), given["input_ids"].flatten())
    taken = sum(storage.nbytes() for key, storage in kept.items() if key not in own) + 2 * 4 * logits.numel()
    said = estimate(
        model.config, method, lora, "adamw", rows=rows, length=length, bfloat16=True, device=torch.device("cpu")
    ).activations
    assert said == pytest.approx(taken, rel=0.05)  # what is small, such as positions and β, is not counted


def test_memory_is_estimated_of_a_model_with_an_attention_of_its_own():
    from transformers import MptConfig

    config = MptConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=96, max_seq_len=128)
    found = estimate(
        config, "full", LoraSettings(4), "adamw", rows=2, length=64, bfloat16=False, device=torch.device("cpu")
    )
    assert found.activations > 2 * 64 * 32 * 4 * 2


def test_memory_that_runs_out_names_the_estimate_and_the_way_on(llama, tmp_path, monkeypatch):
    stop_after(monkeypatch, 5, torch.OutOfMemoryError)
    with pytest.raises(
        EffpassError, match=r"no memory left on the device; estimated: .*\n  → --resume with a larger --acc"
    ):
        run(llama, tmp_path)


def test_a_resume_with_another_schedule_or_other_data_is_refused(llama, tmp_path, monkeypatch):
    stop_after(monkeypatch, 5)
    with pytest.raises(_KilledError):
        run(llama, tmp_path)
    monkeypatch.undo()
    before = sorted(path.name for path in (tmp_path / "out.training").rglob("*"))
    other = replace(SETTINGS, anneal=Anneal(end=0.5, kind="linear"))
    with pytest.raises(EffpassError, match=r"anneal\.end 0\.8 -> 0\.5; anneal\.kind cosine -> linear"):
        run(llama, tmp_path, other, resume=True)
    with pytest.raises(EffpassError, match="steps 8 -> 9"):
        run(llama, tmp_path, replace(SETTINGS, steps=9), resume=True)
    with pytest.raises(EffpassError, match="data "):
        run(llama, tmp_path, resume=True, data=sums(tmp_path / "other.jsonl", 41))
    with pytest.raises(EffpassError, match="holds a run that did not end"):
        run(llama, tmp_path)
    found = json.loads((tmp_path / "out.training" / "model.json").read_text())
    name = next(iter(found["weights"]))
    found["weights"] = {name: [found["weights"][name][0], found["weights"][name][1] + found["weights"][name][0]]}
    (tmp_path / "out.training" / "model.json").write_text(json.dumps(found))
    with pytest.raises(EffpassError, match="not the one that the run began with: wrong weights"):
        run(llama, tmp_path, resume=True)
    assert sorted(path.name for path in (tmp_path / "out.training").rglob("*")) == before


def test_full_fine_tuning_of_a_mixture_of_experts_gives_a_stock_checkpoint(tmp_path):
    model = checkpoint(tmp_path / "moe", "qwen3_moe")
    settings = replace(SETTINGS, method="full", optimizer=OptimizerConfig(lr=3e-3), steps=4, save_every=0)
    said: list[str] = []
    out = run(model, tmp_path, settings, say=said.append)
    losses = [line["eval_loss_validation"] for line in metrics(out) if "eval_loss_validation" in line]
    assert losses[1] < losses[0] - 0.3
    loaded = effpass.load_model(out)
    assert type(loaded.model).__name__ == "Qwen3MoeForCausalLM"
    assert loaded.tokenizer.chat_template
    assert any("GB of weights, gradients and optimizer state" in line for line in said)
    original, tuned = weights(model), weights(out)
    assert original.keys() == tuned.keys()
    assert all(not torch.equal(original[name], tuned[name]) for name in original if "experts" in name)


def test_an_adapter_of_a_mixture_of_experts_says_what_it_leaves_alone(tmp_path):
    model = checkpoint(tmp_path / "moe", "qwen3_moe")
    said: list[str] = []
    run(model, tmp_path, replace(SETTINGS, method="lora", steps=2, log_every=1, save_every=0), say=said.append)
    assert [line for line in said if "0.05 M of stacked experts have no adapter" in line]


def test_rates_fall_as_the_schedule_says(llama, tmp_path):
    settings = replace(SETTINGS, method="lora", schedule=Schedule(2, "wsd"), log_every=1, save_every=0)
    rates = [line["learning_rate"] for line in metrics(run(llama, tmp_path, settings)) if "learning_rate" in line]
    assert rates[1] == max(rates) == ADAMW.lr
    assert rates[0] == ADAMW.lr / 2
    assert rates[-1] == pytest.approx(ADAMW.lr / 10)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_long_samples_and_quantized_models_are_refused_before_anything_is_made(llama, tmp_path):
    with pytest.raises(EffpassError, match=r"data\.jsonl:35: 7 tokens, and a row has 5 \(40 lines are too long\)"):
        run(llama, tmp_path, replace(SETTINGS, sequence_length=5))
    with pytest.raises(EffpassError, match=r"sequence_length: got 1000, and .* has 256 positions"):
        run(llama, tmp_path, replace(SETTINGS, sequence_length=1000))
    quantized = checkpoint(tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ModelError, match=r"are quantized \(gptq\): they can't be trained"):
        run(quantized, tmp_path)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 0}, "batch: got 0, expected at least 1"),
        ({"batch": 3, "accumulate": 2}, "a batch of 3 rows can't be cut into 2 micro-batches"),
        ({"log_every": 3}, r"save_every: got 4, expected a multiple of log_every \(3\)"),
        ({"steps": 1}, "1 steps, with β held for 1, leave none at β = 0"),
    ],
)
def test_settings_out_of_range_are_refused(llama, tmp_path, changes, says):
    with pytest.raises(EffpassError, match=says):
        run(llama, tmp_path, replace(SETTINGS, **changes))


def test_a_loss_that_is_not_finite_stops_the_run(llama, tmp_path):
    settings = replace(SETTINGS, method="full", optimizer=replace(ADAMW, lr=1e20, clip=0.0), log_every=1, save_every=1)
    with pytest.raises(EffpassError, match=r"the loss is (nan|inf) at step"):
        run(llama, tmp_path, settings)
    assert not (tmp_path / "out").exists()


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "afa-lora"])
def test_two_processes_give_the_losses_of_one(llama, tmp_path, method):
    settings = replace(SETTINGS, method=method, optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.0), steps=6,
                       lora=LoraSettings(4), anneal=Anneal(end=0.5), save_every=0)  # fmt: skip
    one = run(llama, tmp_path, settings)
    adapter = [] if method == "full" else ["--rank", 4, "--anneal-end", 0.5]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29627",
        "-m", "effpass", "--debug", "train", "sft", llama, "--data", tmp_path / "data.jsonl",
        "--validation", tmp_path / "validation.jsonl", "-o", tmp_path / "two", "--method", method, "--lr", 3e-3,
        "--steps", 6, "--batch", 4, "--accumulate", 2, "--sequence-length", 32,
        "--log-every", 2, "--save-every", 0, *adapter,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("step 2/6") == 1
    assert "rows of up to 32 tokens" in done.stderr
    losses = [[line[key] for line in metrics(out) for key in line if "loss" in key] for out in (tmp_path / "two", one)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    mine, theirs = weights(tmp_path / "two"), weights(one)
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-3
