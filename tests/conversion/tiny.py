"""Tiny random source models of every family, with norms, biases and geometries that a wrong table would not survive."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0],
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}


def llama(**changes) -> PreTrainedModel:
    return _perturbed(LlamaForCausalLM(LlamaConfig(**SIZES | changes)))


def smollm3(**changes) -> PreTrainedModel:
    return _perturbed(SmolLM3ForCausalLM(SmolLM3Config(**SIZES | changes)))


def mistral(**changes) -> PreTrainedModel:
    return _perturbed(MistralForCausalLM(MistralConfig(**SIZES | changes)))


def qwen2(**changes) -> PreTrainedModel:
    return _perturbed(Qwen2ForCausalLM(Qwen2Config(**SIZES | changes)))


def qwen3(**changes) -> PreTrainedModel:
    return _perturbed(Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 16} | changes)))


def gemma2(**changes) -> PreTrainedModel:
    given = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7}
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES | given | changes))
    model.set_attn_implementation("eager")  # the fused ones know no cap on scores; older transformers did not say so
    return _perturbed(model)


def gemma3(**changes) -> PreTrainedModel:
    given = {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    }
    return _perturbed(Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | given | changes)))


def olmo2(**changes) -> PreTrainedModel:
    return _perturbed(Olmo2ForCausalLM(Olmo2Config(**SIZES | changes)))


def phi3(**changes) -> PreTrainedModel:
    return _perturbed(Phi3ForCausalLM(Phi3Config(**SIZES | changes)))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-biases-tied-llama3": lambda: llama(
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=LLAMA3, head_dim=16
    ),
    "llama-yarn": lambda: llama(rope_parameters=YARN, num_key_value_heads=4, rms_norm_eps=1e-3),
    "smollm3": lambda: smollm3(no_rope_layer_interval=2),
    "smollm3-windows-untied": lambda: smollm3(
        use_sliding_window=True, sliding_window=6, no_rope_layers=[1, 0, 1, 1], tie_word_embeddings=False, mlp_bias=True
    ),
    "mistral-window": lambda: mistral(sliding_window=5),
    "mistral-full-wide-heads": lambda: mistral(sliding_window=None, head_dim=24),
    "qwen2": lambda: qwen2(),
    "qwen2-windows-tied": lambda: qwen2(
        use_sliding_window=True, sliding_window=6, max_window_layers=2, tie_word_embeddings=True
    ),
    "qwen3": lambda: qwen3(tie_word_embeddings=True),
    "qwen3-windows-biases": lambda: qwen3(
        use_sliding_window=True,
        sliding_window=6,
        attention_bias=True,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gemma2": lambda: gemma2(attn_logit_softcapping=4.0, final_logit_softcapping=3.0),
    "gemma2-no-caps-biases": lambda: gemma2(
        attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True, tie_word_embeddings=False
    ),
    "gemma3": lambda: gemma3(rope_parameters=TWO_ROPES),
    "gemma3-capped": lambda: gemma3(final_logit_softcapping=3.0, attn_logit_softcapping=4.0, attention_bias=True),
    "olmo2": lambda: olmo2(),
    "olmo2-biases-tied": lambda: olmo2(attention_bias=True, tie_word_embeddings=True, hidden_act="gelu"),
    "phi3-window": lambda: phi3(sliding_window=6),
    "phi3-partial-longrope": lambda: phi3(rope_parameters=LONG, original_max_position_embeddings=20),
    "phi3-partial-tied": lambda: phi3(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        tie_word_embeddings=True,
    ),
}


def _perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """Random norms and biases, and weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(len(list(model.parameters())))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * 0.15)
    return model.eval()


class WideNorm(nn.Module):
    """A source's RMSNorm computed in its own dtype: sources round to float32 even in float64."""

    def __init__(self, norm: nn.Module, offset: float):
        super().__init__()
        self.weight, self.offset = norm.weight, offset
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """The source in float64, throughout; its embedding scale too."""
    model = model.double()
    embeddings = model.model.embed_tokens
    if hasattr(embeddings, "embed_scale"):
        embeddings.embed_scale = torch.tensor(embeddings.scalar_embed_scale, dtype=torch.float64)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, name = path.rpartition(".")
            setattr(
                model.get_submodule(parent), name, WideNorm(module, 1.0 if "Gemma" in type(module).__name__ else 0.0)
            )
    return model
