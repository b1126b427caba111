"""A few lines to write HTML that what it shows can't break: text is escaped unless it is markup already."""

from __future__ import annotations

from html import escape
from typing import Any

__all__ = ["Markup", "join", "tag"]


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """``tag("td", "a < b", class_="number")`` is ``<td class="number">a &lt; b</td>``.

    Args:
        name: of the element.
        children: put one after the other; strings that are no :class:`Markup` are escaped, None is left out.
        attributes: a trailing underscore is dropped, others become hyphens; None leaves one out, True has no value.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in ("meta", "line", "circle", "rect", "path") and not children:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Any) -> Markup:
    """The children one after the other, escaped where they are no markup."""
    parts = (c if isinstance(c, Markup) else escape(str(c)) for c in children if c is not None)
    return Markup("".join(parts))


def _attribute(key: str, value: Any) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
