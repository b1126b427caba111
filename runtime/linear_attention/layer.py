"""The linear-attention layer: projections, short convolution, gates, gated delta rule, and gated norm.

    q, k, v = SiLU(conv(W x))        g, β, β_w from W_f x, W_β x, W_w x        o = rule(q, k, v, g, β, β_w)
    y = W_o (RMSNorm(o) ⊙ σ(W_g x))

x is the input and y the output of the layer, g the log of the decay, and β and β_w are step sizes, for erasing and
writing. The layer has the form of Kimi Delta Attention (https://arxiv.org/abs/2510.26692) with the step sizes of
FG²-GDN (https://arxiv.org/abs/2604.19021); the recurrence `rule` is :mod:`effpass.lowering.ops.gated_delta_rule`. There
is no position embedding, because convolution and decay represent the order of tokens.

Shapes: B batch, T tokens, D hidden size, H key heads, HV value heads, K key size, V value size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effpass.core.errors import ModelError
from effpass.lowering.ops.gated_delta_rule import gated_delta_rule
from effpass.lowering.ops.gated_delta_rule_step import gated_delta_rule_step
from effpass.runtime.linear_attention.documents import places
from effpass.runtime.linear_attention.settings import GatedDeltaSettings
from effpass.runtime.linear_attention.state import StateBuffers, StateLayer, state_layer

__all__ = ["WIDE", "GatedDeltaAttention"]

#: Names of the parameters that stay float32 in a model of lower precision.
WIDE = ("A_log", "dt_bias")

# Initial decay of a token without its gate: exp(-rate · step), as in Mamba-2; near a lower bound, less.
_RATES = (1.0, 16.0)  # range over heads
_STEPS = (1e-3, 0.1)  # range over channels


class GatedDeltaAttention(nn.Module):
    """Linear attention that takes the place of a decoder layer's attention.

    Args:
        settings: sizes and form of the layer.
        hidden_size: hidden size D of the model.
        layer_idx: index of the layer in the cache.
        norm_eps: epsilon of the norm before the output gate.

    Attributes:
        cache_layer: class of the layer in a transformers cache.
    """

    cache_layer = StateLayer

    def __init__(self, settings: GatedDeltaSettings, hidden_size: int, layer_idx: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.settings, self.layer_idx, self.norm_eps = settings, layer_idx, norm_eps
        heads, key_size, value_size = settings.num_value_heads, settings.key_head_dim, settings.value_head_dim
        keys, values, rank = settings.num_key_heads * key_size, heads * value_size, settings.gate_rank
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        channels = 2 * keys + values
        self.conv = nn.Conv1d(channels, channels, settings.conv_kernel_size, groups=channels, bias=False)
        decay_shape = (heads,) if settings.mode == "gdn" else (heads, key_size)
        self.f_proj = _linear(hidden_size, math.prod(decay_shape), 0 if settings.mode == "gdn" else rank)
        # The decay is steep in these parameters, so they stay float32 in a model of lower precision.
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(  # 1-D: optimizers treat matrices differently
            torch.empty(math.prod(decay_shape), dtype=torch.float32)
        )
        self.by_channel = settings.mode in ("fg2", "fg2+")
        steps, beta_rank = (heads * key_size, settings.beta_rank) if self.by_channel else (heads, 0)
        self.b_proj = _linear(hidden_size, steps, beta_rank)
        self.w_proj = _linear(hidden_size, values, settings.beta_rank) if settings.mode == "fg2+" else None
        self.g_proj = _linear(hidden_size, values, rank, bias=True)
        self.norm_weight = nn.Parameter(torch.empty(value_size))
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Initialize the parameters that do not belong to a linear layer."""
        self.conv.reset_parameters()
        rate = torch.empty_like(self.A_log).uniform_(*_RATES)
        step = torch.empty_like(self.dt_bias).uniform_(*(math.log(x) for x in _STEPS)).exp_()
        bound = self.settings.lower_bound
        if bound is None:  # the log of the decay is -exp(A_log) · softplus(gate + dt_bias)
            self.A_log.copy_(rate.log())
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        else:  # bound · sigmoid(exp(A_log) · (gate + dt_bias)): with A_log = 0, a gate changes small decays alike
            self.A_log.zero_()  # bound · sigmoid(log r) = bound · r / (1 + r)
            self.dt_bias.copy_(torch.log(rate.repeat_interleave(len(step) // len(rate)) * step / -bound))
        self.norm_weight.fill_(1)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Apply a conversion, such as to another dtype, but keep the parameters :data:`WIDE` in float32 at least."""
        before = {name: getattr(self, name).detach() for name in WIDE}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            parameter = getattr(self, name)
            if torch.promote_types(parameter.dtype, torch.float32) != parameter.dtype:
                parameter.data = tensor.to(parameter.device, torch.float32)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        attention_mask: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        effpass_cache: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Run the layer; called by the decoder layer in place of its attention.

        Args:
            hidden_states: [B, T, D], inputs.
            attention_mask: mask that transformers builds for the layer, from which padding is read; None for no
                padding.
            cache: cache to read and update; None for no cache.
            past_key_values: the same, as transformers before 5.24 names it.
            layer_past: the same, as older model families such as GPT-J and GPTBigCode name it.
            effpass_cache: cache of the decode engine, which knows padding by itself; None outside of the engine.
            cu_seq_lens_q: int32 or int64 [N + 1], offsets of N documents among the B T tokens, which are kept apart;
                None for one in each row.

        Returns:
            The output [B, T, D], and None in place of the attention weights that transformers allows for.

        Raises:
            ModelError: if the cache or the mask is of an unsupported kind, or there is a cache beside `cu_seq_lens_q`.
        """
        is_token = _tokens(hidden_states, attention_mask, effpass_cache)
        x = hidden_states if is_token is None else hidden_states * is_token[..., None].to(hidden_states.dtype)
        batch, tokens, _ = x.shape
        cache = next((given for given in (cache, past_key_values, layer_past) if given is not None), None)
        cached = None if cache is None else state_layer(cache, self.layer_idx)
        if effpass_cache is None and isinstance(cached, StateBuffers):
            raise ModelError(
                f"layer {self.layer_idx} was given the decode engine's cache without effpass_cache, and so without"
                " padding: its decoder layer does not pass on the arguments that it does not know",
                hint="leave generation to transformers: type(model).generate(model, ...)",
            )
        if cu_seq_lens_q is not None:
            if cached is not None:
                raise ModelError(
                    f"layer {self.layer_idx}: linear attention caches one document in each row, and these hold several",
                    hint="call the model with use_cache=False, or give each document a row of its own, with padding",
                )
            x, cu_seq_lens_q = x.flatten(0, 1)[None], cu_seq_lens_q.to(x.device)
        before, state = (None, None) if cached is None else cached.read(batch, x.dtype)
        mixed = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)
        mixed, conv = self._convolved(mixed, before, cu_seq_lens_q)
        in_place = isinstance(cached, StateBuffers) and tokens == 1
        out, state = self._recurrence(mixed, x, state, in_place, cu_seq_lens_q)
        if cached is not None:
            cached.write(conv, None if in_place else state, tokens)
        return self._projected(out, x).view(hidden_states.shape), None

    def _convolved(
        self, mixed: Tensor, before: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply convolution and SiLU to `mixed` [B, T, channels], with the inputs `before` it from the cache.

        The convolution is written as a sum of products: it keeps the channels contiguous, as the recurrence reads them,
        and compiles to one kernel.

        Returns:
            The result [B, T, channels], and the last inputs to cache [B, kernel size - 1, channels].
        """
        tokens, size = mixed.shape[1], self.settings.conv_kernel_size - 1
        full = F.pad(mixed, (0, 0, size, 0)) if before is None else torch.cat((before.to(mixed.dtype), mixed), 1)
        taps = self.conv.weight[:, 0].to(mixed.dtype)
        in_document = None if cu_seqlens is None else places(cu_seqlens, tokens)[:, None]
        out = full[:, size:] * taps[:, size]
        for place in range(size):
            term = full[:, place : place + tokens] * taps[:, place]
            out = out + (term if in_document is None else term.masked_fill(in_document < size - place, 0))
        return F.silu(out), full[:, tokens:]

    def _recurrence(
        self, mixed: Tensor, x: Tensor, state: Tensor | None, in_place: bool, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs [B, T, HV, V] and the new state, which is `state` itself, updated, if `in_place`."""
        heads, key_size = self.settings.num_value_heads, self.settings.key_head_dim
        keys = self.settings.num_key_heads * key_size
        q, k, v = mixed.split((keys, keys, heads * self.settings.value_head_dim), -1)
        by_head = (heads, -1)
        gate, beta = self.f_proj(x), self.b_proj(x)
        gate = gate if self.settings.mode == "gdn" else gate.unflatten(-1, by_head)
        beta = beta.unflatten(-1, by_head) if self.by_channel else beta
        given = (
            q.unflatten(-1, (-1, key_size)), k.unflatten(-1, (-1, key_size)), v.unflatten(-1, by_head), gate, beta,
            None if self.w_proj is None else self.w_proj(x).unflatten(-1, by_head),
        )  # fmt: skip
        bound = self.settings.lower_bound
        dt_bias = self.dt_bias if self.settings.mode == "gdn" else self.dt_bias.view(heads, key_size)
        if in_place:
            assert state is not None
            out = gated_delta_rule_step(*given, state, A_log=self.A_log, dt_bias=dt_bias, lower_bound=bound)
            return out, state
        return gated_delta_rule(
            *given, initial_state=state, cu_seqlens=cu_seqlens, A_log=self.A_log, dt_bias=dt_bias, lower_bound=bound
        )

    def _projected(self, out: Tensor, x: Tensor) -> Tensor:
        """Normalize, gate and project the outputs [B, T, HV, V] of the recurrence to [B, T, D]."""
        wide = out.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.norm_eps)
        gate = self.g_proj(x).view(out.shape)
        gated = normed * self.norm_weight.float() * gate.float().sigmoid()
        return self.o_proj(gated.to(x.dtype).flatten(2))

    def extra_repr(self) -> str:
        return f"{self.settings.mode}, layer_idx={self.layer_idx}"


def _linear(width: int, size: int, rank: int, bias: bool = False) -> nn.Module:
    """Create a linear layer, factorized with the given rank; a rank of 0 stands for a full matrix."""
    if rank == 0:
        return nn.Linear(width, size, bias=bias)
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, size, bias=bias))


def _tokens(hidden_states: Tensor, mask: Any, effpass_cache: Any) -> Tensor | None:
    """Return the mask of the tokens that are not padding, bool [B, T]; None if there is no padding."""
    tokens = hidden_states.shape[1]
    if effpass_cache is not None:
        positions, slots = effpass_cache.query_positions, effpass_cache.slots
        # In a decode step only unused sequences hold padding, and their outputs are never read.
        return None if slots.is_dense or (tokens == 1 and not slots.in_prompt) else positions >= 0
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ModelError(
            f"linear attention reads padding from a mask, and was given a {type(mask).__name__}",
            hint="load the model with attn_implementation='sdpa'",
        )
    if mask.dim() == 2:  # the form for FlashAttention: tokens of the whole sequence
        return mask[:, -tokens:].bool()
    # A token is padding if it may not attend to itself, for any sliding window or prefix in the mask.
    columns = torch.arange(mask.shape[-1] - tokens, mask.shape[-1], device=mask.device)
    own = mask[:, 0].gather(-1, columns[:, None].expand(mask.shape[0], -1, 1))[..., 0]
    return own if own.dtype == torch.bool else own == 0
