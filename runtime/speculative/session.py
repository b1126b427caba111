"""A session of the decode engine for token trees, used for the target and for draft models.

It runs prompts as :class:`~effpass.runtime.session.Session` does, and then calls on the nodes of a tree, which are
written to the slots after the prefix (:mod:`effpass.runtime.speculative.cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from effpass.core.cache_name import cache_name
from effpass.core.derived_arguments import DerivedArguments
from effpass.core.errors import ModelError
from effpass.runtime.session import Backend, Session
from effpass.runtime.speculative.cache import TreeCache
from effpass.runtime.speculative.sparse import SparseVerification, Verifier

__all__ = ["TreeSession", "decoder_layers"]


class TreeSession(Session):
    """Runs prompts and token trees with one model.

    Args:
        model: a transformers causal LM, called within :func:`~effpass.runtime.attention.reading_cache` and
            :meth:`attached`.
        batch: batch size B of the buffers.
        capacity: number of slots of the prefix.
        nodes: number of slots of the tree.
        backend: `torch.compile` backend for calls on trees in a CUDA graph; None runs the model's own operators.
        taps: indices of the layers whose inputs, of hidden size D, are returned as *features*, concatenated to
            `[..., len(taps) · D]`.
        sparse: settings of sparse verification; None if all calls are dense.

    Attributes:
        sparse: settings of sparse verification, or None.
        prompt_features: `[rows, T, len(taps) · D]`, features of the last prompt; None without taps or after its user
            has released them.

    Raises:
        ModelError: if the list of the model's decoder layers is not found, or layers keep a state instead of keys.
    """

    cache: TreeCache

    def __init__(
        self, model: Any, batch: int, capacity: int, nodes: int, backend: Backend | None, taps: Sequence[int] = (),
        sparse: SparseVerification | None = None,
    ) -> None:  # fmt: skip
        self._nodes, self.sparse = nodes, sparse
        self._verifier = None if sparse is None else Verifier(model, sparse)
        super().__init__(model, batch, capacity, backend)
        self.cache.reader = self._reader
        self._tapped = [decoder_layers(model)[index] for index in taps]
        self._inputs: list[Tensor] = []
        self._function = _with_features(model.forward, self._inputs, len(taps))
        self._calls: dict[tuple[Any, ...], Callable[..., Any]] = {}  # by number of tokens, is sparse, names of inputs
        self._is_recording = False
        self.prompt_features: Tensor | None = None
        # Nodes beyond the model's last position are clamped to it. No answer is that long, so their output is unused.
        text = model.config.get_text_config(decoder=True)
        longest = getattr(text, "max_position_embeddings", None)
        self._last_position = None if longest is None else longest - 1

    def _new_cache(self, batch: int, capacity: int) -> TreeCache:
        blocks = None if self.sparse is None else self.sparse.blocks
        cache = TreeCache(self.model.config, batch, capacity, self._nodes, self.model.device, blocks)
        self._reader = cache.reader
        return cache

    @property
    def position(self) -> Tensor:
        """Position of the last prompt token of each sequence, int32 `[B]`; -1 for unused sequences."""
        return self._position[:, 0]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context in which the inputs of the layers in `taps` are captured, and sparse calls take effect."""
        inputs = self._inputs

        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self._tapped]
        try:
            with nullcontext() if self._verifier is None else self._verifier.attached():
                yield
        finally:
            for handle in handles:
                handle.remove()
            inputs.clear()

    def prefill(self, input_ids: Tensor, is_token: Tensor | None, chunk: int, **inputs: Any) -> None:
        self._features.clear()
        super().prefill(input_ids, is_token, chunk, **inputs)
        self.prompt_features = torch.cat(self._features, 1) if self._tapped else None
        self._features.clear()

    def _call(self, model: Callable[..., Any], input_ids: Tensor, index: Tensor, **inputs: Any) -> Tensor:
        self._inputs.clear()
        logits = super()._call(model, input_ids, index, **inputs)
        if self._tapped:
            self._features.append(torch.cat(self._inputs, -1))
        return logits

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        ancestors: Tensor,
        first: int = 0,
        *,
        is_sparse: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the model on nodes of trees.

        Args:
            tokens: int64 `[B, T]`, tokens of the nodes.
            positions: int32 `[B, T]`, their positions; -1 for padding, whose logits are meaningless.
            ancestors: int64 `[B, T, W]`, their ancestor masks over the slots of the tree.
            first: slot of the tree for the first of the nodes.
            is_sparse: whether the call is sparse as set by `sparse`; its first node then has to be the root.
            inputs: additional inputs of the model.

        Returns:
            Logits `[B, T, vocab]`, and features `[B, T, len(taps) · D]` or None without taps.

        Raises:
            EffpassError: if the tree has too few slots.
        """
        self.cache.enter(positions, ancestors, first)
        key, call = (tokens.shape[1], is_sparse, *inputs), self._function
        if self._is_recording and self.backend is not None:
            call = self._calls.get(key) or self._compile(self._function)
            self._calls[key] = call
        with self._sparse(positions) if is_sparse else nullcontext():
            return call(
                input_ids=tokens,
                position_ids=positions.clamp(0, self._last_position),
                **{cache_name(): self.cache},
                effpass_cache=self.cache,
                use_cache=True,
                return_dict=True,
                **inputs,
            )

    @contextmanager
    def _sparse(self, positions: Tensor) -> Iterator[None]:
        assert self._verifier is not None
        with self.cache.sparse(), self._verifier.on(positions):
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which calls are compiled, to be recorded in a CUDA graph."""
        with self._recording():
            self._is_recording = True
            try:
                yield
            finally:
                self._is_recording = False

    def _drop_outdated(self) -> None:
        """Do nothing: :meth:`has_moved` is called before each generation, which begins with its only prompt."""

    def has_moved(self) -> bool:
        """Return whether CUDA graphs are outdated, because weights have other addresses than at the last call."""
        moved = self._weights_moved() or any(isinstance(c, DerivedArguments) for c in self._compiled)
        if moved:
            self._calls.clear()
        return moved


def decoder_layers(model: Any) -> Any:
    """Return the list of a model's decoder layers.

    Raises:
        ModelError: if the decoder has no attribute `layers` or `h`.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", getattr(decoder, "h", None))
    if layers is None:
        raise ModelError(f"{type(decoder).__name__} has no list of layers named 'layers'")
    return layers


def _with_features(forward: Callable[..., Any], inputs: list[Tensor], taps: int) -> Callable[..., Any]:
    """Wrap `forward` in a function that returns logits and features; hooks append the features to `inputs`."""

    def call(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        inputs.clear()
        logits = forward(**arguments).logits
        return logits, torch.cat(inputs, -1) if taps else None

    return call
