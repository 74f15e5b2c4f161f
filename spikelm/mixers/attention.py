"""Softmax attention over everything before, or over a sliding window with optional attention sinks.

    o_t = sum_s p_ts v_s,   p_ts = softmax_s(cap(scale * q_t k_s)),   s over the visible keys (see spikelm.context)

States: `keys`, `values` `[B, Hkv, L, D]`; L grows with the text in full attention and stays below window + sinks in a
window.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spikelm.cache import Stateful, StateSpec
from spikelm.kernels.runtime import wide_dtype
from spikelm.kernels.spike_encode import spike_quantize

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext, KeyView


class SoftmaxCore(Stateful, nn.Module):
    """Rotation, cache and softmax attention on heads; no parameters.

    Args:
        config, layer_idx: the model's configuration and the layer's index.
        windowed: whether the layer's `attention_window` and `attention_sinks` apply.
    """

    normalises = False  # its output has no norm of its own
    input_readers = ()
    is_causal = True

    def __init__(self, config: "SpikeLMConfig", layer_idx: int, windowed: bool):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.window = config.at("attention_window", layer_idx) if windowed else None
        self.sinks = config.at("attention_sinks", layer_idx) if windowed else 0
        self.off_by_one = windowed and config.attention_window_off_by_one
        self.rope = config.at("attention_rope", layer_idx)
        heads, self.shared_heads, self.head_dim = config.head_shape
        self.num_key_value_groups = heads // self.shared_heads  # a name that transformers' attention functions read
        self.scaling = config.attention_scale or self.head_dim**-0.5
        self.softcap = config.attention_softcap
        self.dropout = config.attention_dropout
        self.query_k = float(config.at("spike_k", layer_idx)) if config.attention_query_spikes else None
        self.int8_keys_values = config.attention_int8_keys_values

    def state_specs(self) -> dict[str, StateSpec]:
        """Keys and values; their length is None in full attention, at most window - 1 + sinks in a window."""
        length = None if self.window is None else self.window - 1 + self.off_by_one + self.sinks
        shape = (self.shared_heads, length, self.head_dim)
        return {"keys": StateSpec(shape), "values": StateSpec(shape)}

    def most_keys(self, length: int) -> int | None:
        """How many keys a query of a pass over `length` tokens sees at most; None: all of its document so far."""
        return None if self.window is None else self.window + self.sinks + (self.off_by_one and length > 1)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: "ForwardContext"
    ) -> tuple[Tensor, Tensor | None]:
        """q `[B, T, H, D]`, k, v `[B, T, Hkv, D]` -> heads `[B, T, H, D]` and, if eager, weights `[B, H, T, L]`."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.rope != "none":
            q, k = rotate(q, *context.rope[self.rope]), rotate(k, *context.rope[self.rope])
        if self.query_k is not None:
            q = spike_quantize(q, self.query_k)
        if self.int8_keys_values:
            k, v = Int8Steps.apply(k), Int8Steps.apply(v)
        view = context.keys(self.window, self.sinks, self.off_by_one)
        if view.keep is None:
            k, v = self.extend_state(context, "keys", k), self.extend_state(context, "values", v)
            return self._attend(q, k, v, view)
        if (past := self.read_state(context, "keys")) is not None:
            k = torch.cat([past, k], dim=2)
            v = torch.cat([self.read_state(context, "values"), v], dim=2)  # type: ignore[list-item]
        self.write_state(context, "keys", view.retained(k))
        self.write_state(context, "values", view.retained(v))
        return self._attend(q, k, v, view)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, view: "KeyView") -> tuple[Tensor, Tensor | None]:
        name = self.config._attn_implementation or "eager"
        # The fused implementations know no cap on the scores.
        attend = eager_attention if self.softcap else ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        mask: Tensor | None = view.mask
        if attend is eager_attention:
            if mask is None and q.shape[2] > 1:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
            extra: dict[str, Any] = {"softcap": self.softcap}
        else:
            extra = {"is_causal": mask is None and q.shape[2] > 1}
        dropout = self.dropout if self.training else 0.0
        return attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **extra)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first `cos.shape[-1]` channels (half-split pairs; Su et al. 2021).

    x `[B, H, T, D]`, cos and sin `[B, T, R]` with R <= D -> `[B, H, T, D]`.
    """
    cos, sin = cos[:, None], sin[:, None]
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-high, low], dim=-1) * sin
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)


class Int8Steps(torch.autograd.Function):
    """x `[..., D]` rounded to int8 steps, one scale max|x| / 127 for each row; straight-through gradient.

    As W8ASpike does with keys and values (SpikingBrain 2.3), which keeps them unrounded and rounds at every reading:
    the same numbers, since a row's steps depend on nothing but the row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Round."""
        wide = x.to(wide_dtype(x))
        scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp(1e-5, 1e4)
        return ((wide / scale).round().clamp(-128, 127) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Pass on."""
        return gradient


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch: query `[B, H, T, D]`, key, value `[B, Hkv, L, D]`, bool mask `[B, 1, T, L]`.

    Returns heads `[B, T, H, D]` and weights `[B, H, T, L]`. The softmax is computed in float32 or better.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = F.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    heads = F.dropout(weights, p=dropout, training=module.training) @ value
    return heads.transpose(1, 2).contiguous(), weights
