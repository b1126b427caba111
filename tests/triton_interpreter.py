"""Triton's interpreter with the NumPy that CI has."""

from __future__ import annotations

from typing import Any

__all__ = ["allow_new_numpy"]


def allow_new_numpy() -> None:
    """Triton 3.6 takes the int of an array of one element, which NumPy 2.4 no longer gives; call it before a kernel."""
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched
