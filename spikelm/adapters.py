"""Adapters: a few megabytes that turn a base model into its spiking form.

    y = W x + (alpha / rank) B A x        W frozen, A [rank, in], B [out, rank] trained        (Hu et al. 2021, LoRA)

A converted model differs from its base in more than the matrices that low-rank pairs change: gates, feature maps,
output norms of linear attention, thresholds and dead zones of its sites. None of these is in the base; all of them are
trained and saved whole. A folder holds

    adapter_model.safetensors, adapter_config.json     the low-rank pairs, as peft writes them
    new.safetensors, config.json                       what the base does not have, and the spiking model's form
    base.json                                          the base's name, and what its matrices are known by

    model = add_adapter(spikelm.convert(base, silent_share=0.5), rank=8, alpha=16)      # train, then
    save_adapter(model, folder)
    model = spikelm.load_adapter(base, folder)                                          # the same logits

The base is the source of the conversion, or the converted model. Where a conversion changed the source's own matrices
(attention transfer, a rotation), it is the converted model alone, and the source is refused. Spike sites stay what and
where they are: a low-rank pair reads the spikes that its matrix reads. Needs peft.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikelm.configuration import SpikeLMConfig
from spikelm.conversion.checkpoints import read_checkpoint, read_json, reason
from spikelm.conversion.convert import build, spelled_dtype
from spikelm.conversion.families import EMBEDDING, HEAD, family_of
from spikelm.conversion.folder import check_out, staged
from spikelm.conversion.keys import SITE_PATHS, listed, new_parameters
from spikelm.conversion.sources import open_source, quiet
from spikelm.loading import read_config
from spikelm.modeling import SpikeLMForCausalLM

NEW, BASE = "new.safetensors", "base.json"
_ADAPTER, _PREFIX = "default", "base_model.model."  # peft's name for the only one; what it puts before ours in files
_MARKED = 4096  # values of a matrix that it is known by
_TOLERANCE = 0.01  # rounding to bfloat16 moves a mark by about 0.001, another training by more in some matrix


def add_adapter(
    model: SpikeLMForCausalLM, *, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] | None = None
) -> SpikeLMForCausalLM:
    """Put low-rank pairs beside a model's linears, in place; they and what the base lacks are all that trains.

    At first B is zero, and the model computes what it did. Its checkpoints leave frozen tensors out.

    Args:
        model: a converted model. rank, alpha: see above.
        targets: names of linears (`q_proj`); None: all linears of the layers that the base has too.

    Raises:
        ValueError: a rank below 1, no linear of these names, a model that has an adapter or is not of a form that
            `convert` makes; peft is not installed.
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(f"An adapter needs a rank of at least 1 and an alpha above 0; got {rank} and {alpha}.")
    if _has_adapter(model):
        raise ValueError("The model has an adapter already; merge it first.")
    _check_form(model.config)
    new = new_parameters(model.config)
    linears = {
        name: module
        for name, module in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(module, nn.Linear) and f"{name}.weight" not in new
    }
    known = {name.rpartition(".")[2] for name in linears}
    if targets is not None and (strange := sorted(set(targets) - known)):
        raise ValueError(f"The model has no linears {', '.join(strange)} to adapt; it has {', '.join(sorted(known))}.")
    chosen = [name for name in linears if targets is None or name.rpartition(".")[2] in targets]
    if not chosen:
        raise ValueError(f"targets names no linears at all; the model has {', '.join(sorted(known))}.")
    peft = _peft()
    _inject(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, bias="none"))
    return model


def _inject(model: SpikeLMForCausalLM, config: Any) -> None:
    """Build the pairs that a peft configuration asks for, and freeze what the base has."""
    base = base_marks(model)
    _peft().inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    new, trained = new_parameters(model.config), set()
    for name, parameter in model.named_parameters():
        if name in new or ".lora_" in name:
            parameter.requires_grad_(True)
            trained.add(name)
    kept = trained | {name for name, _ in model.named_buffers()}
    model._keys_to_ignore_on_save = set(model.state_dict()) - kept
    model.adapter_base = base


def save_adapter(model: SpikeLMForCausalLM, folder: str | Path, *, base: str = "") -> None:
    """Write a model's adapter as a folder, which appears whole or not at all.

    Args:
        model: one with an adapter. folder: where. base: the name of the base model, for the record.

    Raises:
        ValueError: the model has no adapter; the folder exists already.
    """
    if not _has_adapter(model):
        raise ValueError("The model has no adapter to save; add_adapter gives it one.")
    place = Path(folder)
    check_out(place, overwrite=False)
    peft = _peft()
    pairs = peft.get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    config = model.peft_config[_ADAPTER]
    config.base_model_name_or_path = base
    new = new_parameters(model.config)
    whole = {name: tensor for name, tensor in model.state_dict().items() if name in new}
    with staged(place, overwrite=False) as staging:
        save_file(_contiguous(pairs, _PREFIX), staging / "adapter_model.safetensors", {"format": "pt"})
        save_file(_contiguous(whole), staging / NEW, {"format": "pt"})
        config.save_pretrained(str(staging))
        model.config.save_pretrained(staging)
        (staging / BASE).write_text(json.dumps({"name": base, "marks": model.adapter_base}, indent=1) + "\n")


