"""Packed text and micro-batches: a pure function of the seed, however the batch is cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from effpass.core.errors import EffpassError
from effpass.trainers.lm.batches import MicroBatches, evaluation_batches, source_names
from effpass.trainers.lm.config import Config, OptimizerConfig, Schedule, Source, Stage
from effpass.trainers.lm.corpus import Corpus, find_files, read_corpus, write_corpus
from effpass.trainers.lm.tokenizer import END
from effpass.trainers.loop import make_loader

TEXT = bytes(range(256)) * 300  # what token i is says where it came from, modulo 256


def config(accumulate: int = 1, **changes: object) -> Config:
    stages = [
        Stage(steps=6, sequence_length=128, batch=8, accumulate=accumulate),
        Stage(steps=2, sequence_length=512, batch=4, accumulate=accumulate),
    ]
    data = [Source(text=["x"], weight=2), Source(task="needle"), Source(task="copy", options={"letters": 3})]
    given = {"model": {}, "data": data, "stages": stages, "optimizer": OptimizerConfig(lr=1.0, name="adamw")}
    return Config(**{**given, "schedule": Schedule(warmup=0), **changes})


@pytest.fixture
def corpus() -> Corpus:
    tokens = np.arange(60_000, dtype=np.uint16)
    return Corpus(tokens[:50_000], tokens[50_000:])


def all_rows(config: Config, corpus: Corpus, world: int) -> list[dict[str, torch.Tensor]]:
    """The whole batch of every step, put together from the processes' micro-batches."""
    ranks = [MicroBatches(config, {0: corpus}, rank, world) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {8 * config.accumulate}
    steps = []
    for step in range(8):
        parts = [ranks[r][step * config.accumulate + m] for m in range(config.accumulate) for r in range(world)]
        steps.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    return steps


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_the_batch_is_the_same_however_it_is_cut(corpus, accumulate, world):
    whole = all_rows(config(), corpus, 1)
    for step, expected in zip(all_rows(config(accumulate), corpus, world), whole, strict=True):
        for key in expected:
            assert torch.equal(step[key], expected[key])


def test_a_loader_begins_where_it_is_told_and_workers_change_nothing(corpus):
    batches = MicroBatches(config(), {0: corpus})
    whole = [batches[i] for i in range(len(batches))]
    for workers in (0, 2):
        found = list(make_loader(batches, 3, workers, False))
        assert len(found) == 5
        for one, other in zip(found, whole[3:], strict=True):
            assert all(torch.equal(one[key], other[key]) for key in other)


def test_another_seed_gives_other_batches(corpus):
    one, other = (MicroBatches(config(seed=seed), {0: corpus})[0]["input_ids"] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_weights_grade_answers_and_sum_to_one(corpus):
    batches = MicroBatches(config(), {0: corpus})
    seen = set()
    for i in range(len(batches)):
        batch = batches[i]
        assert torch.allclose(batch["weights"].sum(1), torch.ones(len(batch["source"])))
        assert not batch["weights"][:, 0].any()  # nothing stands before the first token
        for ids, weights, source in zip(batch["input_ids"], batch["weights"], batch["source"].tolist(), strict=True):
            seen.add(source)
            if source == 0:
                assert torch.equal(weights[1:], weights[1:2].expand(len(ids) - 1))
                continue
            graded = bytes(ids[weights > 0].tolist())
            if source == 1:  # " 4821" for every question
                assert len(graded) % 5 == 0
                assert all(
                    graded[k : k + 1] == b" " and graded[k + 1 : k + 5].isdigit() for k in range(0, len(graded), 5)
                )
            else:
                assert len(graded) % 3 == 0
                assert graded.isalpha()
            assert ids[-1] == END
    assert seen == {0, 1, 2}


def test_sources_come_by_their_weights(corpus):
    large = config(stages=[Stage(steps=50, sequence_length=128, batch=64)])
    batches = MicroBatches(large, {0: corpus})
    counts = np.bincount(np.concatenate(batches._sources))
    assert counts / counts.sum() == pytest.approx([0.5, 0.25, 0.25], abs=0.03)


def test_a_pass_over_the_text_reads_every_sequence_once_and_the_next_in_another_order(corpus):
    length = 1000
    passes = [[corpus.sequence(around * 50 + i, length, (0, 0)) for i in range(50)] for around in range(2)]
    for sequences in passes:
        starts = [int(s[0]) for s in sequences]
        assert len({start // length for start in starts}) == 50
        assert all(np.array_equal(s, np.arange(s[0], s[0] + length)) for s in sequences)
    assert [int(s[0]) for s in passes[0]] != [int(s[0]) for s in passes[1]]


def test_held_out_sequences_ask_one_question(corpus):
    run = config()
    sizes = {0: 0, 1: 0, 2: 0}
    for batch in evaluation_batches(run, {0: corpus}, run.stages[1]):
        (source,) = set(batch["source"].tolist())
        sizes[source] += len(batch["source"])
        if source == 0:
            assert int(batch["input_ids"].min()) >= 50_000
        else:
            assert (batch["weights"] > 0).sum(1).tolist() == [{1: 5, 2: 3}[source]] * len(batch["source"])
    assert sizes == {0: 10_000 // 512, 1: 64, 2: 64}


def test_a_batch_that_processes_cannot_share_is_refused(corpus):
    with pytest.raises(
        EffpassError, match=r"a batch of 8 sequences can't be shared by 3 processes with 1 micro-batches"
    ):
        MicroBatches(config(), {0: corpus}, 0, 3)


def test_a_text_shorter_than_a_sequence_is_refused():
    short = Corpus(np.zeros(300, dtype=np.uint16), np.zeros(0, dtype=np.uint16))
    with pytest.raises(EffpassError, match=r"data\[0\]: 300 tokens to train on, and a stage has sequences of 512"):
        MicroBatches(config(), {0: short})


def test_source_names():
    data = [Source(text=["x"]), Source(task="needle"), Source(task="needle", options={"keys": 2}), Source(text=["y"])]
    assert source_names(config(data=data)) == ["text1", "needle1", "needle2", "text2"]


# -- files ----------------------------------------------------------------------------------------------------------


def test_documents_are_joined_by_end_tokens_and_split_without_overlap(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 20_000 + "é")
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"q": f"q{i}", "n": 1, "a": f"a{i}"}) + "\n" for i in range(9000))
    )
    files = find_files(["*.txt", "b.jsonl", "a*"], tmp_path, "data[0]")
    assert [file.name for file in files] == ["a.txt", "b.jsonl"]
    write_corpus(tmp_path / "out", files, None, 0.2, 3, "data[0]")
    corpus = read_corpus(tmp_path / "out")
    documents = [b"x" * 20_000 + "é".encode(), *(f"q{i}\na{i}".encode() for i in range(9000))]
    expected = [token for document in documents for token in (*document, END)]
    assert len(corpus.training) + len(corpus.held_out) == len(expected)
    assert len(corpus.held_out) == 16384 * round(len(expected) // 16384 * 0.2)
    joined = sorted([*corpus.training.tolist(), *corpus.held_out.tolist()])
    assert joined == sorted(expected)
    first = corpus.training[:100].tolist()
    assert first in (expected[:100], expected[16384:16484], expected[32768:32868])


def test_the_split_is_a_function_of_the_seed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"".join(b"%d " % i for i in range(30_000)))
    files = find_files(["a.txt"], tmp_path, "data[0]")
    found = []
    for i, seed in enumerate((1, 1, 2)):
        write_corpus(tmp_path / str(i), files, None, 0.3, seed, "data[0]")
        found.append(read_corpus(tmp_path / str(i)).held_out.tolist())
    assert found[0] == found[1] != found[2]


def test_variables_stand_in_the_names_and_not_their_values(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setenv("CORPUS", str(tmp_path))
    (file,) = find_files(["$CORPUS/*.txt"], Path("/"), "data[0]")
    assert file.name == "$CORPUS/a.txt"
    (file,) = find_files(["$STDLIB/this.py"], Path("/"), "data[0]")
    assert file.name == "$STDLIB/this.py"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("$NOWHERE/x", r"data\[2\]: the environment variable 'NOWHERE' in .* is not set"),
        ("none*.txt", r"data\[2\]: no file matches 'none\*\.txt'"),
    ],
)
def test_files_that_are_not_there(tmp_path, monkeypatch, pattern, message):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(EffpassError, match=message):
        find_files([pattern], tmp_path, "data[2]")


