"""Artifacts: what is written, which model they fit, and that damaged or hostile files give one clear error."""

from __future__ import annotations

import copy
import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from effpass.core.artifact import Artifact, read_safetensors
from effpass.core.errors import ArtifactError
from effpass.core.fingerprint import TOLERANCE, Fingerprint


class Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)


class Tied(nn.Module):
    """Embedding, blocks and a head that is tied to the embedding."""

    def __init__(self, layers: int = 12, width: int = 32, inner: int = 64, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(100, width)
        self.layers = nn.ModuleList(Block(width, inner) for _ in range(layers))
        self.head = nn.Linear(width, 100, bias=False)
        self.head.weight = self.embed.weight
        self.config = type("Config", (), {"model_type": "tied"})()


class Other(Tied):
    pass


TENSORS = {
    "keep": torch.tensor([0, 2, 3]),
    "scale": torch.rand(2, 5, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "nothing": torch.empty(0, 3),
}


def make(model: nn.Module | None = None, **changes) -> Artifact:
    given_ = {
        "pass_name": "structured_pruning",
        "version": 2,
        "options": {"sparsity": 0.25},
        "fingerprint": Fingerprint.of(model or Tied()),
        "provenance": {"data": "text/", "seed": 3},
        "metrics": {"kl": 0.01},
        "tensors": TENSORS,
    }
    return Artifact(**{**given_, **changes})


def load(folder, **changes) -> Artifact:
    return Artifact.load(folder, **{"expect_pass": "structured_pruning", "max_version": 2, **changes})


# -- writing and reading --------------------------------------------------------------------------------------------


def test_saved_and_loaded_again(tmp_path):
    artifact = make()
    artifact.save(tmp_path / "new" / "a")
    assert sorted(p.name for p in (tmp_path / "new" / "a").iterdir()) == ["effpass.json", "effpass.safetensors"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a"], "nothing temporary is left"
    again = load(tmp_path / "new" / "a")
    for name in ("pass_name", "version", "options", "fingerprint", "provenance", "metrics"):
        assert getattr(again, name) == getattr(artifact, name)
    assert again.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name], tensor)


def test_views_and_shared_tensors_are_saved_as_what_they_show(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    make(tensors={"t": base.T, "row": base[1], "again": base[1]}).save(tmp_path / "a")
    tensors = load(tmp_path / "a").tensors
    assert torch.equal(tensors["t"], base.T)
    assert torch.equal(tensors["again"], base[1])


def test_an_artifact_is_replaced_and_nothing_else_is(tmp_path):
    folder = tmp_path / "a"
    make(metrics={"kl": 1}).save(folder)
    make(metrics={"kl": 2}, tensors={"keep": torch.ones(1)}).save(folder)
    assert load(folder).metrics == {"kl": 2}
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"a: holds thesis.tex, which is no part of an artifact"):
        make(metrics={"kl": 3}).save(folder)
    assert load(folder).metrics == {"kl": 2}
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(ArtifactError, match="file: is a file"):
        make().save(file)
    assert file.read_text() == "text"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"kl": float("nan")}}, "is no JSON: Out of range float"),
        ({"options": {"t": torch.ones(1)}}, "is no JSON: Object of type Tensor"),
        ({"tensors": {"../x": torch.ones(1)}}, "'../x' is no tensor's name"),
        ({"tensors": {"c": torch.ones(1, dtype=torch.complex64)}}, "dtype"),
        ({"version": 0}, "version: 0, expected name and number"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, changes, message):
    make(metrics={"kl": 1}).save(tmp_path / "a")
    with pytest.raises(ArtifactError, match=message):
        make(**changes).save(tmp_path / "a")
    assert load(tmp_path / "a").metrics == {"kl": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# -- the wrong artifact ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    make().save(tmp_path / "a")
    return tmp_path / "a"


def edit(folder, **changes):
    path = folder / "effpass.json"
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_another_pass_or_a_newer_version(folder):
    with pytest.raises(ArtifactError, match="an artifact for the pass 'structured_pruning', not for 'prefix_kv'"):
        load(folder, expect_pass="prefix_kv")
    with pytest.raises(ArtifactError, match=r"version 2 of a structured_pruning artifact, this effpass reads 1"):
        load(folder, max_version=1)
    assert load(folder, max_version=9).version == 2


def test_tensors_are_those_the_pass_expects(folder):
    known = {name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
    load(folder, expect_tensors=known)
    load(folder, expect_tensors=dict.fromkeys(TENSORS, (None, None)))
    for changes, message in [
        ({"extra": (None, None), "and": (None, None)}, "missing tensors: and, extra"),
        ({"keep": ((4,), None)}, r"tensor 'keep' has shape \[3\], expected \[4\]"),
        ({"keep": ((3,), torch.int32)}, "tensor 'keep' has dtype int64, expected int32"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            load(folder, expect_tensors={**known, **changes})
    with pytest.raises(ArtifactError, match="unknown tensors: mask, nothing"):
        load(folder, expect_tensors={"keep": (None, None), "scale": (None, None)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"effpass": 2}, "effpass: got 2, this effpass reads 1"),
        ({"effpass": ...}, "effpass: got None, this effpass reads 1"),
        ({"effpass": True}, "effpass: got True"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"metrics": ...}, "missing key 'metrics'"),
        ({"pass": 3}, "pass: 3, version: 2, expected name and number"),
        ({"version": "2"}, "version: '2', expected name and number"),
        ({"options": []}, r"options: got \[\], expected an object"),
        ({"fingerprint": {}}, "fingerprint: expected the keys architecture, model_type"),
        ({"tensors": {"keep": {"shape": [3], "dtype": "load"}}}, "tensors: 'keep' is .* expected shape and dtype"),
        ({"tensors": {"keep": {"shape": [3], "dtype": "int64"}}}, "unknown tensors: mask, nothing, scale"),
    ],
)
def test_a_description_that_does_not_fit(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "effpass.json: not JSON"),
        (b"[]", "effpass.json: not a JSON object"),
        (b'{"effpass": 1, "effpass": 1}', "the key 'effpass' is given twice"),
        (b'{"effpass": NaN}', "NaN is no JSON number"),
        (b"\xff", "not UTF-8: byte 0 is 0xff"),
        (b"[" * 100000, "nested too deeply"),
        (b" " * (16 << 20) + b"{}", "larger than 16 MiB"),
        (b"9" * 5000, "Exceeds the limit"),
    ],
)
def test_a_description_that_is_none(folder, content, message):
    (folder / "effpass.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_files_that_are_not_there(tmp_path, folder):
    with pytest.raises(ArtifactError, match=r"nowhere: no such folder\n.*a relative path starts from the recipe's"):
        load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"effpass.json: a file, not an artifact's folder"):
        load(folder / "effpass.json")
    (folder / "effpass.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"a: no effpass.safetensors there"):
        load(folder)


# -- the wrong model ------------------------------------------------------------------------------------------------


def test_the_same_model_in_any_dtype_fits():
    model = Tied()
    artifact = make(model)
    artifact.check_model(model)
    artifact.check_model(copy.deepcopy(model).bfloat16())
    artifact.check_model(copy.deepcopy(model).half())
    artifact.check_model(copy.deepcopy(model).double())
    artifact.check_model(torch.compile(model, backend="eager"))
    untied = copy.deepcopy(model)
    untied.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    artifact.check_model(untied)


def test_sixteen_matrices_are_sketched_evenly():
    weights = Fingerprint.of(Tied()).weights
    assert len(weights) == 16
    assert "embed.weight" in weights
    assert {name.split(".")[1] for name in weights if name.startswith("layers")} == {str(i) for i in range(12)}
    assert not any("norm" in name for name in weights)
    assert len(Fingerprint.of(nn.Linear(3, 2)).weights) == 1
    assert len(Fingerprint.of(nn.LayerNorm(3)).weights) == 2, "no matrix: the vectors stand in"


def test_a_sketch_measures_how_far_weights_moved():
    """The estimate of ‖ΔW‖ / ‖W‖ over 16 weights has a relative error of about 1/√32 = 18 %; three times that."""
    model = Tied()
    artifact = make(model)
    for change, fits in [(0.002, True), (0.01, False)]:
        torch.manual_seed(1)
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for weight in moved.parameters():
                weight += change * weight.norm() * nn.functional.normalize(torch.randn_like(weight), dim=None)
        if fits:
            artifact.check_model(moved)
        else:
            with pytest.raises(ArtifactError, match="wrong weights") as caught:
                artifact.check_model(moved)
            measured = float(caught.value.message.split("about ")[1].split("%")[0]) / 100
            assert measured == pytest.approx(change, rel=0.55)


def test_other_weights_are_named_with_both_numbers_and_can_be_allowed(folder):
    artifact = load(folder)
    retrained = Tied(seed=1)
    with pytest.raises(
        ArtifactError, match=r"wrong weights: they differ by about 1\d\d\.\d% .*most at '(.*)'"
    ) as caught:
        artifact.check_model(retrained)
    name = caught.value.message.split("most at '")[1].split("'")[0]
    ours, theirs = (Fingerprint.of(m).weights[name].projection for m in (retrained, Tied()))
    assert f"whose projection is {ours:.6g} and should be {theirs:.6g}" in caught.value.message
    assert '"weights": "any"' in caught.value.hint
    assert TOLERANCE == 0.004
    fingerprint = json.loads((folder / "effpass.json").read_text())["fingerprint"]
    edit(folder, fingerprint={**fingerprint, "weights": "any"})
    load(folder).check_model(retrained)
    assert Fingerprint.of(Tied(), any_weights=True) == load(folder).fingerprint


def test_weights_that_became_nan_do_not_fit():
    model = Tied()
    artifact = make(model)
    with torch.no_grad():
        model.layers[3].up.weight[0, 0] = float("nan")
    with pytest.raises(ArtifactError, match=r"wrong weights: .*'layers.3.up.weight', whose projection is nan"):
        artifact.check_model(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Other(), "architecture is 'Other', the artifact was learned for 'Tied'"),
        (Tied(inner=48), r"layers.\*.down.weight is 12 times 32x48, the artifact was learned for 12 times 32x64"),
        (Tied(layers=3), r"layers.\*.down.weight is 3 times 32x64, the artifact was learned for 12 times 32x64"),
    ],
)
def test_another_architecture_is_named(model, message):
    with pytest.raises(ArtifactError, match=f"^wrong model: {message}"):
        make().check_model(model)


