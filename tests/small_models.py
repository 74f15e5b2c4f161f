"""Small models with every kind of layer, for all tests."""

import torch

from spikelm import SpikeLMConfig, SpikeLMForCausalLM

SITES = ["qkv", "o", "gate_up", "down"]
EVERY_SITE = [*SITES, "mixer_out", "ffn_out"]


def small_config(**changes) -> SpikeLMConfig:
    """Three layers, 32 channels, 4 query heads on 2 key-value heads, windows of 4."""
    fields = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_window": 4,
        "max_position_embeddings": 128,
    }
    return SpikeLMConfig(**(fields | changes))


def small_model(dtype=torch.float64, **changes) -> SpikeLMForCausalLM:
    """A model in eval mode whose weights, norms and biases are far from their initial values."""
    model = SpikeLMForCausalLM(small_config(**changes)).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


# Every kind of layer, alone and side by side.
PATTERNS = {
    "attention": {"mixers": "attention"},
    "swa": {"mixers": "swa"},
    "swa-sinks": {"mixers": "swa", "attention_sinks": 2},
    "gla": {"mixers": "gla"},
    "gla-tied": {"mixers": "gla", "gla_gate": "tied", "gla_feature_map": "sigmoid"},
    "gla-swa-attention": {"mixers": ["gla", "swa", "attention"]},
    "swa-gla-attention": {"mixers": ["swa", "gla", "attention"]},
    "gla+swa": {"mixers": "gla+swa"},
    "gla+attention": {"mixers": "gla+attention"},
    "gla+swa-apart": {"mixers": "gla+swa", "parallel_shared_projections": False},
    "retention": {"mixers": "retention"},
    "gla+retention": {"mixers": "gla+retention"},
    "window_linear": {"mixers": "window_linear"},
    "window_linear+attention": {"mixers": "window_linear+attention", "window_linear_feature_map": "relu"},
    "delta": {"mixers": "delta"},
    "delta+swa": {"mixers": "delta+swa"},
    "hgrn": {"mixers": "hgrn", "event_threshold": 0.1},
    "mingru-no-ffn": {"mixers": "mingru", "ffns": "none", "residual": False, "pre_norm": "identity"},
    "hgrn+swa": {"mixers": "hgrn+swa"},
    "egru": {"mixers": "egru", "egru_heads": 4, "egru_size": 48, "egru_zoneout": 0.2},
    "egru-paper": {"mixers": ["egru", "gla", "egru"], "egru_form": "paper", "ffns": ["gated", "none", "none"]},
    "egru+swa": {"mixers": "egru+swa", "egru_form": ["evnn", "paper", "evnn"]},
    "egru-stack": {
        "num_hidden_layers": 1,
        "mixers": "egru_stack",
        "ffns": "none",
        "residual": False,
        "pre_norm": "identity",
        "final_norm": "identity",
        "head_bias": True,
        "egru_stack_sizes": [40, 24, 32],
    },
    "rwkv4": {"mixers": "rwkv4", "ffns": "rwkv", "pre_norm": "layernorm"},
    "rwkv7": {"mixers": "rwkv7", "ffns": "rwkv7", "pre_norm": "layernorm"},
    "rwkv7+swa-gla-rwkv7": {"mixers": ["rwkv7+swa", "gla", "rwkv7"], "rwkv_gate_rank": 8},
    "moe": {"mixers": ["gla", "swa", "attention"], "ffns": "moe", "moe_experts": 3, "moe_top_k": 2},
    "rwkv-ffns": {"mixers": ["gla", "swa", "attention"], "ffns": ["rwkv", "rwkv7", "gated"]},
    # Neurons, where there are sites.
    "lif": {"mixers": "swa", "spike_neuron": "lif", "spike_code": "ternary", "neuron_threshold": 0.4},
    "plif": {"mixers": "gla", "spike_neuron": "plif", "spike_code": "ternary", "neuron_threshold": 0.4},
    "astrocyte": {
        "mixers": "hgrn",
        "ffns": "rwkv",
        "spike_neuron": "astrocyte",
        "spike_code": "binary",
        "neuron_threshold": 0.4,
        "neuron_reset": "soft",
        "pre_norm": "layernorm",
        "embedding_norm": "layernorm",
        "binary_embedding": True,
    },
    "dsn": {"mixers": "attention", "spike_neuron": "dsn"},
    "gemma-like": {
        "mixers": ["swa", "attention", "swa"],
        "pre_norm": "rmsnorm_1p",
        "post_norm": "rmsnorm_1p",
        "final_norm": "rmsnorm_1p",
        "attention_qk_norm": "head",
        "attention_softcap": 20.0,
        "logit_softcap": 30.0,
        "attention_rope": ["local", "global", "none"],
        "local_rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "embedding_scale": 32**0.5,
    },
}


def leaves(nested, path=""):
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`, to compare nested results number by number."""
    if isinstance(nested, dict):
        return {k: v for name, value in nested.items() for k, v in leaves(value, f"{path}.{name}").items()}
    if isinstance(nested, list):
        return leaves(dict(enumerate(nested)), path)
    return {path: nested}
