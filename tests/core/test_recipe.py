"""Recipes: what is read, what is refused and in which words, and that nothing but a RecipeError ever comes out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Gt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effpass.core import registry
from effpass.core.errors import RecipeError
from effpass.core.manager import PassManager
from effpass.core.pass_ import GraphPass, RuntimePass
from effpass.core.plain_yaml import read_yaml
from effpass.core.recipe import Recipe, Step


@dataclasses.dataclass(frozen=True)
class Window:
    size: int
    file: Path | None = None


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    budget: float = 0.5
    artifact: Path | None = None
    layers: tuple[int, ...] = ()
    mode: Literal["prefix", "uniform"] = "prefix"
    strict: bool = True
    label: str = ""
    window: Window | None = None
    files: dict[str, Path] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    scale: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self):
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget must be in (0, 1], got {self.budget}")


class PrefixCache(RuntimePass):
    name = "prefix_cache"
    exact = False
    Options = CacheOptions


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    adapter: Path


class Adapter(GraphPass):
    name = "adapter"
    exact = True
    Options = AdapterOptions


class Plain(GraphPass):
    name = "plain"
    exact = True


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with pytest.MonkeyPatch.context() as patch:
        passes = {cls.name: f"{__name__}:{cls.__name__}" for cls in (PrefixCache, Adapter, Plain)}
        patch.setattr(registry, "BUILTIN", passes)
        yield


def parse(passes: str, **kwargs: Any) -> Recipe:
    return Recipe.parse("version: 1\npasses:\n" + passes, source="r.yaml", **kwargs)


def faults_of(text: Any, **kwargs: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, source="r.yaml", **kwargs)
    return caught.value.message


# -- what is read ---------------------------------------------------------------------------------------------------


def test_an_ordinary_recipe():
    recipe = parse(
        """
  - plain
  - prefix_cache:
      budget: 1        # an int is a number
      artifact: ./profile
      layers: [0, 2, 5]
      mode: uniform
      window: {size: 4, file: w.txt}
      files: {a: x/y, b: /abs}
      limit: 7
      scale: 1e-3
      require: true
  - adapter: {adapter: ~/adapters/a, verify: true}
target: onnx
""",
        base="/recipes",
    )
    assert recipe.target == "onnx"
    assert recipe.steps == (
        Step("plain", Plain.Options()),
        Step(
            "prefix_cache",
            CacheOptions(
                budget=1.0,
                artifact=Path("/recipes/profile"),
                layers=(0, 2, 5),
                mode="uniform",
                window=Window(4, Path("/recipes/w.txt")),
                files={"a": Path("/recipes/x/y"), "b": Path("/abs")},
                limit=7,
                scale=0.001,
            ),
            require=True,
        ),
        Step("adapter", AdapterOptions(Path.home() / "adapters" / "a"), verify=True),
    )
    assert isinstance(recipe.steps[1].options.budget, float)
    plain, cache, adapter = recipe.build()
    assert (type(plain), type(cache), type(adapter)) == (Plain, PrefixCache, Adapter)
    assert cache.options is recipe.steps[1].options
    planned = PassManager.from_recipe(recipe).planned
    assert [(p.require, p.verify) for p in planned] == [(False, False), (True, False), (False, True)]


def test_options_may_be_left_empty_and_anchors_are_fine():
    recipe = parse("  - plain:\n  - prefix_cache: &cache {budget: 0.2}\n  - prefix_cache: *cache\n")
    assert [s.options.budget for s in recipe.steps[1:]] == [0.2, 0.2]
    merged = parse("  - prefix_cache: &cache {budget: 0.2, limit: 3}\n  - prefix_cache: {<<: *cache, budget: 0.3}\n")
    assert [(s.options.budget, s.options.limit) for s in merged.steps] == [(0.2, 3), (0.3, 3)]


def test_words_mean_what_they_say():
    """YAML 1.1 reads the first of these as numbers and truth values, and the last as text."""
    labels = [
        parse(f"  - prefix_cache: {{label: {word}}}\n").steps[0].options.label for word in ("no", "1:30", "2020-01-01")
    ]
    assert labels == ["no", "1:30", "2020-01-01"]
    assert parse("  - prefix_cache: {budget: 2e-1}\n").steps[0].options.budget == 0.2


def test_a_mapping_needs_no_version():
    recipe = Recipe.parse({"passes": ["plain", {"prefix_cache": {"layers": (1, 2), "artifact": Path("p")}}]}, base="/b")
    assert recipe.steps[1].options == CacheOptions(layers=(1, 2), artifact=Path("/b/p"))
    assert Recipe.parse({"passes": []}).steps == ()


def test_a_path_or_name_is_left_alone(monkeypatch):
    """`str | Path` is a hub id or a folder: only the pass can tell."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        adapter: str | Path

    monkeypatch.setattr(Adapter, "Options", Options)
    assert parse("  - adapter: {adapter: org/name}\n").steps[0].options.adapter == "org/name"