def test_a_parameter_more_or_another_order_of_shapes_is_named():
    model = Tied()
    model.layers[0].down.bias = nn.Parameter(torch.zeros(32))
    with pytest.raises(ArtifactError, match=r"layers.\*.down.bias is 1 times 32, the artifact was learned for missing"):
        make().check_model(model)
    model = Tied()
    model.config.model_type = "other"
    with pytest.raises(ArtifactError, match="model_type is 'other', the artifact was learned for 'tied'"):
        make().check_model(model)
    first, last = Tied(), Tied()
    first.layers[0].up, last.layers[-1].up = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)
    with pytest.raises(ArtifactError, match="hash of parameter names and shapes"):
        make(first).check_model(last)


def test_a_model_without_weights_is_compared_by_architecture():
    with torch.device("meta"):
        meta = Tied()
    make().check_model(meta)
    assert Fingerprint.of(meta).weights == "any"
    with torch.device("meta"):
        other = Tied(layers=3)
    with pytest.raises(ArtifactError, match=r"layers.\*.down.weight is 3 times"):
        make().check_model(other)


# -- safetensors ----------------------------------------------------------------------------------------------------


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_an_ordinary_file_with_metadata(tmp_path):
    tensors = {
        "a": torch.rand(2, 3),
        "b": torch.tensor(1.5, dtype=torch.float16),
        "c": torch.ones(3).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    read = read_safetensors(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n].float(), tensors[n].float()) for n in tensors)
    link = tmp_path / "link.safetensors"  # a hub cache is made of links
    link.symlink_to(tmp_path / "t.safetensors")
    assert read_safetensors(link).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", b"", 0, "not JSON"),
        ({}, b"", 1 << 40, r"truncated: 10 bytes, the header alone should have 1099511627776"),
        ({}, b"", (1 << 64) - 1, "truncated"),
        (b"[]", b"", None, "its header is no JSON object"),
        (b'{"a": 1, "a": 2}', b"", None, "the key 'a' is given twice"),
        ({"__metadata__": {"a": 1}}, b"", None, "__metadata__ must hold strings"),
        ({"a": entry([1], 0, 4)}, b"", None, "truncated or too long: 0 bytes of tensors, expected 4"),
        ({"a": entry([1], 0, 4)}, b"x" * 5, None, "truncated or too long: 5 bytes of tensors, expected 4"),
        (
            {"a": entry([1], 0, 4), "b": entry([1], 2, 6)},
            b"x" * 6,
            None,
            "'b' at bytes 2 to 6 overlaps the tensor before",
        ),
        (
            {"a": entry([1], 0, 4), "b": entry([1], 8, 12)},
            b"x" * 12,
            None,
            "'b' at bytes 8 to 12 leaves a gap before it",
        ),
        ({"a": entry([2], 0, 4)}, b"x" * 4, None, r"tensor 'a' \(F32 \[2\]\) has 4 bytes, expected 8"),
        ({"a": entry([1 << 62, 1 << 62], 0, 4)}, b"x" * 4, None, "has 4 bytes, expected"),
        ({"a": entry([-1], 0, 4)}, b"x" * 4, None, r"has shape \[-1\]"),
        ({"a": entry([True], 0, 4)}, b"x" * 4, None, r"has shape \[True\]"),
        ({"a": entry([1], 4, 0)}, b"x" * 4, None, "has -4 bytes, expected 4"),
        ({"a": {**entry([1], 0, 4), "data_offsets": [0]}}, b"x" * 4, None, r"has data_offsets \[0\]"),
        ({"a": entry([1], 0, 4, "PICKLE")}, b"x" * 4, None, "has dtype 'PICKLE'; known: BOOL"),
        ({"a": entry([1], 0, 4, ["F32"])}, b"x" * 4, None, r"has dtype \['F32'\]"),
        ({"a": {"dtype": "F32"}}, b"", None, "needs dtype, shape and data_offsets and nothing else"),
        ({"a": 3}, b"", None, "needs dtype, shape and data_offsets"),
        ({"../../etc/passwd": entry([1], 0, 4)}, b"x" * 4, None, "'../../etc/passwd' is no tensor's name"),
        ({"/etc/passwd": entry([1], 0, 4)}, b"x" * 4, None, "'/etc/passwd' is no tensor's name"),
        ({"a\0b": entry([1], 0, 4)}, b"x" * 4, None, "is no tensor's name"),
        ({"": entry([1], 0, 4)}, b"x" * 4, None, "'' is no tensor's name"),
    ],
)
def test_hostile_headers(tmp_path, header, data, length, message):
    path = tmp_path / "t.safetensors"
    write(path, header, data, length)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_safetensors(path)
    assert str(path) in caught.value.message


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "t.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 1 << 31))
        file.truncate(1 << 32)  # a hole: no disk is used
    with pytest.raises(ArtifactError, match="its header has 2147483648 bytes, more than the 100000000"):
        read_safetensors(path)


