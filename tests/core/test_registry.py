"""Passes by name, from effpass and from other distributions; broken ones hurt nobody else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from distributions import provide

import effpass
from effpass.core import registry
from effpass.core.errors import PluginError
from effpass.core.pass_ import Pass

ROOT = Path(__file__).parents[2]

GOOD = """
    from dataclasses import dataclass
    from effpass import GraphPass

    @dataclass(frozen=True)
    class Options:
        size: int = 3

    class Good(GraphPass):
        \"\"\"Does good.

        And nothing else.
        \"\"\"
        name = "good"
        exact = True
        Options = Options
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "BUILTIN", {})

    def install(distribution, passes, source="", **kwargs):
        provide(tmp_path, monkeypatch, distribution, passes, source, **kwargs)

    return install


def test_effpass_own_passes_are_those_that_pyproject_declares():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["effpass.passes"]
    assert declared == registry.BUILTIN


@pytest.mark.parametrize("name", registry.BUILTIN)
def test_every_own_pass_is_whole(name):
    (row,) = [row for row in registry.describe() if row.name == name]
    assert row.error is None
    assert (row.distribution, row.version) == ("effpass", effpass.__version__)
    assert row.summary
    assert issubclass(registry.load(name), Pass)


def test_what_is_installed_and_removed_later_is_noticed(tmp_path, monkeypatch):
    provide(tmp_path, monkeypatch, "later", {"late": "Late"})
    info = tmp_path / "later" / "later-1.2.3.dist-info"
    assert "late" in registry.names()
    info.rename(tmp_path / "elsewhere")
    assert "late" not in registry.names()
    (tmp_path / "elsewhere").rename(info)
    assert "late" in registry.names()


def test_metadata_of_effpass_itself_adds_nothing(install):
    """An old editable install may name passes that are gone; the table in the code decides."""
    install("effpass", {"gone": "Gone"}, version="0.0.1")
    assert [e.name for e in entry_points(group=registry.GROUP) if e.dist.version == "0.0.1"] == ["gone"]
    assert "gone" not in registry.names()


def test_own_passes_are_found_where_nothing_is_installed():
    """`-S` leaves site-packages out: no metadata at all, and no torch, which a list of names does not need."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from effpass.core import registry; print(registry.names())"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(sorted(registry.BUILTIN))


def test_a_plugin_is_listed_with_its_distribution_and_loaded_lazily(install):
    install("good-dist", {"good": "Good"}, GOOD)
    assert registry.names() == ["good"]
    assert "good_dist" not in sys.modules, "a name is no reason to import"
    assert registry.describe() == [
        registry.PassInfo(
            "good", "good-dist", "1.2.3", "graph", True, False, ("program", "backend"), "Does good.", error=None
        )
    ]
    assert registry.load("good")().options.size == 3


def test_an_unknown_name_gets_a_suggestion(install):
    install("good-dist", {"good": "Good"}, GOOD)
    with pytest.raises(PluginError, match=r"unknown pass 'goood', did you mean 'good'\?\n.*`effpass passes`"):
        registry.load("goood")


def test_a_duplicate_names_both_distributions_and_the_rest_work(install):
    install("good-dist", {"good": "Good", "twice": "Good"}, GOOD)
    install("other-dist", {"twice": "Good"}, GOOD, version="7")
    message = "two distributions provide a pass 'twice': other-dist 7 and good-dist 1.2.3"
    with pytest.raises(PluginError, match=message) as caught:
        registry.load("twice")
    assert caught.value.hint == "uninstall one of them"
    good, twice = registry.describe()
    assert good.error is None
    assert (twice.distribution, twice.version, twice.error) == ("other-dist and good-dist", "7 and 1.2.3", message)
    assert registry.load("good").name == "good"


def test_a_plugin_cannot_take_the_name_of_an_own_pass(install, monkeypatch):
    install("good-dist", {"good": "Good"}, GOOD)
    monkeypatch.setattr(registry, "BUILTIN", {"good": "good_dist:Good"})
    with pytest.raises(PluginError, match=f"'good': effpass {effpass.__version__} and good-dist 1.2.3"):
        registry.load("good")


FAULTS = {
    "does not import": ("import no_such_module_anywhere", "can't be imported: ModuleNotFoundError: No module named"),
    "exits": ("raise SystemExit(3)", "can't be imported: SystemExit: 3"),
    "has no such class": ("", "can't be imported: AttributeError"),
    "is no class": ("Bad = 3", "bad_dist:Bad is 3, not a subclass of effpass.Pass"),
    "is another class": ("class Bad: pass", "not a subclass of effpass.Pass"),
    "has no kind": (
        "from effpass import Pass\nclass Bad(Pass):\n    name = 'bad'\n    exact = True",
        "has no 'kind': subclass GraphPass, WeightsPass or RuntimePass",
    ),
    "has another name": (
        "from effpass import GraphPass\nclass Bad(GraphPass):\n    name = 'worse'\n    exact = True",
        "has the name 'worse', which must be the entry point's, 'bad'",
    ),
    "has no name": (
        "from effpass import GraphPass\nclass Bad(GraphPass):\n    exact = True",
        "has the name None, which must be the entry point's",
    ),
    "does not say whether it is exact": (
        "from effpass import GraphPass\nclass Bad(GraphPass):\n    name = 'bad'",
        r"has exact = None; it must say True \(up to rounding\) or False \(approximate\)",
    ),
    "has options that are no dataclass": (
        "from effpass import GraphPass\nclass Bad(GraphPass):\n    name = 'bad'\n    exact = True\n    Options = dict",
        "has Options = <class 'dict'>, which must be a frozen dataclass",
    ),
    "has options that can change": (
        """
        from dataclasses import dataclass
        from effpass import GraphPass
        @dataclass
        class Options: pass
        class Bad(GraphPass):
            name = 'bad'
            exact = True
            Options = Options
        """,
        "has Options = Options, a dataclass that is not frozen",
    ),
    "has a reserved option": (
        """
        from dataclasses import dataclass
        from effpass import GraphPass
        @dataclass(frozen=True)
        class Options:
            verify: bool = False
        class Bad(GraphPass):
            name = 'bad'
            exact = True
            Options = Options
        """,
        "has an option 'verify', a word that every recipe step understands already",
    ),
    "has annotations that mean nothing": (
        """
        from dataclasses import dataclass
        from effpass import GraphPass
        @dataclass(frozen=True)
        class Options:
            size: "Nonsense" = 3
        class Bad(GraphPass):
            name = 'bad'
            exact = True
            Options = Options
        """,
        "has Options with an annotation that can't be resolved: name 'Nonsense' is not defined",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_plugin_is_reported_and_the_rest_work(install, fault):
    source, message = FAULTS[fault]
    install("good-dist", {"good": "Good"}, GOOD)
    install("bad-dist", {"bad": "Bad"}, source)
    bad, good = registry.describe()
    assert bad.error is not None
    assert good.error is None
    assert (bad.distribution, bad.version, bad.kind, bad.exact) == ("bad-dist", "1.2.3", None, None)
    with pytest.raises(PluginError, match=message) as caught:
        registry.load("bad")
    assert "from bad-dist 1.2.3" in str(caught.value)
    assert caught.value.message == bad.error
    assert registry.load("good").name == "good"
