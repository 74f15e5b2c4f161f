"""Published architectures by name: `spikelm.presets.get("spikingbrain-7b")` is its configuration, without weights.

A preset is one entry of `PRESETS`, the fields of `SpikeLMConfig` that differ from their defaults. Facts and sources:
SpikingBrain, arXiv 2509.05276, and the configuration of its release.
"""

import copy
from typing import Any

from spikelm.configuration import SpikeLMConfig

_SPIKINGBRAIN: dict[str, Any] = {
    "attention_bias": True,
    "attention_window_off_by_one": True,
    "gla_feature_map": "relu",
    "gla_gate": "low_rank",
    "gla_gate_rank": 16,
    "gla_gate_normalizer": 16,
    "norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
_W8ASPIKE: dict[str, Any] = {
    "gla_gate": "dense",
    "attention_query_spikes": True,
    "attention_int8_keys_values": True,
    "spike_sites": ["qkv", "o", "gate_up"],
    "spike_k": 3.0,
    "weight_group_size": 128,
}
_SPIKINGBRAIN_7B = _SPIKINGBRAIN | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "mixers": ["gla", "swa"] * 14,
    "attention_window": 4096,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_SPIKINGBRAIN_TINY = _SPIKINGBRAIN | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "mixers": ["gla", "swa"] * 2,
    "attention_window": 8,
}

# One layer in seven has full attention beside linear attention, the others a window. The report leaves open whether the
# branches share their projections (shared here). Its 128 prepended sink tokens are not built yet.
_SPIKINGBRAIN_76B = _SPIKINGBRAIN_7B | {
    "mixers": (["gla+swa"] * 6 + ["gla+attention"]) * 4,
    "gla_feature_map": "sigmoid",
    "gla_gate": "tied",
    "ffns": ["gated" if i in (0, 1, 2, 4, 6, 8, 10) else "moe" for i in range(28)],
    "moe_experts": 16,
    "moe_top_k": 1,
    "attention_window_off_by_one": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "spikingbrain-7b": _SPIKINGBRAIN_7B,
    "spikingbrain-7b-w8aspike": _SPIKINGBRAIN_7B | _W8ASPIKE,
    "spikingbrain-76b": _SPIKINGBRAIN_76B,
    "spikingbrain-tiny": _SPIKINGBRAIN_TINY,  # for tests and first steps
    "spikingbrain-tiny-w8aspike": _SPIKINGBRAIN_TINY | _W8ASPIKE,
}


def names() -> list[str]:
    """The names that `get` knows."""
    return list(PRESETS)


def get(name: str) -> SpikeLMConfig:
    """A new configuration of the architecture `name`. Raises ValueError for an unknown name, listing the known ones."""
    if name not in PRESETS:
        raise ValueError(f"Preset {name!r} is not known; expected one of: {', '.join(PRESETS)}.")
    return SpikeLMConfig(**copy.deepcopy(PRESETS[name]))
