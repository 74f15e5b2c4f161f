"""RWKV-7 as published (arXiv 2503.14456): one file of tensors in the layout "x070", without a configuration.

Its sizes are those of its tensors. Vectors over channels are `[1, 1, C]` there and `[C]` here; the low-rank maps
`w1`, `w2` and so on are `[in, out]` there and the weights of linears here. Files of the published trainer hold `v0`,
`v1`, `v2` for the first layer too, where no forward reads them: `rwkv_idle_value_mix`.
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

HEAD = 64  # the published ln_x has an epsilon of 64e-5 whatever its heads; ours of 1e-5 times their width

_OUTER = {
    "emb.weight": "model.embed_tokens.weight",
    "blocks.0.ln0.weight": "model.embedding_norm.weight",
    "blocks.0.ln0.bias": "model.embedding_norm.bias",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_AS_THEY_ARE = {
    "ln1.weight": "mixer_norm.weight",
    "ln1.bias": "mixer_norm.bias",
    "att.r_k": "mixer.channels.bonus",
    "att.receptance.weight": "mixer.r_proj.weight",
    "att.key.weight": "mixer.k_proj.weight",
    "att.value.weight": "mixer.v_proj.weight",
    "att.output.weight": "mixer.o_proj.weight",
    "att.ln_x.weight": "mixer.norm.weight",
    "att.ln_x.bias": "mixer.norm.bias",
    "ln2.weight": "ffn_norm.weight",
    "ln2.bias": "ffn_norm.bias",
    "ffn.key.weight": "ffn.key_proj.weight",
    "ffn.value.weight": "ffn.value_proj.weight",
}
_VECTORS = {
    "att.x_r": "mixer.mix_r",
    "att.x_w": "mixer.mix_w",
    "att.x_k": "mixer.mix_k",
    "att.x_v": "mixer.mix_v",
    "att.x_a": "mixer.mix_a",
    "att.x_g": "mixer.mix_g",
    "att.w0": "mixer.channels.decay",
    "att.a0": "mixer.channels.rate",
    "att.k_k": "mixer.channels.erase",
    "att.k_a": "mixer.channels.write",
    "ffn.x_k": "ffn.mix_key",
}
_LOW_RANK = {
    "att.w1": "mixer.decay.0.weight",
    "att.w2": "mixer.decay.1.weight",
    "att.a1": "mixer.rate.0.weight",
    "att.a2": "mixer.rate.1.weight",
    "att.g1": "mixer.gate.0.weight",
    "att.g2": "mixer.gate.1.weight",
}
_VALUE_VECTORS = {"att.v0": "mixer.channels.value"}
_VALUE_LOW_RANK = {"att.v1": "mixer.value.0.weight", "att.v2": "mixer.value.1.weight"}
_IDLE = {f"att.{name}": f"mixer.idle.{name}" for name in ("v0", "v1", "v2")}

# What acts in training, in generation, or nowhere; and the ranks, which the shapes of tensors state.
_UNSTATED = frozenset({
    "num_key_value_heads", "rope_parameters", "attention_rope", "hidden_act", "max_position_embeddings",
    "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "residual_dropout",
    "rwkv_decay_rank", "rwkv_rate_rank", "rwkv_value_rank", "rwkv_gate_rank",
})  # fmt: skip


def _fields(raw: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Fields:
    def matrix(name: str) -> tuple[int, int]:
        if name not in shapes:
            raise ValueError(f"it lacks {name}.")
        if len(shapes[name]) != 2:
            raise ValueError(f"its {name} has shape {list(shapes[name])}; expected two dimensions.")
        return shapes[name][0], shapes[name][1]

    vocab, hidden = matrix("emb.weight")
    heads, width = matrix("blocks.0.att.r_k")
    if width != HEAD:
        raise ValueError(f"its heads (blocks.0.att.r_k) are {width} wide; expected {HEAD}, as in every release.")
    layers = len({found[1] for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))})
    idle = "blocks.0.att.v1" in shapes
    ranks = {"decay": "blocks.0.att.w1", "rate": "blocks.0.att.a1", "gate": "blocks.0.att.g1"}
    if idle or layers > 1:
        ranks["value"] = f"blocks.{0 if idle else 1}.att.v1"
    return copy.deepcopy(presets.RWKV7) | {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": matrix("blocks.0.ffn.key.weight")[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rwkv_idle_value_mix": idle,
        **{f"rwkv_{name}_rank": matrix(key)[1] for name, key in ranks.items()},
    }


def _no_config(config: SpikeLMConfig) -> dict[str, Any]:
    return {}


def _rules(config: SpikeLMConfig) -> list[Rule]:
    rules = [Rule((published,), (ours,)) for published, ours in _OUTER.items()]
    for i in range(config.num_hidden_layers):
        same, vectors, low_rank = _AS_THEY_ARE, _VECTORS, _LOW_RANK
        if i > 0:
            vectors, low_rank = vectors | _VALUE_VECTORS, low_rank | _VALUE_LOW_RANK
        elif config.rwkv_idle_value_mix:
            same = same | _IDLE
        theirs, ours = f"blocks.{i}.", f"model.layers.{i}."
        rules += [Rule((theirs + p,), (ours + o,)) for p, o in same.items()]
        rules += [Rule((theirs + p,), (ours + o,), _read_vector, _write_vector) for p, o in vectors.items()]
        rules += [Rule((theirs + p,), (ours + o,), _transposed, _transposed) for p, o in low_rank.items()]
    return rules


def _read_vector(vector: Tensor) -> Tensors:
    return (vector.flatten(),)


def _write_vector(vector: Tensor) -> Tensors:
    return (vector[None, None],)


def _transposed(matrix: Tensor) -> Tensors:
    return (matrix.T,)


RWKV7 = Kind("rwkv7", "RWKV-7", _fields, _no_config, _rules, unstated=_UNSTATED, file="rwkv7.pth")
