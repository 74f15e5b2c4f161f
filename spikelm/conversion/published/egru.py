"""EvNN's language models as published (version 0.2; Subramoney et al., arXiv 2206.06178): PTB and WikiText-2.

A pickle of plain tensors without a config.json: embedding, a stack of event-based GRUs, a decoder tied to the embedding
with a bias of its own. Sizes follow from the shapes. A cell has its matrices as `[inputs, 3H]` and `[H, 3H]`, blocks in
the order z, r, g, and three numbers that only its backward pass reads: height and inverse half width of the surrogate
gradient, and the bound of a clipping of gradients. These are not kept but known: the published recipes share them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spikelm.configuration import SpikeLMConfig
from spikelm.conversion.published.kind import Fields, Kind, Rule, Tensors
from spikelm.presets import PRESETS

_ARCHITECTURE = PRESETS["egru-ptb"]
_EMBEDDING, _DECODER = "embeddings.weight", "decoder.decoder.weight"
_TRAINING = {
    "dampening_factor": _ARCHITECTURE["egru_dampening"],
    "pseudo_derivative_support": _ARCHITECTURE["egru_support"],
    "_max_norm": 0.1,
}
# What a model of one stack does not use, or only in training or generation.
_UNSTATED = frozenset({
    "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "attention_rope", "hidden_act",
    "intermediate_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
    "initializer_range", "residual_dropout", "egru_threshold_mean",
})  # fmt: skip


def _fields(raw: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Fields:
    sizes: list[int] = []
    while (matrix := f"rnns.{len(sizes)}.recurrent_kernel") in shapes:
        sizes.append(shapes[matrix][0])
    for name, present in ((_EMBEDDING, _EMBEDDING in shapes), (matrix, bool(sizes))):
        if not present:
            raise ValueError(f"it lacks {name}.")
    if "decoder.projection.weight" in shapes:
        raise ValueError("it has a projection in front of its decoder, which no released model has; expected none.")
    vocabulary, width = shapes[_EMBEDDING]
    stated = {"vocab_size": vocabulary, "hidden_size": width, "egru_stack_sizes": sizes}
    return _ARCHITECTURE | stated | {"egru_drop_internal": False}


def _no_config(config: SpikeLMConfig) -> dict[str, Any]:
    return {}


def _rules(config: SpikeLMConfig) -> list[Rule]:
    rules = [
        Rule((_EMBEDDING, _DECODER), ("model.embed_tokens.weight",), _read_tied, _write_tied),
        Rule(("decoder.decoder.bias",), ("lm_head.bias",)),
    ]
    for i in range(len(config.egru_stack_sizes or [])):
        theirs, ours = f"rnns.{i}.", f"model.layers.0.mixer.cells.{i}."
        rules += [
            Rule((f"{theirs}kernel",), (f"{ours}in_proj.weight",), _transposed, _transposed),
            Rule((f"{theirs}bias",), (f"{ours}in_proj.bias",)),
            Rule((f"{theirs}recurrent_kernel",), (f"{ours}recurrent",), _read_full, _write_full),
            Rule((f"{theirs}recurrent_bias",), (f"{ours}recurrent_bias",)),
            Rule((f"{theirs}thr",), (f"{ours}events.thresholds",), _read_thresholds),
        ]
        rules += [
            Rule((f"{theirs}{name}",), (), _left_out, partial(_constant, value)) for name, value in _TRAINING.items()
        ]
    return rules


def _read_tied(embedding: Tensor, decoder: Tensor) -> Tensors:
    if not torch.equal(embedding, decoder):
        raise ValueError(f"it differs from {_DECODER}; expected one tied matrix.")
    return (embedding,)


def _write_tied(embedding: Tensor) -> Tensors:
    return embedding, embedding.clone()


def _transposed(weight: Tensor) -> Tensors:
    return (weight.T,)


def _read_full(weight: Tensor) -> Tensors:
    return (weight.unsqueeze(0),)


def _write_full(weight: Tensor) -> Tensors:
    return (weight.squeeze(0),)


def _read_thresholds(thresholds: Tensor) -> Tensors:
    low, high = thresholds.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"its thresholds lie in [{float(low):.3g}, {float(high):.3g}]; expected [0, 1] (EvNN 0.2).")
    return (thresholds,)


def _left_out(value: Tensor) -> Tensors:
    return ()


def _constant(value: float) -> Tensors:
    return (torch.tensor([value], dtype=torch.float32),)


EVNN_EGRU_LM = Kind(
    "evnn-egru-lm",
    "EvNN EGRU language model",
    _fields,
    _no_config,
    _rules,
    dtype=torch.float32,
    moved="Surrogate gradients (3.6, 3.6) and gradient clipping (0.1) are those of the published recipes, whatever the "
    "file says; they matter in training alone",
    choices=("egru_drop_internal",),
    unstated=_UNSTATED,
    file="EGRU_best_model.cpt",
)
