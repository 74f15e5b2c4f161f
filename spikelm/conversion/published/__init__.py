"""Published spiking checkpoints by kind. A new one is a file with its key table, a line here, and a test file."""

from spikelm.conversion.published.egru import EVNN_EGRU_LM
from spikelm.conversion.published.kind import Kind
from spikelm.conversion.published.rwkv import RWKV4, SPIKEGPT
from spikelm.conversion.published.rwkv7 import RWKV7
from spikelm.conversion.published.spikingbrain import SPIKINGBRAIN_7B, SPIKINGBRAIN_W8ASPIKE

_ALL = (SPIKINGBRAIN_7B, SPIKINGBRAIN_W8ASPIKE, SPIKEGPT, RWKV4, RWKV7, EVNN_EGRU_LM)
KINDS = {kind.name: kind for kind in _ALL}


def kind_named(name: str) -> Kind:
    """The kind called `name`. Raises ValueError for one that is not known, listing those that are."""
    if name not in KINDS:
        raise ValueError(f"Kind {name!r} is not known; expected one of: {', '.join(KINDS)}.")
    return KINDS[name]
