"""What the decode engine refuses, before it runs anything."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

import effpass
from effpass.core.errors import EffpassError, ModelError
from effpass.runtime.engine import Engine

IDS = families.batch(8)["input_ids"]


@pytest.fixture(scope="module")
def model() -> Any:
    return effpass.prepare(families.make("llama"), {"version": 1, "passes": []})


def test_beam_search(model: Any) -> None:
    with pytest.raises(EffpassError, match=r"no beam search\n  → call transformers' own"):
        model.generate(input_ids=IDS, max_new_tokens=4, num_beams=2)
    assert type(model).generate(model, input_ids=IDS, max_new_tokens=4, num_beams=2).shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[:, :0]}, "the prompt is empty"),
        (
            {"attention_mask": torch.tensor([[1] * 8, [0] * 8])},
            "row 1 of the batch holds no token\n  → leave empty prompts out",
        ),
        (
            {"attention_mask": torch.tensor([[1] * 7 + [0], [1] * 8])},
            "row 0 of the batch is padded on the right\n  → tokenizer.padding_side = 'left'",
        ),
        ({"attention_mask": torch.tensor([[0, 1], [1, 1]])}, "attention_mask is (2, 2), and input_ids (2, 8)"),
        (
            {"input_ids": IDS.repeat(1, 40)},
            "the prompt has 320 tokens, and the model 256 positions\n  → shorten it",
        ),
        (
            {"max_new_tokens": 300},
            "prompt and answer come to 308 tokens, and the model has 256 positions\n  → max_new_tokens=248",
        ),
        ({"position_ids": torch.arange(8).flip(0)[None].expand(2, 8)}, "position_ids are not those of the tokens"),
        ({"cache_implementation": "static"}, "no cache_implementation"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "no output_attentions"),
        ({"use_cache": False}, "no use_cache=False"),
        ({"stop_strings": ["x"]}, "stop_strings=['x'] needs the tokenizer"),
    ],
    ids=lambda value: value.split("\n")[0] if isinstance(value, str) else "",
)
def test_bad_input(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EffpassError) as caught:
        model.generate(**{"input_ids": IDS, "max_new_tokens": 4, **arguments})
    assert message in str(caught.value)


def test_a_cache_of_someone_else(model: Any) -> None:
    other = effpass.prepare(families.make("llama"), {"version": 1, "passes": []})
    cache = other.generate(input_ids=IDS, max_new_tokens=4, return_dict_in_generate=True).past_key_values
    longer = IDS.repeat(1, 2)
    with pytest.raises(EffpassError, match="not one that this model's generate returned"):
        model.generate(input_ids=longer, max_new_tokens=4, past_key_values=cache)
    with pytest.raises(EffpassError, match="holds 2 sequences, and the prompt 1"):
        other.generate(input_ids=longer[:1], max_new_tokens=4, past_key_values=cache)
    with pytest.raises(EffpassError, match="of which the cache holds 11"):
        other.generate(input_ids=IDS, max_new_tokens=4, past_key_values=cache)
    room = cache.capacity
    other.config.max_position_embeddings = 4096
    with pytest.raises(EffpassError, match=f"has room for {room} tokens"):
        other.generate(input_ids=longer, max_new_tokens=room, past_key_values=cache)


def test_out_of_memory_says_what_to_lower(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr("effpass.runtime.session.Session.prefill", full)
    with pytest.raises(EffpassError, match="no room on cpu for 2 sequences of 12 tokens") as caught:
        model.generate(input_ids=IDS, max_new_tokens=4)
    assert "lower the batch, max_new_tokens" in str(caught.value)
    assert not model.effpass_engine._free


def test_models_that_have_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32}
    with pytest.raises(ModelError, match="no decoder that generates"):
        Engine(BartForConditionalGeneration(BartConfig(**small, encoder_ffn_dim=16, decoder_ffn_dim=16)))
    spread = families.make("llama")
    spread.model.layers[1].to("meta")
    with pytest.raises(ModelError, match="weights on cpu, meta; the decode engine runs on one device"):
        Engine(spread)


def test_prepare_leaves_such_a_model_its_own_generate() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()
    ready = effpass.prepare(mamba, {"version": 1, "passes": []})
    assert "generate" not in vars(ready)
    assert "generate is transformers' own" in ready.effpass_report.lines()[-1]
    assert ready.generate(input_ids=IDS[:1], max_new_tokens=2).shape == (1, 10)


def test_attention_to_sinks_stays_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_families import MORE

    monkeypatch.setitem(families.CONFIGS, "gpt_oss", MORE["gpt_oss"])
    ready = effpass.prepare(families.make("gpt_oss"), {"version": 1, "passes": []})
    assert "layers.0.self_attn attends to sinks, which the decode engine lacks" in ready.effpass_report.generates
    assert ready.generate(input_ids=IDS[:1], max_new_tokens=2).shape == (1, 10)
