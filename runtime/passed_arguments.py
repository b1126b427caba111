"""Whether decoder layers of transformers pass arguments that they do not know on to their attention.

Most do, by `**kwargs`. This is read from their source code.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

__all__ = ["drops_arguments"]


def drops_arguments(model: Any) -> str | None:
    """Return the name of a layer's attention that is not given arguments that its decoder layer does not know.

    Args:
        model: a transformers causal LM.

    Returns:
        The name of the module in the decoder; None if there is no such layer, or no source code to read it from.
    """
    decoder = model.get_decoder()  # not a tower for images, whose layers have no cache
    for path, module in decoder.named_modules():
        parent, _, name = path.rpartition(".")
        is_attention = "attn" in name or "attention" in name
        if is_attention and type(getattr(module, "layer_idx", None)) is int:
            decoder_layer: Any = type(decoder.get_submodule(parent))
            if not _passes_on(decoder_layer, name):
                return path
    return None


@functools.cache
def _passes_on(decoder_layer: type[nn.Module], name: str) -> bool:
    """Whether all calls of ``self.<name>`` in `forward` have an argument ``**...``."""
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(decoder_layer.forward)))
    except (OSError, TypeError, SyntaxError):
        return True
    return all(
        any(keyword.arg is None for keyword in node.keywords)
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{name}"
    )
