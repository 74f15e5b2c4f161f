"""A softmax window and linear attention over everything before it, under one normaliser (LoLCATs, Zhang et al. 2024).

    o_t = (gamma sum_window exp(s_ti - c_t) v_i + sum_before (phi_q(q_t) . phi_k(k_i)) v_i) / (the same without v)
    s_ti = scale * q_t . k_i,   c_t = max_window s_ti,   gamma = sigmoid(logit) per head

with learned feature maps phi, one per head, of the rotated q and k (arXiv 2410.10254; the op and its state:
`spikelm.kernels.window_linear`). Two kinds, with as many features as channels, and W the identity at the start:

    hedgehog   concat(softmax(x W), softmax(-x W)),  W [H, D, D / 2] (at the start it reads half of the channels)
    relu       relu(x W),                            W [H, D, D]

States, w the window: a ring of the last w - 1 tokens, `keys`, `values` `[B, Hkv, w - 1, D]`, `features`
`[B, Hkv, w - 1, F]`; of the tokens that have left it `sums` `[B, Hkv, F, D]` and `norm` `[B, Hkv, F]`, float32 or
better; and `length` `[B]`, tokens of the document so far, int64.
"""

from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.cache import Stateful, StateSpec
from spikelm.kernels.feature_maps import hedgehog, identity_map, relu
from spikelm.kernels.runtime import wide_dtype
from spikelm.kernels.window_linear import window_linear, window_linear_step
from spikelm.kernels.window_linear_state import WindowState
from spikelm.mixers.attention import rotate
from spikelm.precision import KeepsDtype

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext

_FEATURE_MAPS = {"hedgehog": hedgehog, "relu": relu}


class WindowLinearCore(Stateful, nn.Module):
    """Windowed softmax and linear attention on heads, with its feature maps and the weight of its window."""

    normalises = False  # weights that sum to 1, as in attention; its output has no norm of its own
    input_readers = ()

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        queries, self.heads, self.head_dim = config.head_shape
        self.window = config.at("attention_window", layer_idx)
        self.rope = config.at("attention_rope", layer_idx)
        self.scaling = config.attention_scale or self.head_dim**-0.5
        kind = config.at("window_linear_feature_map", layer_idx)
        self.feature_map = _FEATURE_MAPS[kind]
        mapped = (self.head_dim + 1) // 2 if kind == "hedgehog" else self.head_dim
        self.features = 2 * mapped if kind == "hedgehog" else mapped
        self.query_map = nn.Parameter(torch.empty(queries, self.head_dim, mapped))
        self.key_map = nn.Parameter(torch.empty(self.heads, self.head_dim, mapped))
        self.initial = {"query_map": _identity, "key_map": _identity}
        self.factor = WindowFactor(queries)
        # Of a token: both maps, one update of sums and norm per key-value head, one read per query head.
        per_head = self.head_dim * mapped + self.features * (self.head_dim + 1)
        self.state_macs = (queries + self.heads) * per_head

    def most_keys(self, length: int) -> int:
        """How many keys a query's softmax sees at most, as `SoftmaxCore.most_keys`."""
        return self.window

    def state_specs(self) -> dict[str, StateSpec]:
        """Ring, sums and count of every key-value head; the query heads of a group share them."""
        ring, sums = (self.heads, self.window - 1), (self.heads, self.features)
        return {
            "keys": StateSpec((*ring, self.head_dim)),
            "values": StateSpec((*ring, self.head_dim)),
            "features": StateSpec((*ring, self.features)),
            "sums": StateSpec((*sums, self.head_dim), torch.float32),
            "norm": StateSpec(sums, torch.float32),
            "length": StateSpec((), torch.int64),
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: "ForwardContext") -> tuple[Tensor, None]:
        """q `[B, T, H, D]`, k, v `[B, T, Hkv, D]`, x `[B, T, hidden]` -> heads `[B, T, H, D]`, None."""
        if self.rope != "none":
            q, k = (rotate(t.transpose(1, 2), *context.rope[self.rope]).transpose(1, 2) for t in (q, k))
        fq, fk = self.feature_map(q, self.query_map), self.feature_map(k, self.key_map)
        tokens, gamma = (q, k, v, fq, fk), torch.sigmoid(self.factor.logit.to(wide_dtype(q)))
        state = self._read(context)
        single = q.shape[1] == 1 and context.valid is None and context.boundary is None
        if single and state is not None and not torch.is_grad_enabled():
            out, state = window_linear_step(*(t[:, 0] for t in tokens), gamma, state, self.scaling)
            out = out[:, None]
        else:
            masks = {"valid": context.valid, "reset_mask": context.boundary}
            sizes = {"window": self.window, "scale": self.scaling}
            out, state = window_linear(*tokens, gamma, initial_state=state, **sizes, **masks)
        for name, value in state._asdict().items():
            self.write_state(context, name, value)
        return out, None

    def _read(self, context: "ForwardContext") -> WindowState | None:
        states = {name: self.read_state(context, name) for name in WindowState._fields}
        return None if states["length"] is None else WindowState(**states)


class WindowFactor(KeepsDtype):
    """`logit` `[H]`, float32: gamma = sigmoid(logit), 0.1 at the start as published."""

    initial = {"logit": log(0.1 / 0.9)}

    def __init__(self, heads: int):
        super().__init__()
        self.logit = nn.Parameter(torch.empty(heads, dtype=torch.float32))


def _identity(tensor: Tensor) -> Tensor:
    return identity_map(*tensor.shape, dtype=tensor.dtype, device=tensor.device)
