"""Published architectures by name: `spikelm.presets.get("spikingbrain-7b")` is its configuration, without weights.

A preset is one entry of `PRESETS`, the fields of `SpikeLMConfig` that differ from their defaults. Facts and sources:

- SpikingBrain: arXiv 2509.05276, and the configuration of its release.
- SpikeGPT: arXiv 2302.13939, and its released code. The paper does not state the vocabulary of its 46M model; with the
  6,064 different characters of enwik8, which it was trained on, the model has 47.2M parameters, with 5,000 46.1M.
- RWKV-7: arXiv 2503.14456, and its released trainer; `rwkv7-0.1b` has the sizes of the smallest "World" release.
- AstroSNN: the equations of arXiv 2312.07625 are not public. `astrosnn-small` is our formulation, SpikeGPT with the
  astrocyte units of `spikelm.spiking.neurons`, in the sizes of `spikegpt-46m` so that the two compare.
- EGRU: arXiv 2206.06178, and EvNN's recipes for Penn Treebank and WikiText-2.
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
# RWKV has neither heads nor positions. The residual dropout and the context are those of SpikeGPT's training.
RWKV4: dict[str, Any] = {
    "num_attention_heads": 1,
    "max_position_embeddings": 1024,
    "mixers": "rwkv4",
    "ffns": "rwkv",
    "pre_norm": "layernorm",
    "final_norm": "layernorm",
    "embedding_norm": "layernorm",
    "norm_eps": 1e-5,
}
SPIKEGPT = RWKV4 | {
    "residual_dropout": 0.03,
    "binary_embedding": True,
    "spike_sites": ["mixer_out", "ffn_out"],
    "spike_code": "binary",
    "spike_neuron": "lif",
    "neuron_decay": 0.5,
    "neuron_threshold": 1.0,
    "neuron_reset": "hard",
    "neuron_gain": "euler",
}
_SPIKEGPT_46M = SPIKEGPT | {
    "vocab_size": 6064,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
}
_SPIKEGPT_216M = SPIKEGPT | {
    "vocab_size": 50277,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
}
_SPIKEGPT_TINY = SPIKEGPT | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
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
# EvNN's language models: one stack of event-based GRUs between a tied embedding and head, and nothing else.
_EGRU_PTB: dict[str, Any] = {
    "vocab_size": 10_000,
    "hidden_size": 750,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "mixers": "egru_stack",
    "ffns": "none",
    "residual": False,
    "pre_norm": "identity",
    "final_norm": "identity",
    "tie_word_embeddings": True,
    "head_bias": True,
    "initializer_range": 0.0577,  # the published embeddings are uniform in +-0.1: the same standard deviation
    "egru_stack_sizes": [1350, 1350, 750],
    "egru_dampening": 3.6,
    "egru_support": 3.6,
    "egru_threshold_mean": 0.01,
}

RWKV7: dict[str, Any] = {
    "head_dim": 64,
    "mixers": "rwkv7",
    "ffns": "rwkv7",
    "pre_norm": "layernorm",
    "final_norm": "layernorm",
    "embedding_norm": "layernorm",
    "norm_eps": 1e-5,
}
_RWKV7_01B = RWKV7 | {
    "vocab_size": 65536,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 4096,
}
_RWKV7_TINY = RWKV7 | {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}

PRESETS: dict[str, dict[str, Any]] = {
    "spikingbrain-7b": _SPIKINGBRAIN_7B,
    "spikingbrain-7b-w8aspike": _SPIKINGBRAIN_7B | _W8ASPIKE,
    "spikingbrain-76b": _SPIKINGBRAIN_76B,
    "spikingbrain-tiny": _SPIKINGBRAIN_TINY,  # for tests and first steps
    "spikingbrain-tiny-w8aspike": _SPIKINGBRAIN_TINY | _W8ASPIKE,
    "spikegpt-216m": _SPIKEGPT_216M,
    "spikegpt-46m": _SPIKEGPT_46M,
    "spikegpt-tiny": _SPIKEGPT_TINY,  # for tests and first steps
    "rwkv7-0.1b": _RWKV7_01B,
    "rwkv7-tiny": _RWKV7_TINY,  # for tests and first steps
    "astrosnn-small": _SPIKEGPT_46M | {"spike_neuron": "astrocyte"},
    "egru-ptb": _EGRU_PTB,
    "egru-wt2": _EGRU_PTB | {"vocab_size": 33_278},
}


def names() -> list[str]:
    """The names that `get` knows."""
    return list(PRESETS)


def get(name: str) -> SpikeLMConfig:
    """A new configuration of the architecture `name`. Raises ValueError for an unknown name, listing the known ones."""
    if name not in PRESETS:
        raise ValueError(f"Preset {name!r} is not known; expected one of: {', '.join(PRESETS)}.")
    return SpikeLMConfig(**copy.deepcopy(PRESETS[name]))
