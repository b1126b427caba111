"""Capture of a causal LM as one graph for prefill and decode, with its KV cache as plain inputs and outputs.

:func:`export_decode_graph` captures a transformers model with ``torch.export``; all export targets write the resulting
:class:`DecodeGraph`. Inputs and outputs are, for layer i::

    input_ids                    [B, T]           logits                [B, T, vocab]
    attention_mask               [B, P + T]       present.{i}.key       [B, G, P + T, K]
    position_ids                 [B, T]           present.{i}.value     [B, G, P + T, V]
    past_key_values.{i}.key      [B, G, P, K]
    past_key_values.{i}.value    [B, G, P, V]

B is the batch size, T the number of new tokens, P the number of past positions, G the number of KV heads, K the key
size and V the value size. B, T and P are dynamic; P may be 0 and T may be 1. Names and layout are those of Optimum's
ONNX decoders, so that Optimum's runners can load an exported file. `attention_mask` is 1 for tokens to attend to and 0
for padding (on the left, or in the past). Sliding-window layers also keep all P positions, and the mask applies the
window. Models with multi-head latent attention (MLA) cache latents: G is 1, K is the size of the latent and V that of
the rotary part. Layers of effpass's linear attention cache convolution inputs and a state (:class:`CacheLayer`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from effpass.core.cache_name import cache_name
from effpass.core.errors import ExportError
from effpass.core.model import inner_model
from effpass.lowering.targets.plain_tensors import plain_tensors

__all__ = [
    "CPU",
    "DEVICES",
    "CacheLayer",
    "DecodeGraph",
    "Step",
    "cache_layers",
    "check_exportable",
    "export_decode_graph",
    "model_device",
    "plain_attention",
    "relate_sizes",
    "sizes_stay_free",
    "trace",
]

# (input_ids, attention_mask, position_ids, *past) → (logits, *present)
Step = Callable[..., Sequence[Tensor]]

# Types of the devices that files can be exported for.
DEVICES = ("cpu", "cuda")
CPU = torch.device("cpu")

_ATTENTION = "effpass_decode_graph"
_STOCK_ATTENTION = ("sdpa", "eager", "flash_attention", "flex_attention")


@dataclass(frozen=True)
class CacheLayer:
    """Shape of the cache of one layer.

    An attention layer caches keys `[B, G, P, K]` and values `[B, G, P, V]` of P positions. A linear-attention layer
    caches the last inputs of its convolution `[B, conv_tokens, conv_channels]` and a state `[B, G, K, V]`, whose dtype
    is float32 or wider.

    Attributes:
        heads: number of heads G.
        key_size: number of elements K of a key.
        value_size: number of elements V of a value.
        conv_channels: channels of the convolution of a linear-attention layer; 0 for an attention layer.
        conv_tokens: cached inputs of the convolution, in tokens; 0 for an attention layer.
    """

    heads: int
    key_size: int
    value_size: int
    conv_channels: int = 0
    conv_tokens: int = 0

    @property
    def grows(self) -> bool:
        """Whether the cache has an entry per position, that is, whether the layer is an attention layer."""
        return self.conv_channels == 0

    @property
    def parts(self) -> tuple[str, str]:
        """Names of the two cache tensors."""
        return ("key", "value") if self.grows else ("conv", "state")

    def shapes(self, batch: int, past: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the two cache tensors."""
        if self.grows:
            return (batch, self.heads, past, self.key_size), (batch, self.heads, past, self.value_size)
        return (batch, self.conv_tokens, self.conv_channels), (batch, self.heads, self.key_size, self.value_size)

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes of the two cache tensors in a cache of `dtype`."""
        return dtype, dtype if self.grows else torch.promote_types(dtype, torch.float32)

    def zeros(self, batch: int, past: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Return the two cache tensors, filled with zeros; with `past` of 0, the cache before the first token."""
        specs = zip(self.shapes(batch, past), self.dtypes(dtype), strict=True)
        return [torch.zeros(shape, dtype=kind, device=device) for shape, kind in specs]

    def to_json(self) -> list[int]:
        """Return the arguments of the constructor."""
        sizes = [self.heads, self.key_size, self.value_size]
        return sizes if self.grows else [*sizes, self.conv_channels, self.conv_tokens]


