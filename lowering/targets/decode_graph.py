"""A causal LM as ONE graph for prefill and decode, its cache as plain inputs and outputs; shared by all file targets.

    input_ids                    [B, T]           logits                [B, T, vocab]
    attention_mask               [B, P + T]       present.{i}.key       [B, G, P + T, K]
    position_ids                 [B, T]           present.{i}.value     [B, G, P + T, V]
    past_key_values.{i}.key      [B, G, P, K]
    past_key_values.{i}.value    [B, G, P, V]

B, T and P are dynamic; P may be 0 and T may be 1. Names and layout are those of Optimum's ONNX decoders, so that its
runners load the file. `attention_mask` is 1 for tokens to attend to and 0 for padding (on the left, or in the past).
Sliding-window layers keep all P positions too, and the mask applies the window. Models with multi-head latent attention
cache latents: G is 1, K the latent's size and V the rotary part's.
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

# What files are made for.
DEVICES = ("cpu", "cuda")
CPU = torch.device("cpu")

_ATTENTION = "effpass_decode_graph"
_STOCK_ATTENTION = ("sdpa", "eager", "flash_attention", "flex_attention")


@dataclass(frozen=True)
class CacheLayer:
    """What one layer caches.

    Attributes:
        heads: G.
        key_size: K elements of a key.
        value_size: V elements of a value. Keys `[B, G, P, K]` and values `[B, G, P, V]` of P positions.
        conv_channels: where it is not 0 the layer is linear attention, which caches the last `conv_tokens` inputs of a
            convolution `[B, conv_tokens, conv_channels]` and a state `[B, G, K, V]`, float32 at the least.
        conv_tokens: see there.
    """

    heads: int
    key_size: int
    value_size: int
    conv_channels: int = 0
    conv_tokens: int = 0

    @property
    def grows(self) -> bool:
        """Whether it has a place for each position."""
        return self.conv_channels == 0

    @property
    def parts(self) -> tuple[str, str]:
        """Names of its tensors."""
        return ("key", "value") if self.grows else ("conv", "state")

    def shapes(self, batch: int, past: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of its tensors."""
        if self.grows:
            return (batch, self.heads, past, self.key_size), (batch, self.heads, past, self.value_size)
        return (batch, self.conv_tokens, self.conv_channels), (batch, self.heads, self.key_size, self.value_size)

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Of its tensors, in a cache of `dtype`."""
        return dtype, dtype if self.grows else torch.promote_types(dtype, torch.float32)

    def zeros(self, batch: int, past: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Its tensors, as they are before the first token."""
        of = zip(self.shapes(batch, past), self.dtypes(dtype), strict=True)
        return [torch.zeros(shape, dtype=kind, device=device) for shape, kind in of]

    def to_json(self) -> list[int]:
        """What the constructor takes."""
        sizes = [self.heads, self.key_size, self.value_size]
        return sizes if self.grows else [*sizes, self.conv_channels, self.conv_tokens]


@dataclass(frozen=True)
class DecodeGraph:
    """The captured graph.

    Attributes:
        program: not decomposed: passes find `aten.linear` and `aten.scaled_dot_product_attention` whole. Weights have
            the model's own names.
        layers: one entry per layer of the cache.
        dtype: of logits and cache.
        device: of weights, inputs and outputs.
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
        """Dynamic dimensions of the inputs by the names that Optimum gives them."""
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
        """The graph as it stands, rewritten or not, as a callable on plain tensors."""
        # What is left of export's guards forbids sizes of 1 where a view's strides were worked out at other sizes.
        # A view that is valid for other sizes is valid at size 1, and every export is run at size 1.
        return self.program.module(check_guards=False)

    def _cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{i}.{part}" for i, layer in enumerate(self.layers) for part in layer.parts]


def cache_layers(model: Any) -> tuple[CacheLayer, ...]:
    """Shapes of the model's cache, found by running it on two tokens.

    Raises:
        ExportError: a layer keeps something other than keys and values, or the state of effpass's linear attention.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.long, device=model_device(model))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
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
        raise ExportError(f"{type(model).__name__} used no cache", hint="it must take past_key_values and use_cache")
    return tuple(layers)


def state_classes(model: Any) -> dict[int, type]:
    """Cache layers of linear attention, by layer: what its module names `cache_layer`.

    An instance holds `conv`, `state` and the number of tokens `seen`.
    """
    return {module.layer_idx: module.cache_layer for module in model.modules() if hasattr(module, "cache_layer")}


