"""Triton's interpreter with the NumPy that CI has."""

from __future__ import annotations

from typing import Any

__all__ = ["allow_new_numpy", "correct_bfloat16"]


def allow_new_numpy() -> None:
    """Triton 3.6 takes the int of an array of one element, which NumPy 2.4 no longer gives; call it before a kernel."""
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched


def correct_bfloat16() -> None:
    """Triton 3.6's interpreter multiplies the bits of bfloat16 matrices, and cuts off where a GPU rounds."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits, tl.bfloat16)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(self, wide(a), wide(b), *rest)
    InterpreterBuilder.create_fp_trunc = rounded