def load_adapter(
    base: str | Path | PreTrainedModel,
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    progress: bool = True,
) -> SpikeLMForCausalLM:
    """The spiking model that an adapter makes of its base, in evaluation mode.

    Args:
        base: whatever `spikelm.convert` takes as a source, or a spikelm model or folder made from it.
        folder: what `save_adapter` wrote. dtype: of the weights; "auto": that of the base.
        progress: whether to show bars for what takes long.

    Raises:
        ValueError: a folder that is no adapter of ours, a base that the adapter was not made for, no peft.
    """
    folder = Path(folder)
    if not (folder / NEW).is_file():
        raise ValueError(f"{folder} holds no {NEW}; expected a folder that spikelm.adapters.save_adapter wrote.")
    peft = _peft()
    config = read_config(folder)
    new = load_file(folder / NEW)
    if set(new) != (declared := new_parameters(config)):
        raise ValueError(f"{folder}/{NEW} does not hold what config.json asks for: {listed(declared ^ set(new))}.")
    model = _rebuilt(base, config, spelled_dtype(dtype), progress)
    _check_base(model, folder)
    pairs = load_file(folder / "adapter_model.safetensors")
    try:
        _inject(model, peft.LoraConfig.from_pretrained(str(folder)))
        missed = model.load_state_dict(new, strict=False).unexpected_keys
        result = peft.set_peft_model_state_dict(
            model, {name.removeprefix(_PREFIX): t for name, t in pairs.items()}, adapter_name=_ADAPTER
        )
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit its own config.json: {reason(error)}") from error
    if strangers := missed + list(result.unexpected_keys):
        raise ValueError(f"{folder} holds tensors that its model does not have: {listed(strangers)}.")
    return model.eval()


def merge_adapter(model: SpikeLMForCausalLM) -> SpikeLMForCausalLM:
    """Add every low-rank pair to its matrix, in place: a plain converted model, all of it trainable.

    Raises:
        ValueError: the model has no adapter.
    """
    if not _has_adapter(model):
        raise ValueError("The model has no adapter to merge.")
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):
            module.merge()
            model.set_submodule(name, module.base_layer)
    del model.peft_config, model.adapter_base
    model._keys_to_ignore_on_save = None
    return model.requires_grad_(True)


def base_marks(model: SpikeLMForCausalLM) -> dict[str, float]:
    """What tells one base from another, whatever its dtype: a number for every matrix that the base has.

    The first values w of a matrix, projected on a fixed direction: sqrt(2) sum_i w_i cos(i^2) / |w|. A change of w by
    a share e of its size moves that by about e.
    """
    new, marks = new_parameters(model.config), {}
    for name, parameter in model.named_parameters():
        if name not in new and parameter.ndim > 1:
            w = parameter.detach().flatten()[:_MARKED].double().cpu()
            direction = torch.arange(len(w), dtype=torch.float64).square().cos()
            marks[name] = float(2**0.5 * (w @ direction) / w.norm().clamp_min(1e-30))
    return marks


def _check_base(model: SpikeLMForCausalLM, folder: Path) -> None:
    record = read_json(folder / BASE)
    for name, mark in base_marks(model).items():
        if abs(mark - record["marks"].get(name, float("inf"))) > _TOLERANCE:
            raise ValueError(
                f"The adapter {folder} was made for another base than this one ({record['name'] or 'no name given'}): "
                f"{name} is not the same. Give the base that it was trained on."
            )


def _rebuilt(
    base: str | Path | PreTrainedModel, config: SpikeLMConfig, dtype: torch.dtype | None, progress: bool
) -> SpikeLMForCausalLM:
    """The base's tensors in a model of the adapter's form; what the base lacks is not filled yet."""
    tensors = _ours(base, progress)
    if tensors is None:
        opened = open_source(base, progress=progress)  # type: ignore[arg-type]
        return build(opened, family_of(opened.config), config, dtype or opened.dtype)[0]
    new = new_parameters(config)
    given = {name: tensor for name, tensor in tensors.items() if name not in new}
    stored = given[EMBEDDING].dtype
    with quiet():
        model, info = SpikeLMForCausalLM.from_pretrained(
            None, config=config, state_dict=given, dtype=dtype or stored, output_loading_info=True
        )
    if lacking := set(info["missing_keys"]) - new - {HEAD}:
        raise ValueError(f"The base lacks tensors that the adapter's model needs: {listed(sorted(lacking))}.")
    return model


def _ours(base: str | Path | PreTrainedModel, progress: bool) -> dict[str, Tensor] | None:
    """The tensors of a base that is a spikelm model already, else None."""
    if isinstance(base, SpikeLMForCausalLM):
        if _has_adapter(base):
            raise ValueError("The base has an adapter itself; merge it first, or give the model without it.")
        return {name: tensor.clone() for name, tensor in base.state_dict().items()}
    folder = None if isinstance(base, PreTrainedModel) else Path(base).expanduser()
    if folder is None or not (folder / "config.json").is_file():
        return None
    if read_json(folder / "config.json").get("model_type") != SpikeLMConfig.model_type:
        return None
    return read_checkpoint(folder, progress)


def _check_form(config: SpikeLMConfig) -> None:
    """Raise ValueError unless what a base lacks is known: conversions have these sites, and no neurons."""
    layers = range(config.num_hidden_layers)
    strange = {site for i in layers for site in config.sites_at(i)} - set(SITE_PATHS)
    strange |= {config.at("spike_neuron", i) for i in layers if config.sites_at(i)} - {"none"}
    if strange:
        raise ValueError(
            f"An adapter is for a model that a conversion made, with sites {', '.join(SITE_PATHS)}; this one has "
            f"{', '.join(sorted(strange))}. Train all of its weights."
        )


def _has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "adapter_base")


def _contiguous(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("Adapters need the package peft: pip install 'spikelm[train]'.") from error
    return peft