# -- files ----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_again(tmp_path):
    recipe = parse(
        f"""
  - prefix_cache: {{budget: 0.25, artifact: {tmp_path}/out/profile, layers: [1, 2], label: '1e-3', window: {{size: 2}}}}
  - adapter: {{adapter: {tmp_path}/elsewhere, require: true, verify: true}}
  - plain
target: aoti
"""
    )
    folder = tmp_path / "out"
    folder.mkdir()
    recipe.save(folder / "recipe.yaml")
    text = (folder / "recipe.yaml").read_text()
    assert text == recipe.to_yaml(folder)
    assert "artifact: profile\n" in text, "below the recipe's folder: relative, so that the folder can move"
    assert f"adapter: {tmp_path}/elsewhere\n" in text, "outside: absolute"
    assert "mode" not in text, "defaults are left out"
    assert Recipe.load(folder / "recipe.yaml") == recipe
    assert [p.name for p in folder.iterdir()] == ["recipe.yaml"]
    folder.rename(tmp_path / "moved")
    assert Recipe.load(tmp_path / "moved" / "recipe.yaml").steps[0].options.artifact == tmp_path / "moved" / "profile"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        parse("  - plain\n").save(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("r.yaml", "old")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read: No such file or directory"),
        (b"", "the recipe is empty"),
        (b"# nothing\n", "the recipe is empty"),
        (b"version: 1\npasses: [\xff]\n", "not UTF-8 text: byte 20 is 0xff"),
        (b"#" * (1 << 20) + b"\n", "larger than 1 MiB"),
        (b"passes: []\n", "'version' is missing"),
        (b"version: 2\npasses: [from_the_future]\n", r"version 2 \(int\) is newer than this effpass reads \(1\)"),
        (b"version: true\npasses: []\n", r"version: got True \(bool\), expected 1"),
        (b"version: one\npasses: []\n", r"version: got 'one' \(str\), expected 1"),
        (b"version: 1\nversion: 1\n", "2:1: 'version' is given twice, first on line 1"),
        (b"version: 1\npasses:\n  - plain: {a: 1, b: 2, a: 3}\n", "3:25: 'a' is given twice, first on line 3"),
        (b"version: 1\npasses: [plain\n", "3:1: while parsing a flow sequence, expected ',' or ']'"),
        (b"- plain\n", r"got \['plain'\] \(list\), expected `version:` and `passes:`"),
        (b"version: 1\n--- {}\n", "2:1: expected a single document"),
        (b"a: !!python/object/apply:os.system [ls]\n", "1:4: the tag .* is not for recipes, which are plain data"),
        (b"version: !!int x\n", "a value does not fit its tag"),
        (b"? [1]\n: 2\n", "1:3: a key must be a word"),
        (b"a: &a [*a]\n", "1:4: an alias inside the value it stands for"),
        (b"a: " + b"[" * 5000, "1:35: nested deeper than 32 levels"),
        (b"a: [" + b"1," * 20000 + b"]", "more than 10000 values"),
        (b"a: \x00\n", "not valid YAML: unacceptable character #x0000"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("value", ["[{}]", "{{<<: [{}]}}"])
def test_an_alias_bomb_is_refused_before_it_expands(value):
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{i}: &a{i} " + value.format(",".join([f"*a{i - 1}"] * 9)) for i in range(1, 12)]
    with pytest.raises(RecipeError, match="more than 10000 values once its aliases are expanded"):
        read_yaml("\n".join(lines), "r.yaml")


# -- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("prefix_cash", "passes[0]: unknown pass 'prefix_cash', did you mean 'prefix_cache'?"),
        ("3", "passes[0]: got 3 (int), expected a pass's name, or one name with its options"),
        ("prefix_cache: 3", "passes[0].prefix_cache: got 3 (int), expected options (name: value)"),
        ("prefix_cache: {budgett: 0.2}", "passes[0].prefix_cache.budgett: unknown option, did you mean 'budget'?"),
        ("prefix_cache: {budget: '0.2'}", "passes[0].prefix_cache.budget: got '0.2' (str), expected float"),
        ("prefix_cache: {budget: true}", "passes[0].prefix_cache.budget: got True (bool), expected float"),
        ("prefix_cache: {budget:}", "passes[0].prefix_cache.budget: got None (NoneType), expected float"),
        ("prefix_cache: {budget: 2}", "passes[0].prefix_cache: budget must be in (0, 1], got 2.0"),
        (
            "prefix_cache: {scale: -1}",
            "passes[0].prefix_cache.scale: got -1 (int), expected float: should be greater than 0",
        ),
        ("prefix_cache: {limit: 1.5}", "passes[0].prefix_cache.limit: got 1.5 (float), expected int or null"),
        ("prefix_cache: {limit: '1'}", "passes[0].prefix_cache.limit: got '1' (str), expected int or null"),
        ("prefix_cache: {strict: 1}", "passes[0].prefix_cache.strict: got 1 (int), expected bool"),
        ("prefix_cache: {label: 1}", "passes[0].prefix_cache.label: got 1 (int), expected str"),
        ("prefix_cache: {artifact: 1}", "passes[0].prefix_cache.artifact: got 1 (int), expected Path or null"),
        ("prefix_cache: {layers: 3}", "passes[0].prefix_cache.layers: got 3 (int), expected tuple[int, ...]"),
        (
            "prefix_cache: {layers: [1, b]}",
            "passes[0].prefix_cache.layers[1]: got 'b' (str): should be a valid integer",
        ),
        (
            "prefix_cache: {mode: prefx}",
            "passes[0].prefix_cache.mode: got 'prefx' (str), expected 'prefix' or 'uniform', did you mean 'prefix'?",
        ),
        (
            "prefix_cache: {window: {size: 1, sise: 2}}",
            "passes[0].prefix_cache.window.sise: unknown option, did you mean 'size'?",
        ),
        ("prefix_cache: {window: {}}", "passes[0].prefix_cache.window: got {} (dict), expected Window or null"),
        ("prefix_cache: {require: yes}", "passes[0].prefix_cache.require: got 'yes' (str), expected bool"),
        ("plain: {size: 1}", "passes[0].plain: got 'size', but this pass has no options"),
        ("adapter", "passes[0].adapter: option 'adapter' is missing"),
        ("{plain: , adapter: 3}", "expected a pass's name, or one name with its options; indent the options further"),
    ],
)
def test_one_fault(step, fault):
    message = faults_of(f"version: 1\npasses:\n  - {step}\n")
    assert message.startswith("r.yaml: passes[0]")
    assert fault in message
    assert "\n" not in message


