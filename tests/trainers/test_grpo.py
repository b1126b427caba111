"""Reinforcement learning by TRL: what is sampled and learned, β within a cycle, resume, and what is refused.

Runs need trl; refusals that come before it don't.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import batch, make
from tiny_tuning import checkpoint, metrics, quiet, weights, write

from effpass.core.errors import EffpassError
from effpass.passes.weights.peft_adapter import read_adapter
from effpass.trainers.afa_lora import AnnealSchedule, LoraSettings, attach
from effpass.trainers.finetune.grpo import GrpoSettings, reinforce
from effpass.trainers.finetune.reward import load_reward
from effpass.trainers.finetune.rollouts import use_engine
from effpass.trainers.finetune.settings import Anneal
from effpass.trainers.lm.config import OptimizerConfig
from effpass.trainers.lm.model import set_experts

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")

SETTINGS = GrpoSettings(
    OptimizerConfig(lr=3e-2, name="adamw", weight_decay=0.0), method="afa-lora", steps=8, prompts=2, group=4, updates=2,
    max_new_tokens=6, lora=LoraSettings(4), anneal=Anneal(end=0.5), save_every=4,
)  # fmt: skip

REWARDS = """
def letters(completions):
    return [sum(c.isalpha() for c in text) / 6 for text in completions]

def matches(prompts, completions, answer):
    return [float(text.startswith(a)) for text, a in zip(completions, answer)]

def broken(completions):
    return [float("nan")] * len(completions)

def short(completions):
    return [1.0]

def words(completions):
    return completions

def fails(completions):
    return [1 / 0 for text in completions]

def asks(completions, solution):
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    (tmp_path / "grpo_test_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)


def run(model: Path, folder: Path, settings: GrpoSettings = SETTINGS, *, reward: str = "letters", **options) -> Path:
    folder.mkdir(exist_ok=True)
    data = write(folder / "data.jsonl", *({"prompt": f"say {i}: ", "answer": "a"} for i in range(5)))
    reward = f"grpo_test_rewards:{reward}"
    return reinforce(str(model), data, reward, folder / "out", settings, **{"say": quiet, **options})


@needs_trl
def test_beta_is_held_within_a_cycle_and_the_result_is_stock_lora(llama, tmp_path):
    out = run(llama, tmp_path)
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["anneal"] for line in lines] == [1, 0.5, 0.5, 0, 0, 0, 0, 0]  # after the step: the next one's
    assert [line["step"] for line in lines if "reward" in line] == [1, 3, 5, 7]  # sampled once a cycle
    assert all(0 <= line.get("reward", 0) <= 1 for line in lines)
    assert len(read_adapter(out).updates) == 14
    assert any(float(t.abs().max()) > 0 for name, t in weights(out).items() if "lora_B" in name)


@needs_trl
def test_a_reward_that_can_be_had_is_learned(llama, tmp_path):
    settings = replace(SETTINGS, steps=24, prompts=4, group=8, updates=1, save_every=0, method="full")
    rewards = [line["reward"] for line in metrics(run(llama, tmp_path, settings))]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2


