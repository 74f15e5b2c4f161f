"""Mixture of gated channel mixers: every token goes through a shared one and through the likeliest of the others.

    p = softmax(W_r x),   out = shared(x) + sum over the k largest p_i of p_i expert_i(x)

(SpikingBrain-76B, arXiv 2509.05276: 16 experts, k = 1, no renormalisation.) There is no loss that balances the load of
the experts.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.ffns.gated import GatedFFN

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext


class MixtureFFN(nn.Module):
    """`[B, T, hidden]` -> `[B, T, hidden]`; each expert has the sites of a gated ffn and codes the tokens it gets."""

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        self.top_k = config.moe_top_k
        self.router = nn.Linear(config.hidden_size, config.moe_experts, bias=False)
        self.experts = nn.ModuleList(GatedFFN(config, layer_idx) for _ in range(config.moe_experts))
        self.shared = GatedFFN(config, layer_idx)

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """Mix the channels of every token."""
        weights = torch.softmax(self.router(x).float(), dim=-1)
        shares, chosen = weights.topk(self.top_k, dim=-1)
        out = self.shared(x, context)
        real = torch.ones_like(chosen[..., 0], dtype=torch.bool) if context.valid is None else context.valid
        for i, expert in enumerate(self.experts):
            mine = (chosen == i) & real[..., None]
            if (rows := mine.any(-1)).any():
                # Padding is left out here, so the experts need no context to leave it out of their statistics.
                share = (shares * mine).sum(-1)[rows]
                out = out.index_put(
                    (rows.nonzero(as_tuple=True)), share[:, None].to(out.dtype) * expert(x[rows], None), True
                )
        return out
