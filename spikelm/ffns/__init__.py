"""Channel mixers by name. A new one is a file, a line here, and a test file."""

from spikelm.ffns.gated import GatedFFN

FFNS = {"gated": GatedFFN}
