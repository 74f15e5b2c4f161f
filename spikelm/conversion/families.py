"""Model families: how a source's configuration and tensors become a spikelm model's.

One `Family` per `model_type`, in two declared tables: `fields` turns the source's configuration into the fields of
`SpikeLMConfig`, `layer` names for every module of a source layer the module here that takes its tensors. A tuple of
names means that the source holds one fused tensor, split along its rows. Nothing is discovered: a tensor that no
table names is an error, and so is one of ours that nothing fills.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

Fields = dict[str, Any]

_ATTENTION = {f"self_attn.{p}_proj": f"mixer.{p}_proj" for p in "qkvo"}
_QK_NORMS = {"self_attn.q_norm": "mixer.q_norm", "self_attn.k_norm": "mixer.k_norm"}
_MLP = {f"mlp.{p}_proj": f"ffn.{p}_proj" for p in ("gate", "up", "down")}
_PRE_NORMS = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "ffn_norm"}
_POST_NORMS = {"post_attention_layernorm": "mixer_post_norm", "post_feedforward_layernorm": "ffn_post_norm"}
_GEMMA_NORMS = {"input_layernorm": "mixer_norm", "pre_feedforward_layernorm": "ffn_norm"} | _POST_NORMS
_FUSED: dict[str, str | tuple[str, ...]] = {
    "self_attn.qkv_proj": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
    "self_attn.o_proj": "mixer.o_proj",
    "mlp.gate_up_proj": ("ffn.gate_proj", "ffn.up_proj"),
    "mlp.down_proj": "ffn.down_proj",
}

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OUTER = {"model.embed_tokens": "model.embed_tokens", "model.norm": "model.norm", "lm_head": "lm_head"}


@dataclass(frozen=True)
class Family:
    """One supported source architecture.

    Attributes:
        name: what people call it.
        architecture: the class that transformers loads it with.
        fields: source configuration -> fields of `SpikeLMConfig`. Raises ValueError for what has no counterpart.
        layer: module of a source layer -> our module, or our modules in the order of the fused rows.
    """

    name: str
    architecture: str
    fields: Callable[[Any], Fields]
    layer: Mapping[str, str | tuple[str, ...]]


def _common(c: Any) -> Fields:
    """What all families share: sizes, token ids, pre-norms, one RoPE; full attention where nothing else is said."""
    heads = c.num_attention_heads
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // heads,
        "hidden_act": getattr(c, "hidden_activation", None) or c.hidden_act,
        "max_position_embeddings": c.max_position_embeddings,
        "initializer_range": c.initializer_range,
        "norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_word_embeddings,
        "pad_token_id": c.pad_token_id,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
        "attention_dropout": c.attention_dropout or 0.0,
        "rope_parameters": _rope(c.rope_parameters),
        "mixers": "attention",
    }


def _rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """One RoPE in transformers' form, without entries that say nothing."""
    silent = {"partial_rotary_factor": 1.0, "type": parameters.get("rope_type")}
    return {k: v for k, v in parameters.items() if v is not None and silent.get(k, ...) != v}


def _windowed(c: Any, sliding: list[bool]) -> Fields:
    """Mixers and windows of layers that are sliding or full."""
    if not any(sliding):
        return {}
    if c.sliding_window is None:
        raise ValueError(
            f"The source's configuration has sliding layers, but its sliding_window is {c.sliding_window!r}; "
            "expected a width. Correct config.json."
        )
    return {
        "mixers": ["swa" if s else "attention" for s in sliding],
        "attention_window": [c.sliding_window if s else None for s in sliding],
    }


def _by_layer_type(c: Any) -> Fields:
    return _windowed(c, [kind == "sliding_attention" for kind in c.layer_types])


def _everywhere(c: Any) -> Fields:
    return _windowed(c, [c.sliding_window is not None] * c.num_hidden_layers)


def _llama(c: Any) -> Fields:
    biases = {"attention_bias": c.attention_bias, "attention_output_bias": c.attention_bias, "ffn_bias": c.mlp_bias}
    return _common(c) | biases


def _smollm3(c: Any) -> Fields:
    ropes = ["global" if rotated else "none" for rotated in c.no_rope_layers[: c.num_hidden_layers]]
    return _llama(c) | _by_layer_type(c) | {"attention_rope": ropes}


def _mistral(c: Any) -> Fields:
    return _common(c) | _everywhere(c)


def _qwen2(c: Any) -> Fields:
    return _common(c) | _by_layer_type(c) | {"attention_bias": True}


