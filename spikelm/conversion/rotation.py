"""Outliers spread over all channels: orthogonal matrices folded into the weights; the model computes what it did.

A few channels of the residual stream of a trained model are hundreds of times larger than the mean. Counts that are to
stay small (`spike_max_count`) cannot hold them. For an orthogonal R, x -> x R makes every channel a mixture of all of
them, and an RMSNorm without gains commutes with R, since it changes lengths only. So, with x a row:

    gains       W <- W diag(g), g <- 1            for the linears behind each norm; the head's norm likewise
    residual    E <- E R                          the embeddings
                W <- W R                          linears that read the residual stream, and the head
                W <- R^T W,  b <- R^T b           linears that write to it
    heads       V <- S^T V,  O <- O S             per head: S of the head's width, between values and output

The input of `down` stands behind a product of two linears, where no matrix can be folded: it keeps its outliers, and
small counts at this site break a model as if nothing were rotated.
A mixture of many channels is seldom close to zero: rotation takes away the zeros that an event-driven runtime skips.
It serves small counts, and excludes dead zones. (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406.)
"""

import torch
from torch import Tensor, nn

from spikelm.configuration import SpikeLMConfig
from spikelm.ffns.gated import GatedFFN
from spikelm.mixers.attention import SoftmaxCore
from spikelm.mixers.heads import HeadMixer
from spikelm.modeling import SpikeLMForCausalLM

# What must hold of a model for its norms to commute with a rotation: field -> its only value.
_PLAIN = {
    "pre_norm": "rmsnorm",
    "post_norm": "identity",
    "final_norm": "rmsnorm",
    "embedding_norm": "identity",
    "residual": True,
    "binary_embedding": False,
    "weight_group_size": None,
}


@torch.no_grad()
def rotate(model: SpikeLMForCausalLM, seed: int = 0) -> list[str]:
    """Rotate the residual stream, and the values of layers with nothing but softmax attention, in place.

    With sites off the logits stay what they were, up to rounding of the weights (float64: 1e-9). A head that is tied to
    the embeddings becomes a matrix of its own if the final norm has gains, which only it takes over.

    Args:
        model: a spikelm model of `HeadMixer` and `GatedFFN` layers with plain RMSNorms before mixer and ffn.
        seed: of the random signs and matrices.

    Returns:
        What was rotated, for a record: `residual`, and `values.N` for layers N.

    Raises:
        ValueError: a model whose norms or layers do not commute with a rotation.
    """
    check_rotatable(model.config)
    base = model.model
    _untie(model)
    generator = torch.Generator().manual_seed(seed)
    turn = orthogonal(model.config.hidden_size, generator)
    base.embed_tokens.weight.copy_(_wide(base.embed_tokens.weight) @ turn)
    if not model.config.tie_word_embeddings:
        _read(base.norm, [model.lm_head], turn)
    rotated = ["residual"]
    for index, layer in enumerate(base.layers):
        mixer, ffn = layer.mixer, layer.ffn
        _read(layer.mixer_norm, [mixer.get_submodule(name) for name in mixer.site_readers["qkv_site"]], turn)
        _read(layer.ffn_norm, [ffn.gate_proj, ffn.up_proj], turn)
        for writer in (mixer.o_proj, ffn.down_proj):
            writer.weight.copy_(turn.T @ _wide(writer.weight))
            if writer.bias is not None:
                writer.bias.copy_(_wide(writer.bias) @ turn)
        if _passes_values(mixer):
            _rotate_values(mixer, orthogonal(mixer.head_dim, generator))
            rotated.append(f"values.{index}")
    return rotated


def check_rotatable(config: SpikeLMConfig) -> None:
    """Raise ValueError for a model that cannot be rotated exactly."""
    for field, value in _PLAIN.items():
        given = getattr(config, field)
        if any(entry != value for entry in (given if isinstance(given, list) else [given])):
            raise ValueError(
                f"A rotation needs {field} = {value!r} in every layer, where it commutes with the norms; this model "
                f"has {given!r}. Leave rotate out."
            )
    with torch.device("meta"):
        layers = SpikeLMForCausalLM(config).model.layers
    for index, layer in enumerate(layers):
        if type(layer.mixer) is not HeadMixer or type(layer.ffn) is not GatedFFN:
            raise ValueError(
                f"A rotation is folded into linears that read the residual stream as it is; layer {index} "
                f"({config.mixers[index]}, {config.ffns[index]}) does more with it. Leave rotate out."
            )


def _passes_values(mixer: HeadMixer) -> bool:
    """Whether heads are sums of values with weights that do not depend on them, and nothing stands in between."""
    cores = [getattr(mixer, name) for name in mixer.core_names]
    return len(cores) == 1 and isinstance(cores[0], SoftmaxCore) and not cores[0].int8_keys_values


def orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix `[width, width]`, float64: Hadamard of the largest power of two in the width, times
    a random orthogonal matrix of the odd rest, with random signs; all rows are spread over all columns."""
    odd = width
    while odd % 2 == 0:
        odd //= 2
    turn = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))[0].contiguous()
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    while turn.shape[0] < width:
        turn = torch.kron(pair, turn)
    signs = torch.randint(0, 2, (width, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * turn


def _untie(model: SpikeLMForCausalLM) -> None:
    gains = model.model.norm.weight
    if model.config.tie_word_embeddings and bool((gains != 1).any()):
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _read(norm: nn.Module, readers: list[nn.Linear], turn: Tensor) -> None:
    """The norm's gains, then the rotation, into the linears behind it."""
    for reader in readers:
        reader.weight.copy_((_wide(reader.weight) * _wide(norm.weight)) @ turn)
    norm.weight.fill_(1.0)


def _rotate_values(mixer: HeadMixer, turn: Tensor) -> None:
    value, output, width = mixer.v_proj, mixer.o_proj, mixer.head_dim
    for tensor in (value.weight, value.bias):
        if tensor is None:
            continue
        heads = _wide(tensor).unflatten(0, (-1, width))  # [Hkv, D, ...]
        tensor.copy_(torch.einsum("hd...,de->he...", heads, turn).flatten(0, 1))
    output.weight.copy_((_wide(output.weight).unflatten(1, (-1, width)) @ turn).flatten(1))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()
