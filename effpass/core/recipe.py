"""A recipe: the passes to apply to a model, their order and their options.

::

    version: 1
    passes:
      - merge_lora: {adapter: ./adapter}     # paths are relative to the recipe's folder
      - structured_pruning:
          artifact: ./pruned
          require: true                      # raise if this pass rewrites nothing
          verify: true                       # compare the model's outputs before and after this pass
    target: onnx                             # optional: inductor, aoti, onnx or tensorrt

Recipes are written by hand or by ``effpass optimize`` (:mod:`effpass.search`), and are accepted by every entry point of
effpass. A recipe is validated as a whole before any work starts, and the error lists all of its faults, not only the
first. :meth:`effpass.core.manager.PassManager.from_recipe` makes it runnable.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effpass.core.errors import PluginError, RecipeError, did_you_mean
from effpass.core.options import dump_options, read_options, shown
from effpass.core.pass_ import Pass
from effpass.core.plain_yaml import MAX_BYTES, read_yaml, write_yaml
from effpass.core.registry import STEP_KEYS, load
from effpass.core.user_path import expand_user
from effpass.core.whole import write_text

__all__ = ["TARGETS", "Recipe", "Step", "named_recipes"]

VERSION = 1
TARGETS = ("inductor", "aoti", "onnx", "tensorrt")


@dataclass(frozen=True)
class Step:
    """One pass of a recipe.

    Attributes:
        name: registry key of the pass.
        options: validated instance of the pass's `Options`; its paths are absolute.
        require: raise when the pass rewrites nothing.
        verify: compare the outputs before and after the pass and report the largest difference.
    """

    name: str
    options: Any
    require: bool = False
    verify: bool = False


@dataclass(frozen=True)
class Recipe:
    """An ordered list of passes, validated.

    Attributes:
        steps: passes in the order in which they run.
        target: target that the program is lowered to, one of `TARGETS`; None leaves the choice to the caller.
        base: folder that relative paths were resolved against.
        source: name of the recipe in messages, usually its path.
    """

    steps: tuple[Step, ...]
    target: str | None = None
    base: Path = field(default_factory=Path.cwd, compare=False)
    source: str = field(default="recipe", compare=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a file, or one of those that come with effpass by its name, such as ``fast-decode``.

        Raises:
            RecipeError: the file does not exist, is larger than 1 MiB or not UTF-8, or :meth:`parse` finds a fault.
        """
        path = expand_user(path)
        own = named_recipes()
        if not path.is_file():
            path = own.get(os.fspath(path), path)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            message = f"{path}: can't be read: {error.strerror or error}"
            is_name = path.name == os.fspath(path) and not path.suffix
            hint = f"recipes that have a name: {', '.join(own)}" if is_name else None
            raise RecipeError(message, hint=hint) from error
        return cls.parse(data, base=path.absolute().parent, source=str(path))

    @classmethod
    def parse(
        cls, given: str | bytes | Mapping[str, Any], *, base: str | os.PathLike[str] = ".", source: str = "recipe"
    ) -> Recipe:
        """Validate a recipe given as YAML text or as the mapping that such text parses to.

        Args:
            given: YAML text, in which ``version`` is required, or a mapping, in which it may be left out.
            base: folder that relative paths are resolved against.
            source: name of the recipe in messages.

        Raises:
            RecipeError: the recipe is not valid. The message lists every fault with its path:
                ``"r.yaml: passes[2].prefix_kv.budgett: unknown option"``.
        """
        base = Path(base).absolute()
        if isinstance(given, (str, bytes)):
            given = read_yaml(given, source)
            if "version" not in given:
                raise RecipeError(f"{source}: 'version' is missing", hint=f"begin the recipe with `version: {VERSION}`")
        _check_version(given.get("version", VERSION), source)
        faults = [
            f"{source}: {key}: unknown key{did_you_mean(str(key), ('version', 'passes', 'target'))}"
            for key in given
            if key not in ("version", "passes", "target")
        ]
        target = given.get("target")
        if target is not None and target not in TARGETS:
            faults.append(f"{source}: target: got {shown(target)}, expected {' or '.join(TARGETS)}")
        items = given.get("passes")
        if not isinstance(items, (list, tuple)):
            problem = "'passes' is missing" if "passes" not in given else f"passes: got {shown(items)}"
            faults.append(f"{source}: {problem}, expected a list of passes")
            items = ()
        steps = [_read_step(item, base, f"{source}: passes[{i}]", faults) for i, item in enumerate(items)]
        if faults:
            raise RecipeError(
                faults[0] if len(faults) == 1 else "\n  ".join([f"{source}: {len(faults)} faults", *faults]),
                hint="`effpass passes` lists the passes",
            )
        return cls(tuple(step for step in steps if step is not None), target, base, source)

    def build(self) -> list[Pass]:
        """Create an instance of each pass, in order.

        Raises:
            PluginError: a pass is no longer available since the recipe was validated.
            EffpassError: a pass can't be created with its options.
        """
        return [load(step.name)(step.options) for step in self.steps]

    def to_yaml(self, folder: str | os.PathLike[str] | None = None) -> str:
        """Serialize the recipe as YAML that :meth:`parse` accepts; options that have their default value are left out.

        Args:
            folder: folder in which the text will be saved. Paths inside it are written relative to it, all others as
                absolute paths; None writes all paths as absolute ones.
        """
        passes: list[Any] = []
        for step in self.steps:
            options = dump_options(step.options, None if folder is None else Path(folder).absolute())
            options |= {key: True for key in STEP_KEYS if getattr(step, key)}
            passes.append({step.name: options} if options else step.name)
        content = {"version": VERSION, "passes": passes} | ({"target": self.target} if self.target else {})
        return write_yaml(content)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to `path` atomically, with paths relative to the folder of `path`."""
        path = Path(path)
        write_text(path, self.to_yaml(path.absolute().parent))


def named_recipes() -> dict[str, Path]:
    """Files of the recipes that come with effpass, by recipe name."""
    return {path.stem: path for path in sorted(Path(__file__).parents[1].glob("recipes/*.yaml"))}


def _check_version(version: object, source: str) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise RecipeError(f"{source}: version: got {shown(version)}, expected {VERSION}")
    if version > VERSION:
        raise RecipeError(
            f"{source}: version {shown(version)} is newer than this effpass reads ({VERSION})", hint="update effpass"
        )


def _read_step(item: object, base: Path, where: str, faults: list[str]) -> Step | None:
    """Read one item of `passes`. Its faults are appended to `faults`; None is returned when there are any so far."""
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, Mapping) or len(item) != 1:
        fault = f"{where}: got {shown(item)}, expected a pass's name, or one name with its options"
        if isinstance(item, Mapping) and any(value is None for value in item.values()):
            fault += "; indent the options further than the name"
        faults.append(fault)
        return None
    ((name, options),) = item.items()
    if not isinstance(name, str):
        faults.append(f"{where}: got {shown(name)}, expected a pass's name")
        return None
    try:
        options_class = load(name).Options
    except PluginError as error:
        faults.append(f"{where}: {error.message}")
        return None
    where = f"{where}.{name}"
    switches = {}
    if isinstance(options, Mapping):
        switches = {key: options[key] for key in STEP_KEYS if key in options}
        options = {key: value for key, value in options.items() if key not in STEP_KEYS}
        for key, value in switches.items():
            if not isinstance(value, bool):
                faults.append(f"{where}.{key}: got {shown(value)}, expected bool")
    read, faults_here = read_options(options_class, options, base=base, where=where)
    faults += faults_here
    return None if faults else Step(name, read, **switches)