@dataclass(frozen=True)
class DecodeGraph:
    """A captured decode graph.

    Attributes:
        program: the graph, not decomposed, so that passes find `aten.linear` and `aten.scaled_dot_product_attention`.
            Weights have the names that they have in the model.
        layers: cache shapes, one entry per layer.
        dtype: dtype of logits and cache.
        device: device of weights, inputs and outputs.
    """

    program: ExportedProgram
    layers: tuple[CacheLayer, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "position_ids", *self._cache_names("past_key_values")]

    @property
    def output_names(self) -> list[str]:
        return ["logits", *self._cache_names("present")]

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """Dynamic dimensions of each input with the names that Optimum gives them."""
        batch, tokens, past = "batch_size", "sequence_length", "past_sequence_length"
        fixed = {
            "input_ids": {0: batch, 1: tokens},
            "attention_mask": {0: batch, 1: f"{past} + {tokens}"},
            "position_ids": {0: batch, 1: tokens},
        }
        for index, layer in enumerate(self.layers):
            axes = {0: batch, 2: past} if layer.grows else {0: batch}
            fixed |= {f"past_key_values.{index}.{part}": axes for part in layer.parts}
        return fixed

    def module(self) -> Step:
        """Return the graph in its current form, rewritten or not, as a callable on plain tensors."""
        # The guards that torch.export leaves reject sizes of 1 for views whose strides were derived at other sizes. A
        # view that is valid at other sizes is valid at size 1 too, and every export is checked at size 1.
        return self.program.module(check_guards=False)

    def _cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{i}.{part}" for i, layer in enumerate(self.layers) for part in layer.parts]


