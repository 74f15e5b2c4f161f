"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048) and SpikeGPT (Zhu et al. 2023, arXiv 2302.13939) as published: `.pth`.

One key table for both: SpikeGPT is RWKV-4 with a LIF neuron behind every mixer and ffn, which has no tensors, and with
embeddings that become 0 or 1. 18 tensors for each of L layers and 6 around them, 18 L + 6. There is no config.json:
sizes are those of the tensors, and the rest is the architecture's.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spikelm import presets
from spikelm.configuration import SpikeLMConfig
from spikelm.conversion.published.kind import Fields, Kind, Rule, Tensors

_EMBEDDING, _INNER = "emb.weight", "blocks.0.ffn.key.weight"
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_OUTER = {
    _EMBEDDING: "model.embed_tokens.weight",
    "blocks.0.ln0.weight": "model.embedding_norm.weight",
    "blocks.0.ln0.bias": "model.embedding_norm.bias",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_LAYER = {
    "ln1.weight": "mixer_norm.weight",
    "ln1.bias": "mixer_norm.bias",
    "att.time_decay": "mixer.time.decay",
    "att.time_first": "mixer.time.first",
    "att.key.weight": "mixer.k_proj.weight",
    "att.value.weight": "mixer.v_proj.weight",
    "att.receptance.weight": "mixer.r_proj.weight",
    "att.output.weight": "mixer.o_proj.weight",
    "ln2.weight": "ffn_norm.weight",
    "ln2.bias": "ffn_norm.bias",
    "ffn.key.weight": "ffn.key_proj.weight",
    "ffn.receptance.weight": "ffn.receptance_proj.weight",
    "ffn.value.weight": "ffn.value_proj.weight",
}
# `[1, 1, hidden]` as published, `[hidden]` here.
_MIXES = {
    "att.time_mix_k": "mixer.mix_key",
    "att.time_mix_v": "mixer.mix_value",
    "att.time_mix_r": "mixer.mix_receptance",
    "ffn.time_mix_k": "ffn.mix_key",
    "ffn.time_mix_r": "ffn.mix_receptance",
}
# Of heads and rotations RWKV has none; the others act in training, in generation, or nowhere.
_UNSTATED = frozenset({
    "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "attention_rope", "hidden_act",
    "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range",
    "residual_dropout", "neuron_surrogate", "neuron_width", "neuron_detach_reset", "neuron_temporal_grad",
    "neuron_grad_window",
})  # fmt: skip


def _sizes(shapes: Mapping[str, torch.Size]) -> Fields:
    for name in (_EMBEDDING, _INNER):
        if name not in shapes:
            raise ValueError(f"it lacks {name}, which states its sizes.")
        if len(shapes[name]) != 2:
            raise ValueError(f"its {name} has shape {list(shapes[name])}; expected two dimensions.")
    blocks = {match[1] for match in map(_BLOCK.match, shapes) if match}
    vocabulary, hidden = shapes[_EMBEDDING]
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes[_INNER][0],
        "num_hidden_layers": len(blocks),
    }


def _rwkv4_fields(raw: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Fields:
    return copy.deepcopy(presets.RWKV4) | _sizes(shapes)


def _spikegpt_fields(raw: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Fields:
    return copy.deepcopy(presets.SPIKEGPT) | _sizes(shapes)


def _no_config(config: SpikeLMConfig) -> dict[str, Any]:
    return {}


def _rules(config: SpikeLMConfig) -> list[Rule]:
    rules = [Rule((published,), (ours,)) for published, ours in _OUTER.items()]
    for i in range(config.num_hidden_layers):
        theirs, layer = f"blocks.{i}.", f"model.layers.{i}."
        rules += [Rule((theirs + published,), (layer + ours,)) for published, ours in _LAYER.items()]
        rules += [
            Rule((theirs + published,), (layer + ours,), _read_mix, _write_mix) for published, ours in _MIXES.items()
        ]
    return rules


def _read_mix(mix: Tensor) -> Tensors:
    return (mix.flatten(),)


def _write_mix(mix: Tensor) -> Tensors:
    return (mix[None, None],)


SPIKEGPT = Kind(
    "spikegpt",
    "SpikeGPT",
    _spikegpt_fields,
    _no_config,
    _rules,
    choices=("binary_embedding",),
    unstated=_UNSTATED,
    file="spikegpt.pth",
)
RWKV4 = Kind("rwkv4", "RWKV-4", _rwkv4_fields, _no_config, _rules, unstated=_UNSTATED, file="rwkv4.pth")