def _qwen3(c: Any) -> Fields:
    biases = {"attention_bias": c.attention_bias, "attention_output_bias": c.attention_bias}
    return _common(c) | _by_layer_type(c) | biases | {"attention_qk_norm": "head"}


def _gemma2(c: Any) -> Fields:
    if c.use_bidirectional_attention:
        raise ValueError(
            "The source attends in both directions (use_bidirectional_attention); expected a causal language model. "
            "Convert a causal checkpoint of the family."
        )
    norms = {"pre_norm": "rmsnorm_1p", "post_norm": "rmsnorm_1p", "final_norm": "rmsnorm_1p"}
    return (
        _common(c)
        | _by_layer_type(c)
        | norms
        | {
            "attention_bias": c.attention_bias,
            "attention_output_bias": c.attention_bias,
            "attention_scale": c.query_pre_attn_scalar**-0.5,
            "attention_softcap": c.attn_logit_softcapping,
            "logit_softcap": c.final_logit_softcapping,
            "embedding_scale": c.hidden_size**0.5,
        }
    )


def _gemma3(c: Any) -> Fields:
    both = c.rope_parameters
    sliding = [kind == "sliding_attention" for kind in c.layer_types]
    flat = _gemma2(_Flat(c, both["full_attention"]))
    return flat | {
        "attention_qk_norm": "head",
        "attention_softcap": None,  # the source carries a value and does not apply it
        "local_rope_parameters": _rope(both["sliding_attention"]),
        "attention_rope": ["local" if s else "global" for s in sliding],
    }


class _Flat:
    """A configuration seen with one RoPE in place of one per layer type."""

    def __init__(self, config: Any, rope_parameters: Mapping[str, Any]):
        self._config, self.rope_parameters = config, rope_parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _olmo2(c: Any) -> Fields:
    return _common(c) | {
        "attention_bias": c.attention_bias,
        "attention_output_bias": c.attention_bias,
        "attention_qk_norm": "full",
        "pre_norm": "identity",
        "post_norm": "rmsnorm",
    }


def _phi3(c: Any) -> Fields:
    return _common(c) | _everywhere(c)


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", "LlamaForCausalLM", _llama, _ATTENTION | _MLP | _PRE_NORMS),
    "smollm3": Family("SmolLM3", "SmolLM3ForCausalLM", _smollm3, _ATTENTION | _MLP | _PRE_NORMS),
    "mistral": Family("Mistral", "MistralForCausalLM", _mistral, _ATTENTION | _MLP | _PRE_NORMS),
    "qwen2": Family("Qwen2", "Qwen2ForCausalLM", _qwen2, _ATTENTION | _MLP | _PRE_NORMS),
    "qwen3": Family("Qwen3", "Qwen3ForCausalLM", _qwen3, _ATTENTION | _QK_NORMS | _MLP | _PRE_NORMS),
    "gemma2": Family("Gemma 2", "Gemma2ForCausalLM", _gemma2, _ATTENTION | _MLP | _GEMMA_NORMS),
    "gemma3_text": Family("Gemma 3 (text)", "Gemma3ForCausalLM", _gemma3, _ATTENTION | _QK_NORMS | _MLP | _GEMMA_NORMS),
    "olmo2": Family("OLMo 2", "Olmo2ForCausalLM", _olmo2, _ATTENTION | _QK_NORMS | _MLP | _POST_NORMS),
    "phi3": Family("Phi-3", "Phi3ForCausalLM", _phi3, {**_FUSED, **_PRE_NORMS}),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a source configuration. Raises ValueError for one that is not supported."""
    return family_named(config.model_type)


def family_named(model_type: str | None) -> Family:
    """The family of a `model_type`. Raises ValueError for one that is not supported, listing those that are."""
    if model_type == "spikelm":
        raise ValueError(
            "The source is a spikelm model already; expected a model to convert. Load it with "
            "AutoModelForCausalLM.from_pretrained, or convert the model that it was made from."
        )
    if model_type == "gemma3":
        raise ValueError(
            "The source is the Gemma 3 with images ('gemma3'); expected its text model ('gemma3_text'). Save "
            "its language model alone, or convert a text-only checkpoint such as the 270M or 1B one."
        )
    if model_type not in FAMILIES:
        known = ", ".join(f"{family.name} ('{key}')" for key, family in FAMILIES.items())
        raise ValueError(f"Architecture {model_type!r} is not supported; expected one of: {known}.")
    return FAMILIES[model_type]
