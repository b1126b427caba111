"""EAGLE-3 heads as drafts: the text, the head against itself run whole, and the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from speculative_drafts import KINDS, layer_config, make_head, prepared
from torch import Tensor

from effpass.core.errors import ArtifactError, EffpassError, ModelError
from effpass.runtime.speculative import (
    EagleDraft,
    EagleHead,
    HeadConfig,
    NGramDraft,
    Speculator,
    chain,
    generate,
    read_head,
    write_head,
)

GIVEN = families.batch(11)
PADDED = {k: GIVEN[k] for k in ("input_ids", "attention_mask")}
FREE = {"max_new_tokens": 20, "eos_token_id": None}
FLAGS = ("norm_before_residual", "norm_before_fc", "norm_output")


def speculate(model: Any, draft: Any, **arguments: Any) -> tuple[Tensor, Any]:
    speculator = Speculator(model.effpass_engine, draft, switches=False)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    return type(model).generate(model, **arguments, custom_generate=loop), speculator


@pytest.mark.parametrize("kind", ["chain", "static", "eagle2", "c2t, keeps all"])
@pytest.mark.parametrize("vocabulary", [40, 96])
def test_greedy_is_plain_greedy(kind: str, vocabulary: int) -> None:
    model = prepared()
    expected = families.make("llama").generate(**PADDED, **FREE)
    out, found = speculate(model, EagleDraft(make_head(model, vocabulary), KINDS[kind]), **PADDED, **FREE)
    assert torch.equal(out, expected)
    assert found.last.tokens == 38


def test_sampling_is_what_it_is_without_it() -> None:
    model, texts = prepared(), []
    for draft in (EagleDraft(make_head(model), KINDS["static"]), NGramDraft()):
        torch.manual_seed(0)
        texts.append(speculate(model, draft, **PADDED, **FREE, do_sample=True)[0])
    assert torch.equal(texts[0], texts[1])


class _Watched(EagleDraft):
    """Keeps what it proposed, with the text and logits that it was proposed from."""

    def start(self, target: Any) -> Any:
        at_work = super().start(target)
        self.seen: list[tuple[list[list[int]], Tensor, Tensor]] = []
        logits: list[Tensor] = []
        propose, extend, step = at_work.propose, at_work.extend, at_work.step

        def proposing(progress: Any, sampled: Any) -> Any:
            texts = [progress.ids[b, : int(progress.count[b])].tolist() for b in range(2)]
            logits.clear()
            tree = propose(progress, sampled)
            self.seen.append((texts, tree.tokens, torch.stack(logits, 1)))
            return tree

        def extending(progress: Any) -> Tensor:
            logits.append(extend(progress))
            return logits[-1]

        def stepping(*arguments: Any) -> Tensor:
            found = step(*arguments)
            logits.append(found[:, 0])
            return found

        at_work.propose, at_work.extend, at_work.step = proposing, extending, stepping  # type: ignore[method-assign]
        return at_work


@pytest.mark.parametrize("flag", [None, *FLAGS])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_chain_is_the_head_run_whole(flag: str | None, layers: int) -> None:
    """Logits of a chain, from caches, against those of the head on the whole text with its own states behind it."""
    model, reference = prepared(), families.make("llama")
    flags = {} if flag is None else {flag: True}
    head = make_head(model, layers=layers, **flags)
    draft = _Watched(head, chain(3))
    speculate(model, draft, **PADDED, **FREE)
    head.set_attn_implementation("eager")
    for texts, tokens, logits in draft.seen:
        for row, text in enumerate(texts):
            ids = torch.tensor([text[3 if row == 0 else 0 :]])
            if len(text) >= 31:  # the row has ended
                continue
            states = reference(ids, output_hidden_states=True).hidden_states
            features = head.features(torch.cat([states[tap] for tap in head.head_config.taps], -1))[:, :-1]
            ids = ids[:, 1:]
            for step in range(3):
                count = ids.shape[1]
                mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
                out = head(ids, torch.arange(1, count + 1)[None], features, attention_mask=mask)
                torch.testing.assert_close(logits[row, step], out.logits[0, -1], rtol=1e-4, atol=1e-5)
                features = torch.cat((features, out.hidden[:, -1:]), 1)
                ids = torch.cat((ids, tokens[row, step + 1].view(1, 1)), 1)


def by_concatenation(head: EagleHead, ids: Tensor, places: Tensor, features: Tensor, mask: Tensor) -> Any:
    """Logits and states of a head as the paper writes it: the first layer's input is [e; h]."""
    angles, flags = head.rotary_emb(features, places), head.head_config
    hidden = torch.cat((head.embed_tokens(ids).to(features.dtype), features), -1)
    for index, layer in enumerate(head.layers):
        normed = layer.input_layernorm(hidden if index else hidden.chunk(2, -1)[0])
        if index == 0:
            hidden = hidden.chunk(2, -1)[1]
            normed = torch.cat((normed, layer.hidden_norm(hidden)), -1)
            hidden = layer.hidden_norm(hidden) if flags.norm_before_residual else hidden
        given = {"position_embeddings": angles, "attention_mask": mask, "position_ids": places}
        hidden = hidden + layer.self_attn(hidden_states=normed, **given)[0]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    normed = head.norm(hidden)
    return head.lm_head(normed), normed if flags.norm_output else hidden


