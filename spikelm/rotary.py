"""Rotary tables for every RoPE that transformers knows, one per name ("global", "local") of the configuration."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from spikelm.precision import KeepsDtype
from spikelm.validation import ROTATED

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig


class RotaryEmbedding(KeepsDtype, LlamaRotaryEmbedding):
    """cos and sin `[B, T, R]` of positions `[B, T]`, in the dtype of x; R = head_dim * partial_rotary_factor.

    The class keeps this name's suffix because transformers re-creates the buffers of such classes after a build on
    the meta device.
    """

    def __init__(self, config: "SpikeLMConfig", rope_parameters: dict[str, Any]):
        # The frequencies of scaled RoPE are computed by transformers from a flat, Llama-like configuration.
        view = LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(rope_parameters),
        )
        super().__init__(view)

    @staticmethod
    def compute_default_rope_parameters(config: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """Inverse frequencies `[R / 2]` of plain RoPE (Su et al. 2021), partial if the parameters say so."""
        share = config.rope_parameters.get("partial_rotary_factor") or 1.0
        width = int(config.head_dim * share)
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0


def make_rotaries(config: "SpikeLMConfig") -> dict[str, RotaryEmbedding]:
    """The rotary tables that some layer uses, by name."""
    rotated = [i for i, mixer in enumerate(config.mixers) if ROTATED & set(mixer.split("+"))]
    used = {config.at("attention_rope", i) for i in rotated}
    parameters = {"global": config.rope_parameters or {}, "local": config.local_rope_parameters or {}}
    return {name: RotaryEmbedding(config, parameters[name]) for name in sorted(used - {"none"})}