def cache_layers(model: Any) -> tuple[CacheLayer, ...]:
    """Return the shapes of the model's cache, found by running the model on two tokens.

    Raises:
        ExportError: if a layer caches neither keys and values nor the state of effpass's linear attention.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.long, device=model_device(model))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{cache_name(): cache})
    layers = []
    states = state_classes(model)
    for index, layer in enumerate(cache.layers):
        if index in states:
            (_, heads, key_size, value_size), (_, tokens, channels) = layer.state.shape, layer.conv.shape
            layers.append(CacheLayer(heads, key_size, value_size, channels, tokens))
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise ExportError(
                f"layer {index} of {type(model).__name__} caches a {type(layer).__name__}; "
                "the decode graph holds keys and values only",
                hint="models with recurrent or convolution layers can be compiled, not exported",
            )
        layers.append(CacheLayer(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]))
    if not layers:
        raise ExportError(f"{type(model).__name__} used no cache", hint=f"it must take {cache_name()} and use_cache")
    return tuple(layers)


def state_classes(model: Any) -> dict[int, type]:
    """Return the cache classes of linear-attention layers by layer index, from the attribute `cache_layer` of modules.

    An instance holds `conv`, `state`, and the number of tokens `seen`.
    """
    return {module.layer_idx: module.cache_layer for module in model.modules() if hasattr(module, "cache_layer")}


def model_device(model: Any) -> torch.device:
    """Return the device that all weights and buffers of `model` are on.

    Raises:
        ExportError: if they are on several devices, or on one that no file can be exported for.
    """
    name = type(model).__name__
    places = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if len(places) > 1:
        raise ExportError(
            f"{name} is spread over {', '.join(places)}, and an exported file runs on one device",
            hint="load it without device_map, or move it: model.to('cpu')",
        )
    device = torch.device(*places)
    if device.type not in DEVICES:
        raise ExportError(f"{name} has weights on {device}", hint="move it: model.to('cpu')")
    return device


def check_exportable(model: Any) -> None:
    """Raise an :class:`ExportError` if `model` is in training mode, or not on a single CPU or GPU."""
    if model.training:
        raise ExportError(f"{type(model).__name__} is in training mode", hint="call model.eval() first")
    model_device(model)


def export_decode_graph(model: Any) -> DecodeGraph:
    """Capture `model` as a decode graph.

    Args:
        model: a transformers causal LM or PeftModel in `eval()` mode, on the CPU or one GPU. It is not changed.

    Raises:
        ExportError: if the model is in training mode, on several devices, or can't be captured as one graph; the
            message then names the error and the line of the model's code.
    """
    check_exportable(model)
    name = type(model).__name__
    layers = cache_layers(model)
    dtype, device = model.dtype, model_device(model)
    with plain_tensors(model), _flat_forward(model, layers) as names:
        try:
            program = trace(model, names, layers, dtype, device)
        except Exception as error:  # torch.export passes on any exception of the model's code
            raise _capture_error(error, name) from error
    return DecodeGraph(program, layers, dtype, device)


def trace(
    module: torch.nn.Module,
    names: Sequence[str],
    layers: Sequence[CacheLayer],
    dtype: torch.dtype,
    device: torch.device,
) -> ExportedProgram:
    """Capture a module that has the inputs and outputs of a decode graph, for all sizes B, T and P.

    Args:
        module: module on `device`.
        names: names of the module's arguments, in order.
        layers: cache shapes, one entry per layer.
        dtype: dtype of the cache.
        device: device of the arguments.
    """
    # Sizes of 0 and 1 would become constants of the graph. It is captured at other sizes, and executed at 0 and 1 when
    # it is validated. Inductor tiles its loops for these sizes: few tokens, and 1024 positions in the cache after them.
    batch, tokens, past = 2, 3, 1021
    args = [
        torch.zeros(batch, tokens, dtype=torch.long),
        torch.ones(batch, past + tokens, dtype=torch.long),
        torch.arange(past, past + tokens).expand(batch, tokens).contiguous(),
        *(tensor for layer in layers for tensor in layer.zeros(batch, past, dtype, CPU)),
    ]
    at_least_0, at_least_1 = torch.export.Dim.DYNAMIC(min=0), torch.export.Dim.DYNAMIC(min=1)
    two = {0: at_least_1, 1: at_least_1}
    by_layer = (
        {0: at_least_1, 2: at_least_0} if layer.grows else {0: at_least_1} for layer in layers for _ in range(2)
    )
    shapes = (two, two, two, *by_layer)
    with torch.no_grad(), sizes_stay_free(), plain_attention(device):
        return torch.export.export(
            module,
            tuple(t.to(device) for t in args),
            dynamic_shapes=dict(zip(names, shapes, strict=True)),
            strict=False,
        )


def sizes_stay_free() -> Any:
    """Return a context manager in which tracing and compiling do not specialize on sizes of 0 and 1."""
    import torch.fx.experimental._config as symbolic_shapes_config

    return symbolic_shapes_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def plain_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context manager for tracing, compiling and running a decode graph, with attention not fused on a GPU.

    Attention is then two matrix products and a softmax. PyTorch chooses among its fused GPU kernels by size when a
    graph is traced, and each supports some sizes only: one pads the mask to multiples of 16, another refuses a single
    key, and none that takes a mask shares keys among query heads. A decode graph must work for all sizes.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def relate_sizes(
    layers: Sequence[CacheLayer], input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
) -> None:
    """Assert, while tracing, which sizes of the inputs are equal."""
    batch, tokens = input_ids.shape
    for tensor in (attention_mask, position_ids, *past):
        torch._check(tensor.shape[0] == batch)
    lengths = [past[2 * i + part].shape[2] for i, layer in enumerate(layers) if layer.grows for part in (0, 1)]
    for length in lengths:
        torch._check(length == lengths[0])
        torch._check(attention_mask.shape[1] == length + tokens)


@contextmanager
def _flat_forward(model: Any, layers: Sequence[CacheLayer]) -> Iterator[list[str]]:
    """Context manager in which ``model(...)`` has the inputs and outputs of the module docstring, in that order.

    Yields the names of the inputs. The instance's `forward` is replaced instead of wrapped in another module, so that
    weights keep their names in the captured graph.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class GivenLayer(DynamicLayer):
        """A cache layer that is created with keys and values, and does not branch on whether they are empty."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True
            self.dtype, self.device = keys.dtype, keys.device

        def get_seq_length(self) -> int:
            assert self.keys is not None
            return self.keys.shape[-2]

    inner, states = model.forward, state_classes(model)

    def given_state(index: int, conv: Tensor, state: Tensor, seen: Any) -> Any:
        layer = states[index]()
        layer.conv, layer.state, layer.seen, layer.is_initialized = conv, state, seen, True
        return layer

    name_of_cache = cache_name()

    def forward(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        relate_sizes(layers, input_ids, attention_mask, position_ids, *past)
        cache: Any = DynamicCache()
        seen = attention_mask.shape[1] - input_ids.shape[1]
        cache.layers = [
            GivenLayer(*past[2 * i : 2 * i + 2]) if layer.grows else given_state(i, past[2 * i], past[2 * i + 1], seen)
            for i, layer in enumerate(layers)
        ]
        out = inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{name_of_cache: cache},
        )
        kept = ((y.conv, y.state) if hasattr(y, "conv") else (y.keys, y.values) for y in cache.layers)
        return (out.logits, *(tensor for pair in kept for tensor in pair))

    names = ["input_ids", "attention_mask", "position_ids"]
    names += [f"past_key_values_{i}_{part}" for i, layer in enumerate(layers) for part in layer.parts]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
    with ExitStack() as stack:
        stack.enter_context(_exportable_implementations(model))
        stack.enter_context(_attribute(model, "forward", forward))
        for module in model.modules():
            if hasattr(type(module), "expand_kv") and "expand_kv" not in vars(module):
                stack.enter_context(_attribute(module, "expand_kv", functools.partial(_expand_kv, module)))
        yield names


@contextmanager
def _attribute(module: Any, name: str, value: Any) -> Iterator[None]:
    """Context manager in which an instance attribute is set; on exit the instance's own value is restored."""
    held = {name: vars(module)[name]} if name in vars(module) else {}
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)
        vars(module).update(held)