@pytest.mark.parametrize("flag", [None, *FLAGS])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_head_is_its_formula(flag: str | None, layers: int) -> None:
    """The same bits; with `taken`, those of the last token that is not padding."""
    head = make_head(families.make("llama"), layers=layers, **({} if flag is None else {flag: True}))
    head.set_attn_implementation("eager")
    torch.manual_seed(2)
    ids, places, features = torch.randint(96, (3, 5)), torch.arange(5).expand(3, -1), torch.randn(3, 5, 64)
    mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    logits, hidden = by_concatenation(head, ids, places, features, mask)
    out = head(ids, places, features, attention_mask=mask)
    assert torch.equal(out.logits, logits)
    assert torch.equal(out.hidden, hidden)
    last = head(ids, places, features, taken=torch.tensor([2, 5, 1]), attention_mask=mask)
    rows, columns = torch.arange(3), torch.tensor([1, 4, 0])
    torch.testing.assert_close(last.logits[:, 0], logits[rows, columns])  # a product of fewer rows
    assert torch.equal(last.hidden[:, 0], hidden[rows, columns])


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts(length: int) -> None:
    model, ids = prepared(), GIVEN["input_ids"][1:, :length]
    expected = families.make("llama").generate(ids, **FREE)
    assert torch.equal(speculate(model, EagleDraft(make_head(model), chain(3)), input_ids=ids, **FREE)[0], expected)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    head = make_head(families.make("llama"), norm_before_residual=True)
    return write_head(head, tmp_path / "head", verifier="some/model", architecture="LlamaForCausalLM", tokens=4)


def test_what_was_written_is_read(folder: Path) -> None:
    model = families.make("llama")
    head, again = make_head(model, norm_before_residual=True), read_head(folder)
    assert again.embed_tokens.weight.is_meta  # it is the model's
    assert again.head_config.taps == (0, 1)
    again.share(model)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    features, ids, places = torch.randn(1, 5, 64), torch.arange(5)[None], torch.arange(5)[None]
    for one in (head, again):
        one.set_attn_implementation("eager")
    assert torch.equal(head(ids, places, features).logits, again(ids, places, features).logits)


def test_a_config_that_names_no_taps(folder: Path) -> None:
    """As older ones do: they are the second layer, the middle one, and the last but three."""
    head = EagleHead(HeadConfig(layer_config(), 96, (2, 6, 10)))
    other = write_head(head, folder.parent / "three", verifier="", architecture="", tokens=1)
    content = json.loads((other / "config.json").read_text())
    del content["eagle_aux_hidden_state_layer_ids"]
    (other / "config.json").write_text(json.dumps(content))
    assert read_head(other, 13).head_config.taps == (2, 6, 10)


def test_generate_takes_the_folder(folder: Path) -> None:
    model = prepared()
    expected = families.make("llama").generate(**PADDED, **FREE)
    assert torch.equal(model.generate(**PADDED, **FREE, draft=folder, tree="eagle2"), expected)
    with pytest.raises(ArtifactError, match="no classifier there"):
        model.generate(**PADDED, **FREE, draft=folder, tree="c2t")


def test_a_head_of_another_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="for a model of width 64 with 96 tokens and more than 1 layers, and this one"):
        prepared(vocab_size=80).generate(**PADDED, **FREE, draft=folder)