def test_every_fault_is_reported_at_once():
    message = faults_of(
        """
version: 1
passes:
  - prefix_cache: {budgett: 0.2, limit: x}
  - nonsense
  - plain
  - adapter:
targt: onnx
target: tensorflow
"""
    )
    assert message.splitlines() == [
        "r.yaml: 6 faults",
        "  r.yaml: targt: unknown key, did you mean 'target'?",
        "  r.yaml: target: got 'tensorflow' (str), expected inductor or aoti or onnx or tensorrt",
        "  r.yaml: passes[0].prefix_cache.budgett: unknown option, did you mean 'budget'?",
        "  r.yaml: passes[0].prefix_cache.limit: got 'x' (str), expected int or null",
        "  r.yaml: passes[1]: unknown pass 'nonsense'; known: adapter, plain, prefix_cache",
        "  r.yaml: passes[3].adapter: option 'adapter' is missing",
    ]


@pytest.mark.parametrize(
    ("given_", "fault"),
    [
        ({}, "'passes' is missing, expected a list of passes"),
        ({"passes": None}, "passes: got None (NoneType), expected a list of passes"),
        ({"passes": "plain"}, "passes: got 'plain' (str), expected a list of passes"),
        ({"passes": [None]}, "passes[0]: got None (NoneType), expected a pass's name"),
        ({"passes": [{1: {}}]}, "passes[0]: got 1 (int), expected a pass's name"),
        ({"passes": [], "target": ["onnx"]}, "target: got ['onnx'] (list), expected inductor"),
        ({"passes": [{"prefix_cache": {"label": {1, 2}}}]}, "label: got {1, 2} (set), expected str"),
        ({"passes": [{"prefix_cache": {"label": b"x"}}]}, "label: got b'x' (bytes), expected str"),
        ({"passes": [{"prefix_cache": {3: 4}}]}, "passes[0].prefix_cache.3: unknown option"),
    ],
)
def test_mappings_get_the_same_validation(given_, fault):
    assert fault in faults_of(given_)