def test_text_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(EffpassError, match="not UTF-8 text: byte 2 is 0xff"):
        write_corpus(tmp_path / "out", find_files(["a.txt"], tmp_path, "d"), None, 0.0, 0, "d")
    (tmp_path / "a.jsonl").write_text('{"a": "b"}\n[1]\n')
    with pytest.raises(EffpassError, match=r"a\.jsonl:2: not a JSON object"):
        write_corpus(tmp_path / "out", find_files(["a.jsonl"], tmp_path, "d"), None, 0.0, 0, "d")


def test_lines_of_json_end_with_a_line_feed_alone(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "one\u2028two"}\n\n{"a": "three"}\n', encoding="utf-8")
    write_corpus(tmp_path / "out", find_files(["a.jsonl"], tmp_path, "d"), None, 0.0, 0, "d")
    text = bytes(read_corpus(tmp_path / "out").training.astype("uint8")).decode("utf-8", "replace")
    assert "one\u2028two" in text
    assert "three" in text


def test_too_little_text_to_hold_out(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    with pytest.raises(EffpassError, match=r"1001 tokens are too few to hold out a share of 0\.1 in blocks of 16384"):
        write_corpus(tmp_path / "out", find_files(["a.txt"], tmp_path, "d"), None, 0.1, 0, "d")
