"""Load any model that a command names: a spikelm folder, a source of another family, a hub id, a `.gguf` file."""

from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoTokenizer, PreTrainedModel

from spikelm.configuration import SpikeLMConfig
from spikelm.conversion.checkpoints import read_checkpoint, read_json, reason
from spikelm.conversion.folder import RECORD
from spikelm.conversion.sources import open_source, quiet
from spikelm.inference.packed import load_packed
from spikelm.modeling import SpikeLMForCausalLM

_SITE_TENSORS = ("_site.k", "_site.dead_zone", "_site.magnitude")


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    changes: dict[str, Any] | None = None,
    progress: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """A causal language model in evaluation mode on the CPU, and its tokenizer.

    The model from a folder that a conversion wrote has its record as `model.conversion`.

    Args:
        source: a folder that a conversion wrote, or whatever `spikelm.convert` takes as a source.
        dtype: of the weights; None: as they are stored.
        changes: fields of a spikelm configuration that replace the stored ones.
        progress: whether to show bars for what takes long.

    Raises:
        ValueError: it is missing, damaged, incomplete, without a tokenizer, or of an unsupported architecture; or
            changes of what is no spikelm model, or that its weights do not fit.
    """
    folder = Path(source).expanduser()
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("model_type") == SpikeLMConfig.model_type:
        return _load_spiking(folder, dtype, changes or {}, progress)
    if changes:
        raise ValueError(f"{source} is no spikelm model, its configuration cannot be changed; convert it first.")
    opened = open_source(source, progress=progress)
    if opened.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer, so it can neither read nor write text; add its tokenizer files.")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(opened.config)]
    return _filled(model_class, opened.config, opened.tensors, dtype or opened.dtype, str(source)), opened.tokenizer


def read_config(folder: Path) -> SpikeLMConfig:
    """The configuration of a spikelm folder. Raises ValueError for another's."""
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != SpikeLMConfig.model_type:
        raise ValueError(
            f"{folder}/config.json states model_type {model_type!r}; expected 'spikelm'. Convert it first."
        )
    try:
        return SpikeLMConfig.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"{folder}/config.json is not a spikelm configuration: {reason(error)}") from error


def changed(config: SpikeLMConfig, changes: dict[str, Any]) -> SpikeLMConfig:
    """A configuration with other values of some fields. Raises ValueError for fields that there are not."""
    fields = config.to_dict()
    if unknown := sorted(changes.keys() - fields.keys()):
        raise ValueError(f"SpikeLMConfig has no field {unknown[0]}.")
    return SpikeLMConfig.from_dict(fields | changes) if changes else config


def _load_spiking(
    folder: Path, dtype: torch.dtype | None, changes: dict[str, Any], progress: bool
) -> tuple[PreTrainedModel, Any]:
    config = changed(read_config(folder), changes)
    if config.packed_weights is not None:
        model = load_packed(SpikeLMForCausalLM, config, folder, dtype=dtype)
    else:
        tensors = read_checkpoint(folder, progress)
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else next(iter(tensors.values())).dtype
        model = _filled(SpikeLMForCausalLM, config, tensors, dtype or stored, str(folder))
    if (folder / RECORD).is_file():
        model.conversion = read_json(folder / RECORD)  # type: ignore[assignment]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{folder} has no usable tokenizer: {reason(error)}") from error
    return model, tokenizer


def _filled(model_class: Any, config: Any, tensors: dict[str, Any], dtype: torch.dtype, name: str) -> PreTrainedModel:
    with quiet():
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    lacking = sorted(k for k in set(info["missing_keys"]) - tied if not k.endswith(_SITE_TENSORS))
    foreign = sorted(info["unexpected_keys"])
    if lacking or foreign or info["mismatched_keys"]:
        wrong = lacking or foreign or [str(key) for key in info["mismatched_keys"]]
        what = "lacks" if lacking else "holds unknown" if foreign else "holds wrongly shaped"
        raise ValueError(f"{name} {what} tensors: {', '.join(wrong[:4])}. Get or convert the whole model again.")
    return model.eval()