def test_a_pass_whose_post_init_breaks_is_a_recipe_error(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Options:
        size: int = 1

        def __post_init__(self):
            raise KeyError("oops")

    monkeypatch.setattr(Plain, "Options", Options)
    assert faults_of({"passes": ["plain"]}) == "r.yaml: passes[0].plain: KeyError: 'oops'"


# -- anything at all ------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

NAMES = st.sampled_from(["plain", "prefix_cache", "adapter", "prefix_cash", "<<", "version", "passes"])
KEYS = st.sampled_from([f.name for f in dataclasses.fields(CacheOptions)] + ["adapter", "require", "verify", "size"])
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([0.5, "prefix", 1])
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), v, max_size=3),
    max_leaves=6,
)
STEPS = (
    NAMES | VALUES | st.dictionaries(NAMES, VALUES | st.dictionaries(KEYS, VALUES, max_size=4), min_size=1, max_size=2)
)
RECIPES = st.fixed_dictionaries({"passes": st.lists(STEPS, max_size=3)}, optional={"version": VALUES, "target": VALUES})


def recipe_or_none(anything: Any) -> Recipe | None:
    try:
        recipe = Recipe.parse(anything)
    except RecipeError:
        return None
    return recipe


@FUZZ
@given(RECIPES | st.dictionaries(st.text(max_size=5), VALUES, max_size=3))
def test_any_mapping_is_a_recipe_or_a_recipe_error(content):
    recipe = recipe_or_none(content)
    if recipe is not None and "nan" not in repr(recipe):  # NaN is unequal to itself
        assert Recipe.parse(recipe.to_yaml()) == recipe


@FUZZ
@given(st.binary(max_size=80) | st.text(max_size=80))
def test_any_text_is_a_recipe_or_a_recipe_error(text):
    recipe_or_none(text)


PIECES = ["\n", "  ", "\n  - ", " {", "}", "[", "]", ": ", ", ", "'", '"', "? ", "version: 1\n", "!!int ", "!!binary "]
PIECES += ["passes:", "plain", "prefix_cache:", "budget", "layers", "0.5", "1e-3", "&a", "*a", "<<", "|", ">-", "~"]


@FUZZ
@given(st.lists(st.sampled_from(PIECES), max_size=25))
def test_any_pieces_of_yaml_are_a_recipe_or_a_recipe_error(pieces):
    recipe_or_none("".join(pieces))