def model_device(model: Any) -> torch.device:
    """The device that all weights and buffers of `model` are on.

    Raises:
        ExportError: they are on several, or on one that no file runs on.
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
    """Raise an :class:`ExportError` when `model` is in training mode, or not on one CPU or GPU."""
    if model.training:
        raise ExportError(f"{type(model).__name__} is in training mode", hint="call model.eval() first")
    model_device(model)


def export_decode_graph(model: Any) -> DecodeGraph:
    """Capture `model`.

    Args:
        model: a transformers causal LM or PeftModel in `eval()` mode, on the CPU or one GPU. It is not changed.

    Raises:
        ExportError: the model is in training mode, on several devices, or can't be captured as one graph; names the
            operation and the line of the model's code.
    """
    check_exportable(model)
    name = type(model).__name__
    layers = cache_layers(model)
    dtype, device = model.dtype, model_device(model)
    with plain_tensors(model), _flat_forward(model, layers) as names:
        try:
            program = trace(model, names, layers, dtype, device)
        except Exception as error:  # torch.export raises whatever the model's code does
            raise _capture_error(error, name) from error
    return DecodeGraph(program, layers, dtype, device)


def trace(
    module: torch.nn.Module,
    names: Sequence[str],
    layers: Sequence[CacheLayer],
    dtype: torch.dtype,
    device: torch.device,
) -> ExportedProgram:
    """Capture a module that takes and returns this graph's tensors, for all B, T and P.

    Args:
        module: on `device`.
        names: of its arguments.
        layers: shapes of the cache.
        dtype: of the cache.
        device: of the arguments.
    """
    # Sizes of 0 and 1 would be burned in; the graph is exported at others and run at 0 and 1 when it is validated.
    # Inductor cuts its loops for these: for few tokens on a cache of some hundred.
    batch, tokens, past = 2, 3, 509
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
    """A context in which tracing and compiling do not tell sizes of 0 and 1 from others."""
    import torch.fx.experimental._config as symbolic_shapes_config

    return symbolic_shapes_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def plain_attention(device: torch.device) -> AbstractContextManager[Any]:
    """A context for tracing, compiling and running this graph: on a GPU attention is two matrix products and a softmax.

    PyTorch's fused kernels for GPUs are chosen by sizes, and each is for some: one pads the mask to multiples of 16,
    another refuses one key, none that takes a mask shares keys among query heads. The choice is made when a graph is
    traced, and this graph is for all sizes.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def relate_sizes(
    layers: Sequence[CacheLayer], input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
) -> None:
    """Tell a trace which sizes are the same."""
    batch, tokens = input_ids.shape
    for tensor in (attention_mask, position_ids, *past):
        torch._check(tensor.shape[0] == batch)
    lengths = [past[2 * i + part].shape[2] for i, layer in enumerate(layers) if layer.grows for part in (0, 1)]
    for length in lengths:
        torch._check(length == lengths[0])
        torch._check(attention_mask.shape[1] == length + tokens)


@contextmanager
def _flat_forward(model: Any, layers: Sequence[CacheLayer]) -> Iterator[list[str]]:
    """Inside, ``model(...)`` takes and returns the flat tensors of this module's docstring, in that order.

    The forward of the instance is replaced, not wrapped in a module: weights keep their names in the captured graph.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class GivenLayer(DynamicLayer):
        """A cache layer that starts with keys and values and does not ask whether they are empty."""

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
            past_key_values=cache,
            use_cache=True,
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
    """Set an instance attribute, and put back what the instance held itself."""
    held = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)
        if held is not None:
            setattr(module, name, held)


@contextmanager
def _exportable_implementations(model: Any) -> Iterator[None]:
    """Attention and experts whose code has no branch on sizes or values; an implementation of effpass's own stays."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    base = inner_model(model)
    config = base.config
    attention, experts = config._attn_implementation, getattr(config, "_experts_implementation", None)
    if base._supports_sdpa and attention.startswith(_STOCK_ATTENTION):
        base.set_attn_implementation(_ATTENTION)
    loops = experts == "eager" and base._can_set_experts_implementation()  # over the experts that were hit
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
    """transformers' `sdpa` without its branches on T: query `[B, H, T, K]`, key and value `[B, G, S, ...]`.

    The group is left to the operator, so that no target has to copy keys and values H / G times.
    """
    unknown = [k for k in ("position_bias", "s_aux", "softcap") if kwargs.get(k) is not None]
    if unknown:
        raise ExportError(f"{type(module).__name__} passes {unknown[0]} to attention, which the decode graph lacks")
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def _expand_kv(module: Any, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of multi-head latent attention; the model's own writes into an empty tensor in place.

    Args:
        latent: `[B, 1, S, latent]`, without positions.
        rotary: `[B, 1, S, rotary]`, shared by all heads.
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
