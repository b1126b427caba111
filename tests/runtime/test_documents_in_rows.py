"""Rows of several documents in hybrids, as packing makes them: no document sees another one."""

from __future__ import annotations

import itertools

import pytest
import torch
from linear_layers import FAMILIES, MODELS, MODES, hybrid, layer, settings

from effpass.core.errors import ModelError
from effpass.runtime.linear_attention import (
    make_hybrid,
)
from effpass.runtime.linear_attention.documents import documents

ENDS = [0, 4, 10, 17, 17, 20]  # one document is empty


def flattened(rows: int) -> dict[str, torch.Tensor]:
    """Tokens of five documents in 1 or 2 rows, and their positions."""
    ids = torch.randint(3, 96, (20,), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ENDS)])
    return {"input_ids": ids.view(rows, -1), "position_ids": places.view(rows, -1)}


def alone(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the documents, each in a call of its own."""
    pieces = [ids.flatten()[a:b] for a, b in itertools.pairwise(ENDS) if b > a]
    return torch.cat([model(input_ids=piece[None], use_cache=False).logits[0] for piece in pieces])


@pytest.mark.parametrize("mode", MODES)
def test_documents_of_a_row_are_kept_apart_and_so_are_their_gradients(mode):
    made = layer(mode)
    x = torch.randn(1, 20, 24, dtype=torch.float64, requires_grad=True)
    found = made(x, cu_seq_lens_q=torch.tensor(ENDS, dtype=torch.int32))[0]
    wanted = torch.cat([made(x[:, a:b])[0] for a, b in itertools.pairwise(ENDS) if b > a], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    weight = torch.randn(found.shape, dtype=torch.float64)
    given = [x, *made.parameters()]
    of_found, of_wanted = (torch.autograd.grad((out * weight).sum(), given) for out in (found, wanted))
    for a, b in zip(of_found, of_wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2])
def test_positions_that_restart_and_ends_of_documents_separate_them(family, rows):
    model, given = hybrid(family), flattened(rows)
    with torch.no_grad():
        wanted = alone(model, given["input_ids"]).view(rows, 20 // rows, -1)
        ends, ids = {"cu_seq_lens_q": torch.tensor(ENDS)}, {"input_ids": given["input_ids"]}
        embedded = {"inputs_embeds": model.get_input_embeddings()(given["input_ids"])}
        for call in (given, given | ends, ids | ends, given | {"input_ids": None} | embedded):
            found = model(**call, use_cache=False).logits
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        with pytest.raises(ModelError, match="caches one document in each row"):
            model(**given, use_cache=True)
        with pytest.raises(ModelError, match="comes with an attention mask"):
            model(**ids, **ends, attention_mask=torch.ones(rows, 20 // rows), use_cache=False)


def test_one_document_may_be_cached_and_ends_of_another_form_are_refused():
    model, ids = hybrid(), flattened(1)["input_ids"]
    with torch.no_grad():
        wanted = model(ids).logits
        torch.testing.assert_close(model(ids, cu_seq_lens_q=torch.tensor([0, 20])).logits, wanted)
    for ends, said in ((torch.tensor([ENDS]), r"cu_seq_lens_q is \(1, "), (list(ENDS), "cu_seq_lens_q is list")):
        with pytest.raises(ModelError, match=said):
            model(ids, cu_seq_lens_q=ends, use_cache=False)


def test_positions_are_not_read_where_a_model_is_traced():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = hybrid()
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = {"input_ids": torch.zeros(1, 20, dtype=torch.long), "position_ids": torch.arange(20)[None] % 7}
        assert model(**given, use_cache=False).logits.shape[:2] == (1, 20)


def test_few_numbers_of_documents_reach_the_layers():
    seen = set()
    for count in range(2, 14):
        positions = torch.cat([torch.arange(20 - count + 1), torch.zeros(count - 1, dtype=torch.long)])[None]
        ends = documents({"input_ids": positions, "position_ids": positions})["cu_seq_lens_q"]
        assert ends.unique().tolist() == [0, *range(20 - count + 1, 21)]
        seen.add(len(ends))
    assert seen == {3, 5, 9, 17}


def test_what_the_flattening_collator_makes():
    from transformers import DataCollatorWithFlattening

    model, ids = hybrid(), flattened(1)["input_ids"][0]
    pieces = [{"input_ids": ids[a:b].tolist()} for a, b in itertools.pairwise(ENDS) if b > a]
    for options in ({}, {"return_flash_attn_kwargs": True}):
        given = DataCollatorWithFlattening(return_tensors="pt", **options)(pieces)
        with torch.no_grad():
            found = model(**given, use_cache=False).logits[0]
            torch.testing.assert_close(found, alone(model, ids), rtol=1e-4, atol=1e-5)


def test_documents_are_separated_in_a_compiled_model_and_with_checkpointing():
    model, given = hybrid(), flattened(1)
    given["cu_seq_lens_q"] = torch.tensor(ENDS)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **given: model(**given, use_cache=False), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        wanted = alone(model, given["input_ids"])
        torch.testing.assert_close(compiled(**given).logits[0], wanted, rtol=1e-4, atol=1e-5)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.train()(**given, labels=given["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("family", ["stablelm", "gptj"])
def test_documents_in_a_row_are_refused_where_layers_are_not_told(family):
    model = MODELS[family]()
    make_hybrid(model, (0,), settings())
    for more in ({}, {"cu_seq_lens_q": torch.tensor(ENDS)}):
        with pytest.raises(ModelError, match="a row holds several documents"):
            model(**flattened(1), **more, use_cache=False)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a row holds several documents"):
        torch.compile(model, backend="eager")(**flattened(1), cu_seq_lens_q=torch.tensor(ENDS), use_cache=False)
    model(**flattened(1), attention_mask=torch.ones(1, 20), use_cache=False)
