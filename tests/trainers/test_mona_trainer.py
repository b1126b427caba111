"""MONA inside the transformers Trainer and accelerate."""

from __future__ import annotations

import pytest
import torch

from effpass.trainers import MONA


@pytest.fixture
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def examples() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 32, (12, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_the_trainer_trains_saves_and_resumes(model, tmp_path):
    import copy

    from transformers import Trainer, TrainingArguments

    def trainer(net: torch.nn.Module, steps: int) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=3,
            max_grad_norm=1.0, learning_rate=1e-2, lr_scheduler_type="constant_with_warmup", warmup_steps=2, seed=0,
            report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        optimizer = MONA(net, lr=1e-2)
        return Trainer(net, arguments, train_dataset=examples(), optimizers=(optimizer, None))

    fresh = copy.deepcopy(model)
    straight = trainer(model, 5)
    straight.train()
    rates = [entry["learning_rate"] for entry in straight.state.log_history if "learning_rate" in entry]
    assert rates[:4] == pytest.approx([0.0, 5e-3, 1e-2, 1e-2])
    resumed = trainer(fresh, 5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accelerate(model):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = MONA(model, lr=1e-2)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for row in examples()[:4]:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**{name: value[None] for name, value in row.items()}).loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            wrapped.step()
            wrapped.zero_grad()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {int(state["step"]) for state in optimizer.state.values() if "step" in state} == {2}
