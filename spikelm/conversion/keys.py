"""Tensors of a source, renamed and split into tensors of ours, with every one of them accounted for."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from spikelm.configuration import SpikeLMConfig
from spikelm.conversion.families import EMBEDDING, HEAD, OUTER, Family

_LAYER_KEY = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
# Rotary tables that old checkpoints carry; they follow from the configuration.
_DERIVED_KEY = re.compile(r"model(\.layers\.\d+\.self_attn)?\.rotary_emb\.(original_)?inv_freq")
SITE_PATHS = {
    "qkv": "mixer.qkv_site",
    "o": "mixer.o_site",
    "gate_up": "ffn.gate_up_site",
    "down": "ffn.down_site",
}
# Tensors of a mixer that no source has; beside them, a low-rank gate.
_NEW = {
    "gla": ("norm.weight",),
    "retention": ("norm.weight", "g_proj.weight"),
    "delta": ("norm.weight", "a_proj.weight", "b_proj.weight", "rates.A_log", "rates.dt_bias"),
    "window_linear": ("query_map", "key_map", "factor.logit"),
}
_SHOWN = 6


def new_parameters(config: SpikeLMConfig) -> set[str]:
    """Names of the parameters that a converted model has and no source fills, as declared here.

    They are the tensors of its spike sites, the gates, feature maps and output norms of linear attention, and the
    norms of parallel branches.
    """
    site_tensors = ["k", "dead_zone"] + (["magnitude"] if config.spike_threshold != "token" else [])
    names: set[str] = set()
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        names |= {f"{layer}.{SITE_PATHS[site]}.{t}" for site in config.sites_at(i) for t in site_tensors}
        mixers = config.mixers[i].split("+")
        names |= {f"{layer}.mixer.{mixer}.{tensor}" for mixer in mixers for tensor in _NEW.get(mixer, ())}
        if "gla" in mixers and config.at("gla_gate", i) == "low_rank":
            names |= {f"{layer}.mixer.gla.gate.{t}" for t in ("0.weight", "1.weight", "1.bias")}
        if len(mixers) > 1 and config.at("parallel_norms", i) == "both":
            # A mixer with an output norm of its own needs no other.
            normed = {mixer for mixer in mixers if "norm.weight" in _NEW.get(mixer, ())}
            names |= {f"{layer}.mixer.branch_norms.{mixer}.weight" for mixer in mixers if mixer not in normed}
    return names


def targets_of(family: Family, key: str) -> tuple[str, ...] | None:
    """Our names for a source tensor, in the order of its rows; None if no table names it."""
    module, _, kind = key.rpartition(".")
    if module in OUTER and kind in ("weight", "bias"):
        return (f"{OUTER[module]}.{kind}",)
    if not (match := _LAYER_KEY.fullmatch(key)):
        return None
    index, module, kind = match.groups()
    targets = family.layer.get(module)
    if targets is None:
        return None
    modules = (targets,) if isinstance(targets, str) else targets
    return tuple(f"model.layers.{index}.{module}.{kind}" for module in modules)


def source_of(family: Family, name: str) -> str:
    """The source tensor that fills our tensor `name`; `name` itself if no table knows."""
    if match := _LAYER_KEY.fullmatch(name):
        index, module, kind = match.groups()
        for source, targets in family.layer.items():
            if module == targets or (module in targets and not isinstance(targets, str)):
                return f"model.layers.{index}.{source}.{kind}"
    return name


def normalised(tensors: dict[str, Tensor], tied: bool) -> tuple[dict[str, Tensor], bool]:
    """One spelling for what sources spell in several ways; returns the tensors and whether the head is tied.

    A bare decoder's names get their prefix, rotary tables go, and of a head that equals the embeddings one copy
    stays. A head that differs from the embeddings is kept apart, whatever the configuration says.
    """
    if "embed_tokens.weight" in tensors:
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not _DERIVED_KEY.fullmatch(name)}
    if tied and HEAD in tensors:
        if EMBEDDING not in tensors:
            tensors[EMBEDDING] = tensors.pop(HEAD)
        elif torch.equal(tensors[EMBEDDING], tensors[HEAD]):
            del tensors[HEAD]
        else:
            tied = False
    return tensors, tied


def map_tensors(
    family: Family,
    tensors: dict[str, Tensor],
    expected: Mapping[str, torch.Size],
    new: set[str],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Rename and split the tensors of a source; `tensors` is emptied on the way, so that nothing is held twice.

    Args:
        family: the source's family.
        tensors: name -> tensor of the source, as `normalised` returns them.
        expected: name -> shape of every tensor of our model, without a tied head.
        new: those of them that no source fills.
        dtype: of the result; tensors that have it already are passed on, not copied.

    Returns:
        Our name -> tensor, for all of `expected` but `new`.

    Raises:
        ValueError: a tensor that no table names, or one that is missing or has another shape; all of them are listed.
    """
    _refuse("tensors that a {} model does not have", family, [k for k in tensors if not targets_of(family, k)])
    mapped: dict[str, Tensor] = {}
    misfits = []
    for key in list(tensors):
        targets = targets_of(family, key) or ()
        tensor = tensors.pop(key)
        shapes = [expected.get(target) for target in targets]
        if None in shapes:
            misfits.append(key)
            continue
        shape = _stacked([s for s in shapes if s is not None])
        if tensor.shape != shape:
            raise ValueError(
                f"Tensor {key} of the source has shape {list(tensor.shape)}; its configuration expects {list(shape)}. "
                "The weights and config.json do not belong together: get the source again."
            )
        rows = [expected[target][0] for target in targets]
        # A part of a fused tensor is copied, or it would keep the whole of it alive.
        parts = [tensor] if len(rows) == 1 else [part.clone() for part in tensor.split(rows)]
        mapped |= zip(targets, (part.to(dtype) for part in parts), strict=True)
    _refuse("tensors that its configuration has no place for", family, misfits)
    absent = sorted({source_of(family, name) for name in set(expected) - new - set(mapped)})
    if absent:
        raise ValueError(
            f"The source lacks {len(absent)} of the tensors that a {family.name} model needs: {listed(absent)}. "
            "They would be random: get the complete source."
        )
    if strangers := sorted((set(mapped) & new) | (new - set(expected))):
        raise ValueError(
            f"The declared new parameters do not match the model: {listed(strangers)}. This is a defect of the "
            "converter's tables: please report it with the source's config.json."
        )
    return mapped


def _stacked(shapes: list[torch.Size]) -> torch.Size:
    """The shape of tensors that are stacked along their rows."""
    return torch.Size((sum(shape[0] for shape in shapes), *shapes[0][1:]))


def _refuse(what: str, family: Family, names: list[str]) -> None:
    if names:
        raise ValueError(
            f"The source holds {len(names)} {what.format(family.name)}: {listed(sorted(names))}. Expected the "
            f"tensors of {family.architecture}; convert a checkpoint without adapters or extra heads."
        )


def listed(names: Iterable[str]) -> str:
    """The first names of many, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