def test_the_folder_is_not_written_over(folder: Path) -> None:
    with pytest.raises(EffpassError, match="exists"):
        write_head(make_head(families.make("llama")), folder, verifier="", architecture="", tokens=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speculators_model_type": "mtp"}, "a speculator of kind mtp of llama layers\n  → effpass runs eagle3"),
        ({"fc_norm": True}, "fc_norm"),
        ({"draft_vocab_size": 0}, "draft_vocab_size 0"),
        ({"draft_vocab_size": "x"}, "draft_vocab_size 'x'"),
        ({"draft_vocab_size": 41}, "config.json makes it (41"),
        ({"eagle_aux_hidden_state_layer_ids": None}, "eagle_aux_hidden_state_layer_ids None"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 1]}, "fc.weight is (64, 128), and config.json makes it (64, 192)"),
        ({"norm_before_fc": True}, "lacks input_norm.weight"),
        ({"transformer_layer_config": None}, "not subscriptable"),
        ({"target_hidden_size": 32}, "target_hidden_size is not the head's own"),
    ],
    ids=lambda value: value.split("\n")[0] if isinstance(value, str) else "",
)
def test_damaged_configs(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError) as caught:
        read_head(folder)
    assert message in str(caught.value)


def test_any_value_of_any_key_gives_a_head_or_an_artifact_error(folder: Path) -> None:
    """And takes no memory for sizes that the file beside it does not have."""
    path, refused = folder / "config.json", 0
    content = json.loads(path.read_text())
    places = [content, content["transformer_layer_config"], content["speculators_config"]]
    for place in places:
        for key, kept in list(place.items()):
            for value in (None, -1, 0, 1 << 40, 0.5, "x", [1], {}):
                place[key] = value
                path.write_text(json.dumps(content))
                try:
                    read_head(folder)
                except ArtifactError:
                    refused += 1
            place[key] = kept
    assert refused > 100


def test_damaged_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    for change, message in (
        ({"d2t": tensors["d2t"] + 90}, "d2t names tokens that the model does not have"),
        ({"layers.3.mlp.up_proj.weight": torch.zeros(2)}, "has an unknown tensor layers.3"),
    ):
        save_file({**tensors, **change}, path)
        with pytest.raises(ArtifactError, match=message):
            read_head(folder)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="truncated"):
        read_head(folder)


def test_the_speculators_package_reads_it(tmp_path: Path) -> None:
    """Where it is installed; it asks for older versions of other packages than effpass does."""
    from safetensors.torch import load_file

    speculators = pytest.importorskip("speculators")
    model = families.make("llama")
    model.save_pretrained(tmp_path / "model")
    folder = write_head(
        make_head(model, norm_before_residual=True), tmp_path / "head", verifier=str(tmp_path / "model"),
        architecture="LlamaForCausalLM", tokens=4,
    )  # fmt: skip
    theirs = speculators.SpeculatorModel.from_pretrained(str(folder))
    ours = read_head(folder)
    ours.share(model)
    assert type(theirs).__name__ == "Eagle3DraftModel"
    assert theirs.config.eagle_aux_hidden_state_layer_ids == [0, 1]
    saved = set(load_file(folder / "model.safetensors"))
    assert saved == set(ours.state_dict()) - {"embed_tokens.weight"}
    for name in saved:
        assert torch.equal(ours.state_dict()[name], theirs.state_dict()[name])
    # The embeddings are the model's. speculators 0.9 reads them too, but initializes them anew in some processes.
    theirs.embed_tokens = ours.embed_tokens
    tapped, ids = torch.randn(1, 9, 128), GIVEN["input_ids"][1:, :9]
    theirs.layers[0].self_attn.config._attn_implementation = "eager"
    ours.set_attn_implementation("eager")
    places, mask = torch.arange(1, 10)[None], torch.full((9, 9), float("-inf")).triu(1)[None, None]
    both = torch.cat((theirs.embed_tokens(ids), theirs.fc(tapped)), -1)
    angles = theirs.rotary_emb(both, places)
    hidden = theirs.layers[0](both, attention_mask=mask, position_ids=places, position_embeddings=angles)
    out = ours(ids, places, ours.features(tapped), attention_mask=mask)
    torch.testing.assert_close(out.hidden, hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logits, theirs.lm_head(theirs.norm(hidden)), rtol=1e-5, atol=1e-6)
