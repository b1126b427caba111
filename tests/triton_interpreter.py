"""Triton's interpreter: with the NumPy that CI has, at most of its speed, with bfloat16, and with accesses checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

__all__ = ["check_accesses", "correct_bfloat16", "set_up"]


def set_up() -> None:
    """What a process that interprets kernels, and does nothing else, calls before the first of them."""
    _allow_new_numpy()
    _patch_once()
    _name_types_once()
    _make_shapes_once()
    _ignore_overflow()


def _patch_once() -> None:
    """Triton 3.6 patches its language at every launch and every call of a device function, a quarter of all time.

    The first time for each module of functions is enough where nothing is compiled later.
    """
    import triton.runtime.interpreter as interpreter

    patch, patched = interpreter._patch_lang, set()

    def once(fn: Any) -> Any:
        if fn.__module__ not in patched:
            patch(fn)  # returns how to undo it, which nobody wants
            patched.add(fn.__module__)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once


def _name_types_once() -> None:
    """Every tensor writes the name of its shape's type, which nobody reads, and looks up what NumPy calls its own."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    look_up, known = interpreter._get_np_dtype, {}

    def numpy_type(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = look_up(kind)
        return known[name]

    def init(self: Any, types: Any, fields: Any = None) -> None:
        self.types, self.fields = types, fields or [""] * len(types)

    def name(self: Any) -> str:
        return "[" + ",".join(f"{field}:{kind}" for field, kind in zip(self.fields, self.types, strict=True)) + "]"

    interpreter._get_np_dtype = numpy_type
    tl.core.tuple_type.__init__, tl.core.tuple_type.name = init, property(name)


def _make_shapes_once() -> None:
    """Every tensor makes its shape anew, twice: numbers that nobody changes, wrapped one by one."""
    import triton.language as tl

    make_block, make_tensor = tl.core.block_type.__init__, tl.core.tensor.__init__
    blocks: dict[Any, tuple[Any, int]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {(): (tl.core.tuple([]), tl.constexpr(1))}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple(getattr(n, "value", n) for n in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel
        self.element_ty, (self.shape, self.numel) = element_ty, blocks[key]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    tl.core.block_type.__init__, tl.core.tensor.__init__ = init_block, init_tensor
    tl.core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)


def _ignore_overflow() -> None:
    """Every sum and product of whole numbers is computed twice, and what was found is thrown away but for debugging."""
    import triton.runtime.interpreter as interpreter

    assert not interpreter.interpreter_builder.options.debug
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


def _allow_new_numpy() -> None:
    """Triton 3.6 takes the int of an array of one element, which NumPy 2.4 no longer gives."""
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


def check_accesses() -> None:
    """A load or store outside the tensors of its launch is an error, as it may be on a GPU."""
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    place = GridExecutor._init_args_hst
    within: list[tuple[int, int]] = []

    def placed(self: Any, args: Any, kwargs: Any) -> Any:
        found = place(self, args, kwargs)
        within.clear()
        for x in (*found[0], *found[1].values()):
            if hasattr(x, "data_ptr") and x.numel():
                last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
                within.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
        return found

    def check(what: str, pointers: Any, mask: Any) -> None:
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(at.shape, bool)
        for first, end in within:
            inside |= (at >= first) & (at + size <= end)
        if not inside.all():
            raise IndexError(f"{what} of {(~inside).sum()} elements outside the tensors of the launch")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check("a load", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check("a store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    GridExecutor._init_args_hst = placed
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
