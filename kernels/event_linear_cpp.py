"""The event product on the CPU through `event_linear.cpp`, in float32."""

from typing import TYPE_CHECKING

from torch import Tensor

from spikelm.kernels.rows import Rows, Table

if TYPE_CHECKING:
    from spikelm.kernels.event_call import EventCall


def takes(x: Tensor, weights: Rows | Table) -> bool:
    return False


def prepare(call: "EventCall"):
    return None