def test_what_is_no_regular_file(tmp_path):
    with pytest.raises(ArtifactError, match="can't be read: No such file"):
        read_safetensors(tmp_path / "none")
    with pytest.raises(ArtifactError, match="it is not a regular file"):
        read_safetensors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="it is not a regular file"):  # and does not wait for a writer
        read_safetensors(tmp_path / "pipe")
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(ArtifactError, match="truncated: 3 bytes"):
        read_safetensors(tmp_path / "short")


# -- anything at all ------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

EDITS = st.lists(
    st.tuples(st.integers(0, 4095), st.integers(0, 3), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
)


def mutate(data: bytes, edits) -> bytes:
    for at, kind, value in edits:
        at %= len(data) + 1
        if kind == 0:
            data = data[:at] + value + data[at + len(value) :]  # overwrite
        elif kind == 1:
            data = data[:at] + value + data[at:]  # insert
        elif kind == 2:
            data = data[:at]  # truncate
        else:
            data = data[:at] + data[at + value[0] :]  # delete
    return data


@FUZZ
@given(st.sampled_from(["effpass.json", "effpass.safetensors"]), EDITS)
def test_any_damage_gives_an_artifact_or_an_artifact_error(tmp_path_factory, name, edits):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        make().save(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(mutate(whole, edits))
    try:
        artifact = load(folder)
        assert {n: tuple(t.shape) for n, t in artifact.tensors.items()} == {
            n: tuple(t.shape) for n, t in TENSORS.items()
        }
        artifact.check_model(Tied(layers=1))
    except ArtifactError as error:
        assert error.message  # noqa: PT017 - either outcome is fine, any other exception is not
    finally:
        (folder / name).write_bytes(whole)


HEADER = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "dtype", ""]),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3) | st.sampled_from(["F32", "BOOL", 4, 0, [1], [0, 4]]),
        lambda v: (
            st.lists(v, max_size=3)
            | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), v, max_size=3)
            | st.fixed_dictionaries({"dtype": st.just("F32"), "shape": st.just([1]), "data_offsets": v})
        ),
        max_leaves=5,
    ),
    max_size=3,
)


@FUZZ
@given(HEADER, st.binary(max_size=12), st.integers(-3, 3))
def test_any_header_gives_tensors_or_an_artifact_error(tmp_path_factory, header, data, off):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    write(path, header, data, max(len(json.dumps(header)) + off, 0))
    try:
        tensors = read_safetensors(path)
    except ArtifactError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
