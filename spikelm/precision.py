"""Modules whose tensors follow the model to another device, but not to another dtype."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepsDtype(nn.Module):
    """Mixin: `model.to(torch.bfloat16)` and `.half()` leave the module's own tensors at the dtype they have.

    For what decides a spike or a rotation, rounding to bfloat16 is not a matter of speed but of being wrong.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype or moved.is_meta else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)
