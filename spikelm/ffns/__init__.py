"""Channel mixers by name. A new one is a file, a line here, and a test file."""

from spikelm.ffns.gated import GatedFFN
from spikelm.ffns.moe import MixtureFFN
from spikelm.ffns.rwkv import RWKV7FFN, RWKVFFN

FFNS = {"gated": GatedFFN, "moe": MixtureFFN, "rwkv": RWKVFFN, "rwkv7": RWKV7FFN}
