"""Tables that are measured: kept, taken again, and measured anew where they are of another device."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from families import make

from effpass.core.errors import EffpassError, ModelError
from effpass.core.roofline import device_name
from effpass.trainers.balance import measure
from effpass.trainers.balance.measure import grid, latency_table, rest_seconds
from effpass.trainers.balance.table import read_table, write_table

BUDGETS = (64, 128, 256)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFPASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "_PACKED", 256)
    return make("llama", max_position_embeddings=1024)


def table_of(model, **changes):
    said: list[str] = []
    found = latency_table(model, BUDGETS, 512, block=32, dtype=torch.float32, say=said.append, **changes)
    return found, said


def test_a_table_is_measured_once_and_is_of_this_device_and_model(model, tmp_path):
    table, said = table_of(model)
    assert len(said) == 1
    assert table.source == "measured"
    assert (table.device, table.dtype, table.torch) == (device_name(torch.device("cpu")), "float32", torch.__version__)
    assert "llama, 2 layers, 4 query and 2 key-value heads of 16" in table.model
    assert (table.lengths, table.tokens, table.layers) == ((256, 512), (256, 512), 2)
    assert table.attention_seconds([512], [128])[0, 0] > 0
    assert table_of(model) == (table, [])
    (kept,) = (tmp_path / "cache" / "latency").iterdir()
    assert read_table(kept) == table
    kept.write_text("{")  # damaged: measured again
    again, said = table_of(model)
    assert len(said) == 1
    assert read_table(kept) == again


def test_a_table_of_another_device_warns_and_is_measured_anew(model, tmp_path, caplog):
    own, _ = table_of(model)
    write_table(tmp_path / "own.json", replace(own, torch="another"))
    found, said = table_of(model, file=tmp_path / "own.json")
    assert said == []
    assert found.torch == "another"
    write_table(tmp_path / "other.json", replace(own, device="NVIDIA H100"))
    with caplog.at_level(logging.WARNING, "effpass"):
        found, _ = table_of(model, file=tmp_path / "other.json")
    assert found == own
    assert "was measured on NVIDIA H100" in caplog.text
    assert "measured anew" in caplog.text
    with pytest.raises(EffpassError, match=r"none\.json: No such file"):
        table_of(model, file=tmp_path / "none.json")


def test_a_device_that_can_not_be_measured_goes_by_flops_and_says_so(model, caplog, tmp_path):
    with caplog.at_level(logging.WARNING, "effpass"):
        table, said = table_of(model.to("meta"))
    assert "a meta device can't be measured here: times go by FLOPs" in caplog.text
    assert (table.source, said) == ("flops", [])
    assert not (tmp_path / "cache").exists()
    # Twice the keys of a long document are nearly twice the FLOPs.
    short, long = table.attention_seconds(512, [64, 128])[0]
    assert long / short == pytest.approx(1.87, abs=0.02)


def test_ranks_that_share_a_micro_batch_have_a_table_of_their_part(model, monkeypatch):
    """All lengths with a part of the heads, and a part of the tokens in all else."""
    asked = []

    def attention(heads, groups, *args):
        asked.append((heads, groups, args[2]))
        return ((1.0,) * len(BUDGETS),) * 2

    def rest(model, tokens, *_):
        asked.append(tuple(tokens))
        return 1.0, 2.0

    by_flops = [latency_table(make("llama").to("meta"), BUDGETS, 512, block=32, dtype=torch.float32, ranks=n)
                for n in (1, 2)]  # fmt: skip
    assert by_flops[0].attention[0][0] == pytest.approx(2 * by_flops[1].attention[0][0])
    assert by_flops[0].rest[0] == pytest.approx(2 * by_flops[1].rest[0])
    monkeypatch.setattr(measure, "attention_seconds", attention)
    monkeypatch.setattr(measure, "rest_seconds", rest)
    whole, said = table_of(model)
    found, more = table_of(model, ranks=2)
    assert len(said) == len(more) == 1  # each has a place of its own in the cache
    assert found.model == f"{whole.model} on 2 ranks"
    assert asked == [(4, 2, (256, 512)), (256, 512), (2, 1, (256, 512)), (128, 256)]
    assert (found.lengths, found.tokens) == (whole.lengths, whole.tokens)
    with pytest.raises(ModelError, match="2 key-value heads can't be shared out over 3 ranks"):
        table_of(model, ranks=3)


def test_measuring_leaves_the_model_as_it_was(model):
    model.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradient = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = gradient
    drawn = torch.get_rng_state()
    rest_seconds(model, (64,), torch.device("cpu"), torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.lm_head.weight.grad is gradient
    assert all(p.grad is None for name, p in model.named_parameters() if name != "lm_head.weight")
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_all_weights_but_none_of_the_scores_are_in_the_rest(model, monkeypatch):
    """What is timed differentiates every weight: keys, values and queries too."""
    seen = []
    monkeypatch.setattr(measure, "seconds_of", lambda run, device: seen.append(run) or 1.0)
    assert rest_seconds(model, (64, 128), torch.device("cpu"), torch.float32) == (1.0, 1.0)
    found: set[str] = set()
    handles = [
        p.register_post_accumulate_grad_hook(lambda p, name=name: found.add(name) if p.grad.any() else None)
        for name, p in model.named_parameters()
    ]
    model.set_attn_implementation("effpass_free_attention")
    seen[0]()
    for handle in handles:
        handle.remove()
    assert found == {name for name, _ in model.named_parameters()}


def test_the_grid_ends_where_a_micro_batch_does():
    assert grid(5000) == (256, 512, 1024, 2048, 4096, 5000)
    assert grid(100) == (100,)
