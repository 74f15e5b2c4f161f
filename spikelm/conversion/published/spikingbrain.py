"""SpikingBrain-7B as published (arXiv 2509.05276): the bfloat16 model, and W8ASpike, its spike-coded INT8 form.

Layers alternate between gated linear attention and a sliding window. W8ASpike differs from the bfloat16 model in four
ways: the inputs of every projection but `down_proj` are spike-coded (k = 3); weights of these projections are rounded
to the grid of their scales, one for each row and 128 input channels, before every product; queries are spike-coded,
keys and values rounded to int8 in the sliding windows; and the gate's two linears are merged into one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spikelm.configuration import SpikeLMConfig
from spikelm.conversion.published.kind import Fields, Kind, Rule, Tensors
from spikelm.grid import on_grid, weight_codes

MODEL_TYPE, ARCHITECTURE = "gla_swa", "GLAswaForCausalLM"
GROUP_SIZE = 128  # fixed in the published code, whatever its configuration says

# What the published configuration class assumes where config.json says nothing.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "swish",
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_short_conv": False,
    "pad_token_id": None,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "norm_eps", "attention_dropout", "initializer_range",
    "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip

_OUTER = {
    "model.embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_NORMS = {"attn_norm.weight": "mixer_norm.weight", "mlp_norm.weight": "ffn_norm.weight"}
_BIASES = {f"attn.{p}_proj.bias": f"mixer.{p}_proj.bias" for p in "qkv"}
_ROUNDED = {f"attn.{p}_proj": f"mixer.{p}_proj" for p in "qkvo"} | {
    f"mlp.{p}_proj": f"ffn.{p}_proj" for p in ("gate", "up")
}
_DOWN = {"mlp.down_proj": "ffn.down_proj"}
_GLA = {"attn.g_norm.weight": "mixer.gla.norm.weight"}
_LOW_RANK_GATE = {f"attn.gk_proj.{t}": f"mixer.gla.gate.{t}" for t in ("0.weight", "1.weight", "1.bias")}
_DENSE_GATE_BIAS = {"attn.gk_proj.bias": "mixer.gla.gate.bias"}
_DENSE_GATE = {"attn.gk_proj": "mixer.gla.gate"}


def _fields(raw: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Fields:
    if not raw:
        raise ValueError("it has no config.json.")
    if raw.get("model_type") != MODEL_TYPE:
        raise ValueError(f"its config.json states model_type {raw.get('model_type')!r}; expected {MODEL_TYPE!r}.")
    stated = _DEFAULTS | dict(raw)
    if stated["use_short_conv"]:
        raise ValueError("it has short convolutions (use_short_conv), which no released model has; expected none.")
    if stated["hidden_act"] not in ("swish", "silu"):
        raise ValueError(f"its hidden_act is {stated['hidden_act']!r}; expected 'swish'.")
    layers = stated["num_hidden_layers"]
    windowed = set(stated.get("attn_layers", range(1, layers, 2)))
    return {field: stated[field] for field in _SAME} | {
        "hidden_act": "silu",
        "mixers": ["swa" if i in windowed else "gla" for i in range(layers)],
        "attention_window": stated["sliding_window"],
        "attention_window_off_by_one": True,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": stated["rope_theta"]},
        "gla_gate_rank": stated.get("gate_low_rank_dim", 16),
        "gla_gate_normalizer": stated.get("gate_logit_normalizer", 16),
    }


def _config(config: SpikeLMConfig) -> dict[str, Any]:
    rope, layers = config.rope_parameters or {}, range(config.num_hidden_layers)
    windowed = [i for i in layers if config.mixers[i] == "swa"]
    return {field: getattr(config, field) for field in _SAME} | {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "intermediate_size": config.at("intermediate_size", 0),
        "hidden_act": "swish",
        "attn_layers": windowed,
        "sliding_window": config.at("attention_window", windowed[0]) if windowed else _DEFAULTS["sliding_window"],
        "rope_theta": rope.get("rope_theta"),
        "gate_low_rank_dim": config.at("gla_gate_rank", 0),
        "gate_logit_normalizer": config.gla_gate_normalizer,
    }


def _w8aspike_fields(raw: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Fields:
    return _fields(raw, shapes) | {
        "gla_gate": "dense",
        "attention_query_spikes": True,
        "attention_int8_keys_values": True,
        "spike_sites": ["qkv", "o", "gate_up"],
        "spike_k": 3.0,
        "weight_group_size": GROUP_SIZE,
    }


def _w8aspike_config(config: SpikeLMConfig) -> dict[str, Any]:
    return _config(config) | {"quant_weight_group_size": GROUP_SIZE}


def _named(tables: Mapping[str, str], layer: str = "") -> list[Rule]:
    return [Rule((f"{layer}{published}",), (f"{layer}{ours}",)) for published, ours in tables.items()]


def _rules(config: SpikeLMConfig) -> list[Rule]:
    weights = {f"{p}.weight": f"{o}.weight" for p, o in (_ROUNDED | _DOWN).items()}
    rules = _outer(config)
    for i in range(config.num_hidden_layers):
        gla = _GLA | _LOW_RANK_GATE if config.mixers[i] == "gla" else {}
        rules += _named(_NORMS | weights | _BIASES | gla, f"model.layers.{i}.")
    return rules


def _w8aspike_rules(config: SpikeLMConfig) -> list[Rule]:
    rules = _outer(config)
    for i in range(config.num_hidden_layers):
        layer, gla = f"model.layers.{i}.", config.mixers[i] == "gla"
        rules += _named(_NORMS | _BIASES | (_GLA | _DENSE_GATE_BIAS if gla else {}), layer)
        rounded = _ROUNDED | (_DENSE_GATE if gla else {})
        rules += [_scaled(f"{layer}{p}", f"{layer}{o}", _read_rounded) for p, o in rounded.items()]
        # The published forward reads the weights of `down_proj` past their quantiser: they stay as they are.
        rules += [_scaled(f"{layer}{p}", f"{layer}{o}", _read_float) for p, o in _DOWN.items()]
    return rules


def _outer(config: SpikeLMConfig) -> list[Rule]:
    return _named({p: o for p, o in _OUTER.items() if not (config.tie_word_embeddings and p == "lm_head.weight")})


def _scaled(published: str, ours: str, read: Any) -> Rule:
    """Weight `[out, in]` and scales, `[out, in / 128, 1]` as published and `[out, in / 128]` here."""
    names = (f"{published}.weight", f"{published}.weight_quantizer.scales")
    return Rule(names, (f"{ours}.weight", f"{ours}.grid.scales"), read, _write_scaled)


def _read_rounded(weight: Tensor, scales: Tensor) -> Tensors:
    scales = scales.squeeze(-1)
    return on_grid(weight_codes(weight, scales), scales), scales


def _read_float(weight: Tensor, scales: Tensor) -> Tensors:
    return weight, scales.squeeze(-1)


def _write_scaled(weight: Tensor, scales: Tensor) -> Tensors:
    return weight, scales.unsqueeze(-1)


SPIKINGBRAIN_7B = Kind("spikingbrain-7b", "SpikingBrain-7B", _fields, _config, _rules)
SPIKINGBRAIN_W8ASPIKE = Kind(
    "spikingbrain-w8aspike",
    "SpikingBrain-7B-W8ASpike",
    _w8aspike_fields,
    _w8aspike_config,
    _w8aspike_rules,
    dtype=torch.float32,
    moved="Weights were rounded to the grid of their scales once, as the published forward does before every product",
)
