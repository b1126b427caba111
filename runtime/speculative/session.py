"""A model with a cache that has room for a token tree: what a target and a draft model both are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from effpass.core.derived_arguments import DerivedArguments
from effpass.core.errors import ModelError
from effpass.runtime.session import Backend, Session
from effpass.runtime.speculative.cache import TreeCache
from effpass.runtime.speculative.sparse import SparseVerification, Verifier

__all__ = ["TreeSession", "decoder_layers"]


class TreeSession(Session):
    """Runs a prompt as :class:`Session` does, and then trees.

    Args:
        model: a transformers causal LM. Calls are made while `reading_cache` and :meth:`attached` are entered.
        batch: rows of the buffers B.
        capacity: slots of the prefix.
        nodes: slots of the tree.
        backend: compiles the model's calls for a CUDA graph; None runs the model as it is.
        taps: layers whose inputs are handed out as *features*, side by side, `[..., len(taps) · D]`.
        sparse: what sparse calls leave out; None where there are none.

    Attributes:
        sparse: as given.
        prompt_features: of the last prompt, `[rows, T, len(taps) · D]`; None without taps, and once it was dropped.

    Raises:
        ModelError: the model has no such layers.
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
        self._calls: dict[tuple[int, bool], Callable[..., Any]] = {}  # tokens, is sparse → compiled
        self._is_recording = False
        self.prompt_features: Tensor | None = None
        # Nodes beyond the model's positions are beyond the longest answer too: what they give is never looked at.
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
        """int32 `[B]`: where each row's last token of the prompt stands; -1 in empty rows."""
        return self._position[:, 0]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the layers in `taps` hand out their inputs, and sparse calls are sparse."""
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
        self._prompt: list[Tensor] = []
        super().prefill(input_ids, is_token, chunk, **inputs)
        self.prompt_features = torch.cat(self._prompt, 1) if self._tapped else None
        del self._prompt

    def _call(self, model: Callable[..., Any], input_ids: Tensor, index: Tensor, **inputs: Any) -> Tensor:
        self._inputs.clear()
        logits = super()._call(model, input_ids, index, **inputs)
        if self._tapped:
            self._prompt.append(torch.cat(self._inputs, -1))
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
        """Logits `[B, T, vocab]` and features of nodes, whose keys go to the tree's slots from `first` on.

        Args:
            tokens: int64 `[B, T]`.
            positions: int32 `[B, T]`; -1 for padding, whose logits mean nothing.
            ancestors: int64 `[B, T, W]`.
            first: see above.
            is_sparse: the first node is a root, and the call leaves out what `sparse` says.
            inputs: what the model takes beside them.

        Raises:
            EffpassError: the nodes have no room.
        """
        self.cache.enter(positions, ancestors, first)
        key, call = (tokens.shape[1], is_sparse), self._function
        if self._is_recording and self.backend is not None:
            call = self._calls.get(key) or self._compile(self._function)
            self._calls[key] = call
        with self._sparse(positions) if is_sparse else nullcontext():
            return call(
                input_ids=tokens,
                position_ids=positions.clamp(0, self._last_position),
                past_key_values=self.cache,
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
        """Inside, calls are compiled for a CUDA graph."""
        with self._recording():
            self._is_recording = True
            try:
                yield
            finally:
                self._is_recording = False

    def has_moved(self) -> bool:
        """Whether weights lie elsewhere than when this was last asked; graphs read them where they lay."""
        before, self._weights = self._weights, self._weight_addresses()
        moved = before != self._weights or any(isinstance(c, DerivedArguments) for c in self._compiled)
        if moved:
            self._calls.clear()
        return moved


def decoder_layers(model: Any) -> Any:
    """The list of a model's decoder layers.

    Raises:
        ModelError: they are not where models have them.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", getattr(decoder, "h", None))
    if layers is None:
        raise ModelError(f"{type(decoder).__name__} has no list of layers named 'layers'")
    return layers


def _with_features(forward: Callable[..., Any], inputs: list[Tensor], taps: int) -> Callable[..., Any]:
    """`forward`, as a function that gives logits and features; `inputs` is filled by hooks."""

    def call(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        inputs.clear()
        logits = forward(**arguments).logits
        return logits, torch.cat(inputs, -1) if taps else None

    return call