@contextmanager
def _exportable_implementations(model: Any) -> Iterator[None]:
    """Context manager that selects implementations of attention and experts without branches on sizes or values.

    An attention implementation of effpass's own is left in place.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    base = inner_model(model)
    config = base.config
    attention, experts = config._attn_implementation, getattr(config, "_experts_implementation", None)
    if base._supports_sdpa and attention.startswith(_STOCK_ATTENTION):
        base.set_attn_implementation(_ATTENTION)
    loops = experts == "eager" and base._can_set_experts_implementation()  # over the chosen experts
    if loops:
        base.set_experts_implementation("grouped_mm")
    try:
        yield
    finally:
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)
        if loops:
            base.set_experts_implementation(experts)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention like transformers' `sdpa`, but without its branches on T.

    query is `[B, H, T, K]`, key and value are `[B, G, S, ...]`. Grouped-query attention is left to the operator
    (`enable_gqa`), so that no target has to copy keys and values H / G times.
    """
    unknown = [k for k in ("position_bias", "s_aux", "softcap") if kwargs.get(k) is not None]
    if unknown:
        raise ExportError(f"{type(module).__name__} passes {unknown[0]} to attention, which the decode graph lacks")
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def _expand_kv(module: Any, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Expand the latents of multi-head latent attention into keys and values, without in-place operations.

    It replaces the model's own method, which writes into an empty tensor in place.

    Args:
        latent: `[B, 1, S, latent]`, the latents without position information.
        rotary: `[B, 1, S, rotary]`, the rotated part of the keys, shared by all heads.
    """
    nope, size = module.qk_nope_head_dim, module.v_head_dim
    heads = module.kv_b_proj(latent).unflatten(-1, (-1, nope + size)).squeeze(1).transpose(1, 2)
    keys, values = heads.split([nope, size], dim=-1)
    return torch.cat([keys, rotary.expand(-1, keys.shape[1], -1, -1)], dim=-1), values


def _capture_error(error: Exception, name: str) -> ExportError:
    if isinstance(error, ExportError):
        return error
    where, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "modeling_" in file or "transformers_modules" in file:
            where = f" at {file.rsplit('/', 1)[-1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return ExportError(
        f"{name} can't be captured as one graph{where}: {type(error).__name__}: {first}",
        hint="a branch on a tensor's value or a call outside PyTorch stops the capture; "
        "torch.compile(backend='effpass') works on such models in parts",
    )
