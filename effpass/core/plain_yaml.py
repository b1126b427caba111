"""YAML for recipes: plain data only, scalars as in YAML 1.2, and no constructs that are likely to be mistakes.

Refused with line and column are duplicate keys, tags, a second document, keys that are not strings, more than 1 MiB,
more than 32 levels, and aliases that expand to more than 10,000 values. Other anchors, aliases and merge keys are
allowed.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from effpass.core.errors import RecipeError
from effpass.core.options import shown

__all__ = ["MAX_BYTES", "read_yaml", "write_yaml"]

MAX_BYTES = 1 << 20

# The scalars of YAML 1.2. PyYAML implements YAML 1.1, in which `1e-3` is a string, `no` is false, `1:30` is 90 and
# `010` is 8.
_SCALARS = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,18})", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
]
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "null", "merge", "str", "seq", "map")}
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_MAX_DEPTH = 32
_MAX_NODES = 10_000


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML copies it on the first add_implicit_resolver
    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.count += 1
        if self.depth > _MAX_DEPTH or self.count > _MAX_NODES:
            limit = (
                f"nested deeper than {_MAX_DEPTH} levels"
                if self.depth > _MAX_DEPTH
                else f"more than {_MAX_NODES} values"
            )
            raise yaml.MarkedYAMLError(None, None, limit, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.1 or YAML 1.2 would not read as strings."""


for _name, _pattern, _first in _SCALARS:
    _tag, _regexp = f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(_tag, _regexp, _first)
    _Dumper.add_implicit_resolver(_tag, _regexp, _first)


def read_yaml(
    data: str | bytes, source: str, what: str = "recipe", keys: str = "`version:` and `passes:`"
) -> dict[str, Any]:
    """Parse one YAML mapping with string keys.

    Args:
        data: text to parse.
        source: name of the text in messages.
        what: kind of file, for messages.
        keys: keys that the file begins with, for messages.

    Raises:
        RecipeError: the text is too large, not UTF-8, not valid YAML, contains something that is refused (see the
            module's docstring), or is not a mapping.
    """
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{source}: larger than {MAX_BYTES >> 20} MiB, which no {what} is")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{source}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{source}: the {what} is empty", hint=f"begin it with {keys}")
        _check_node(node, {})
        content = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{source}{place}: {', '.join(filter(None, (error.context, error.problem)))}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    except (ValueError, LookupError) as error:  # a scalar that does not match its explicit tag: `!!int x`
        raise RecipeError(f"{source}: a value does not fit its tag: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(content, dict):
        raise RecipeError(f"{source}: got {shown(content)}, expected {keys}")
    return content


def write_yaml(content: dict[str, Any]) -> str:
    """Serialize strings, numbers, bools, None, lists and dicts as YAML that :func:`read_yaml` accepts."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _check_node(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Refuse duplicate keys, tags other than those of plain data, and aliases that expand to too many nodes.

    Args:
        node: node to check, with everything below it.
        sizes: id of a node → number of nodes that it expands to; None while the node is being visited.

    Returns:
        The number of nodes that `node` expands to.
    """
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise _fault(node, "an alias inside the value it stands for")
        return size
    if node.tag not in _TAGS:
        raise _fault(node, f"the tag {node.tag!r} is not for recipes, which are plain data")
    sizes[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
                raise _fault(
                    key, f"a key must be a word, got {key.value if isinstance(key, yaml.ScalarNode) else key.id!r}"
                )
            if key.value in lines:
                raise _fault(key, f"{key.value!r} is given twice, first on line {lines[key.value]}")
            lines[key.value] = key.start_mark.line + 1
        children = [child for pair in node.value for child in pair]
    size = 1 + sum(_check_node(child, sizes) for child in children)
    if size > _MAX_NODES:
        raise _fault(node, f"more than {_MAX_NODES} values once its aliases are expanded")
    sizes[id(node)] = size
    return size


def _fault(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, node.start_mark)