@needs_trl
def test_completions_are_sampled_through_the_activation(llama, tmp_path, monkeypatch):
    """β as the layers read it while tokens are sampled."""
    from effpass.trainers.afa_lora import variant

    seen: list[tuple[bool, float]] = []
    original = variant.annealed

    def watch(z, beta, activation):
        seen.append((torch.is_grad_enabled(), round(float(beta), 3)))
        return original(z, beta, activation)

    monkeypatch.setattr(variant, "annealed", watch)
    run(llama, tmp_path)
    sampled = list(dict.fromkeys(beta for learns, beta in seen if not learns))
    learned = list(dict.fromkeys(beta for learns, beta in seen if learns))
    assert sampled == learned == [1, 0.5, 0]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_engine_samples_what_transformers_samples_from_weights_as_they_are(family):
    """Greedy, from prompts of two lengths, while weights and β move."""
    model = make(family).train()
    set_experts(model)
    experts = model.config._experts_implementation
    adapter = attach(model, AnnealSchedule(8, end=0.75), LoraSettings(4))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-2)
    ids = batch(9)["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert use_engine(model) is None
    seen = []
    for _ in range(7):
        seen.append(adapter.model.generate(**asked))
        assert model.training
        assert model.config._experts_implementation == experts
        with torch.no_grad():
            assert torch.equal(seen[-1], type(model).generate(model, **asked))
        model(input_ids=ids, labels=ids.flip(1), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
    assert len({tuple(s.flatten().tolist()) for s in seen}) == 7  # stale weights would show


def test_a_model_that_the_engine_lacks_keeps_its_own_generate():
    model = make("llama")
    model.config.num_kv_shared_layers = 1
    assert "llama shares key-value caches between layers" in (use_engine(model) or "")
    assert "generate" not in vars(model)


class _KilledError(Exception):
    pass


@needs_trl
def test_an_interrupted_run_resumes_to_the_bit(llama, tmp_path, monkeypatch):
    from trl import GRPOTrainer

    whole = run(llama, tmp_path / "whole")
    original = GRPOTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise _KilledError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "training_step", step)
    with pytest.raises(_KilledError):
        run(llama, tmp_path / "cut")
    monkeypatch.setattr(GRPOTrainer, "training_step", original)
    with pytest.raises(EffpassError, match=r"anneal\.end 0\.5 -> 0\.25"):
        run(llama, tmp_path / "cut", replace(SETTINGS, anneal=Anneal(end=0.25)), resume=True)
    again = run(llama, tmp_path / "cut", resume=True)
    timed = ("step_time",)
    for ours, theirs in zip(metrics(again), metrics(whole), strict=True):
        assert {k: (v, theirs.get(k)) for k, v in ours.items() if theirs.get(k) != v and k not in timed} == {}
    one, two = weights(again), weights(whole)
    assert all(torch.equal(one[name], two[name]) for name in two)


@needs_trl
def test_a_divergence_from_the_model_before_leaves_one_adapter(llama, tmp_path):
    settings = replace(SETTINGS, kl=0.1, steps=4, save_every=0)
    out = run(llama, tmp_path, settings)
    assert metrics(out)[-1]["kl"] >= 0
    assert not [path for path in out.iterdir() if path.is_dir()]


@needs_trl
def test_a_field_of_the_data_reaches_the_reward_and_conversations_work(llama, tmp_path):
    settings = replace(SETTINGS, steps=2, save_every=0, anneal=Anneal(end=0.1), method="lora")
    assert metrics(run(llama, tmp_path, settings, reward="matches"))[0]["reward"] >= 0


@needs_trl
@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ("broken", r"grpo_test_rewards:broken is nan for the completion '"),
        ("short", r"grpo_test_rewards:short returned 1 numbers for 8 completions"),
        ("words", r"grpo_test_rewards:words returned \[.*, expected a number for each completion"),
        (
            "fails",
            r"grpo_test_rewards:fails failed: ZeroDivisionError: division by zero\n  → .*grpo_test_rewards\.py:18",
        ),
        ("asks", r"grpo_test_rewards:asks takes 'solution', which is no field of the data"),
    ],
)
def test_rewards_that_are_no_finite_numbers_stop_the_run(llama, tmp_path, reward, says):
    with pytest.raises(EffpassError, match=says):
        run(llama, tmp_path, reward=reward)
    assert not (tmp_path / "out").exists()


def test_a_checked_reward_names_what_is_wrong():
    reward = load_reward("grpo_test_rewards:broken")
    with pytest.raises(EffpassError, match=r"is nan for the completion 'x'"):
        reward(prompts=["a"], completions=["x"], trainer_state=None)
    assert load_reward("grpo_test_rewards:matches")(prompts=["a"], completions=["bc"], answer=["b"]) == [1.0]
    for name, says in (
        ("grpo_test_rewards", r"--reward: got 'grpo_test_rewards'"),
        ("no_such_module:f", r"no_such_module can't be imported: ModuleNotFoundError"),
        ("grpo_test_rewards:lettres", r"has no function 'lettres', did you mean 'letters'"),
    ):
        with pytest.raises(EffpassError, match=says):
            load_reward(name)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group": 1}, "group: got 1, expected at least 2"),
        ({"prompts": 3, "group": 3}, "9 completions can't be shared by 2 updates of 1 micro-batches"),
        ({"steps": 7}, "steps: got 7, expected whole cycles of 2 updates"),
        ({"lora": LoraSettings(4, dropout=0.1)}, "dropout: got 0.1: what is sampled and what learns would be two"),
        ({"temperature": 0.0}, "temperature: got 0"),
        ({"save_every": 4, "log_every": 3}, "save_every: got 4, expected a multiple of log_every"),
    ],
)
def test_settings_out_of_range_are_refused(changes, says):
    with pytest.raises(EffpassError, match=says):
        replace(SETTINGS, **changes)


@needs_trl
def test_faulty_prompts_are_named(llama, tmp_path):
    for rows, says in (
        ([{"prompt": "a", "answer": "b"}, {"prompt": "a"}], r"d\.jsonl:2: field 'answer' is missing; it has 'prompt'"),
        ([{"question": "a"}], r"d\.jsonl:1: field 'prompt' is missing; it has 'question'"),
        ([{"prompt": "a"}], "1 prompts, and a cycle takes 2"),
        ([{"prompt": "a" * 300}] * 2, "the longest prompt and 6 new tokens are 306, and the model has 256 positions"),
    ):
        data = write(tmp_path / "d.jsonl", *rows)
        with pytest.raises(EffpassError, match=says):
            reinforce(str(llama), data, "grpo_test_rewards:letters", tmp_path / "out", SETTINGS, say=quiet)
    assert not list(tmp_path.glob("out*"))


def test_without_trl_the_error_names_what_to_install(llama, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trl" else found(name, *a))
    with pytest.raises(EffpassError, match=r"runs on trl, which is not installed\n  → pip install 'effpass\[grpo\]'"):
        run(llama, tmp_path)
    assert not (tmp_path / "out").exists()
