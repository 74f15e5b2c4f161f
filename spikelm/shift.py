"""The token before: what token shifts (RWKV) and short causal convolutions read."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.cache import Stateful, StateSpec

if TYPE_CHECKING:
    from spikelm.context import ForwardContext


class Previous(Stateful, nn.Module):
    """`x_(t-1)` for every token: zero at the start of a text or document; padding is passed over.

    State: `last` `[B, width]`, the latest real token.
    """

    def __init__(self, layer_idx: int, width: int):
        super().__init__()
        self.layer_idx, self.width = layer_idx, width

    def state_specs(self) -> dict[str, StateSpec]:
        """The latest token."""
        return {"last": StateSpec((self.width,))}

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """`[B, T, width]` -> the same shape, one real token earlier."""
        last = self.read_state(context, "last")
        last = torch.zeros_like(x[:, 0]) if last is None else last.to(x.dtype)
        known = torch.cat([last[:, None], x], 1)
        if context.valid is None:
            earlier, last = known[:, :-1], known[:, -1]
        else:
            # Index in `known` of the latest real token up to each slot; 0 is the state.
            slots = torch.arange(1, x.shape[1] + 1, device=x.device)
            latest = torch.where(context.valid, slots, 0).cummax(1).values
            before = torch.cat([torch.zeros_like(latest[:, :1]), latest[:, :-1]], 1)
            earlier = known.gather(1, before[..., None].expand_as(x))
            last = known.gather(1, latest[:, -1:, None].expand(-1, -1, x.shape[2]))[:, 0]
        if context.boundary is not None:
            earlier = earlier.masked_fill(context.boundary[..., None], 0.0)
        self.write_state(context, "last", last)
        return earlier
