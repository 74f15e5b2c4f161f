"""`convert`: a language model in, a spiking language model out, as a model in memory and as a complete folder."""

import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import spikelm
from spikelm.configuration import SpikeLMConfig
from spikelm.conversion.calibration import calibrate
from spikelm.conversion.checkpoints import reason
from spikelm.conversion.families import HEAD, Family, family_of
from spikelm.conversion.folder import check_out, write_folder
from spikelm.conversion.keys import map_tensors, new_parameters, normalised
from spikelm.conversion.plan import ConversionPlan
from spikelm.conversion.rotation import check_rotatable, rotate
from spikelm.conversion.search import search
from spikelm.conversion.sources import Source, open_source, quiet
from spikelm.conversion.texts import Texts
from spikelm.conversion.transfer import replaced_layers, teacher_of, transfer
from spikelm.modeling import SpikeLMForCausalLM

SCHEMA_VERSION = 1
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def convert(
    source: str | Path | PreTrainedModel,
    out: str | Path | None = None,
    *,
    plan: ConversionPlan | None = None,
    tokenizer: Any = None,
    calibration_text: str | Tensor | None = None,
    transfer_tokens: int = 0,
    transfer_text: Texts = None,
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
    progress: bool = True,
    **choices: Any,
) -> SpikeLMForCausalLM:
    """Convert a language model to spiking form.

    Args:
        source: a model folder, a hub id, a `.gguf` file, or a loaded transformers model, whose weights are copied.
        out: where to write the complete model folder. It appears when everything is written, or not at all.
        plan: what to change; or its choices as keywords: `mixers`, `target`, `keep`, `window`, `sinks`, `sites`,
            `code`, `k`, `dead_zone`, `threshold`, `silent_share`, `allocation`, `max_count`, `rotate` (see
            `ConversionPlan`). `mixers="keep", sites="none"` changes nothing: the logits stay those of the source.
        tokenizer: used, and written, in place of the source's own.
        calibration_text: text, or token ids `[N]`, that thresholds and dead zones are calibrated on; default: a
            sample that every Python carries.
        transfer_tokens: how many tokens of text the mixers of replaced layers learn from, each fitted to the attention
            that it replaces (see `spikelm.conversion.transfer`); 0: they stay untrained.
        transfer_text: a text, token ids `[N]`, or a list of either, for that; default: `calibration_text`.
        dtype: of the weights; "auto": that of the source.
        overwrite: replace `out` if it is a folder that a conversion wrote.
        progress: whether to print the plan and show bars.

    Returns:
        The model in evaluation mode, on the CPU or where a loaded source is. `model.conversion` is the record that
        stands in `conversion.json`.

    Raises:
        ValueError: a source, a plan or an `out` that cannot be used; one line that says what to do.
    """
    if plan is not None and choices:
        raise ValueError(f"Give a plan or its choices, not both; got a plan and {', '.join(sorted(choices))}.")
    plan = plan or ConversionPlan.of(**choices)
    wanted = spelled_dtype(dtype)
    place = None if out is None else Path(out).expanduser()
    if place is not None:
        check_out(place, overwrite)
    opened = open_source(source, tokenizer=tokenizer, progress=progress)
    family = family_of(opened.config)
    fields = family.fields(opened.config)
    own = ConversionPlan(mixers="keep", sites="none").apply(fields)
    config = (plan.everywhere() if plan.is_measured else plan).apply(fields)
    replaced = replaced_layers(own, config)
    if not isinstance(transfer_tokens, int) or transfer_tokens < 0:
        raise ValueError(f"transfer_tokens must be a number of tokens, at least 0; got {transfer_tokens!r}.")
    if transfer_tokens and not replaced:
        raise ValueError("transfer_tokens is given, but the plan replaces no layer: leave it out, or choose mixers.")
    if plan.needs_text and not isinstance(calibration_text, Tensor) and opened.tokenizer is None:
        raise ValueError("Calibration needs a tokenizer, and the source has none: give tokenizer= or token ids.")
    lesson = {"tokenizer": opened.tokenizer, "text": transfer_text, "progress": progress}
    if transfer_text is None:
        lesson["text"] = calibration_text

    found, learned = None, {}
    if plan.is_measured:
        keep = plan.kept_of(len(replaced))
        model, _ = build(opened, family, config, wanted or opened.dtype)
        _follow(source, model)
        found = search(model, teacher_of(model, own), replaced, keep, **lesson)
        config = plan.decided(found["auto"]["kept"], len(config.mixers)).apply(fields)
        replaced = replaced_layers(own, config)
        learned = {i: model.model.layers[i].mixer for i in replaced}
    if plan.rotate:
        check_rotatable(config)
    if progress:
        print(plan.describe(config, f"{opened.name} ({family.name})"), file=sys.stderr)

    model, record = build(opened, family, config, wanted or opened.dtype)
    _follow(source, model)
    record |= {"plan": plan.as_dict(), "search": found, "transfer": None, "calibration": None, "measured": {}}
    record |= {"rotated": [], "notes": opened.notes}
    teacher = teacher_of(model, own) if transfer_tokens else None
    for i, mixer in learned.items():  # spike sites keep their own; what the teacher shares is not written on
        model.model.layers[i].mixer.load_state_dict(mixer.state_dict(), strict=False, assign=True)
    if teacher is not None:
        record["transfer"] = transfer(model, teacher, replaced, transfer_tokens, **lesson)
    if plan.rotate:
        record["rotated"] = rotate(model)
    record["result"]["parameters"] = sum(p.numel() for p in model.parameters())  # a rotation may untie the head
    if plan.needs_text:
        record["calibration"] = calibrate(
            model,
            opened.tokenizer,
            calibration_text,
            silent_share=plan.silent_share,
            allocation=plan.allocation,
            progress=progress,
        )
    model.conversion = record
    if place is not None:
        write_folder(place, model, opened, record, overwrite)
    return model


def _follow(source: Any, model: SpikeLMForCausalLM) -> None:
    """Put the model where a loaded source is."""
    if isinstance(source, PreTrainedModel):
        model.to(source.device)  # type: ignore[arg-type]


def build(
    opened: Source, family: Family, config: SpikeLMConfig, dtype: torch.dtype
) -> tuple[SpikeLMForCausalLM, dict[str, Any]]:
    """The model, filled with the source's tensors (which leave `opened`), and the first part of its record."""
    source_dtype = opened.dtype
    tensors, config.tie_word_embeddings = normalised(opened.tensors, config.tie_word_embeddings)
    del opened.tensors  # from here on each tensor is held once
    expected = {name: tensor.shape for name, tensor in blank_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del expected[HEAD]
    new = new_parameters(config)
    count = len(tensors)
    mapped = map_tensors(family, tensors, expected, new, dtype)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)  # gates begin at random: the same ones in every conversion
        model, info = SpikeLMForCausalLM.from_pretrained(
            None, config=config, state_dict=mapped, dtype=dtype, output_loading_info=True
        )
    if set(info["missing_keys"]) - {HEAD} != new or info["unexpected_keys"] or info["mismatched_keys"]:
        raise RuntimeError(f"The converted model was not filled as declared: {info}")
    if opened.generation_config is not None:
        model.generation_config = opened.generation_config
    record = {
        "schema_version": SCHEMA_VERSION,
        "versions": versions(),
        "source": {
            "name": opened.name,
            "kind": opened.kind,
            "family": family.name,
            "architecture": family.architecture,
            "dtype": str(source_dtype).removeprefix("torch."),
            "licence": opened.licence,
        },
        "result": {
            "dtype": str(dtype).removeprefix("torch."),
            "layers": config.mixers,
            "spike_sites": config.spike_sites or [],
        },
        "keys": {"source_tensors": count, "filled": len(mapped), "new": len(new)},
        "new_parameters": sorted(new),
    }
    return model, record


def versions() -> dict[str, str]:
    """Of what a record's numbers may depend on."""
    return {
        "spikelm": spikelm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def blank_model(config: SpikeLMConfig) -> SpikeLMForCausalLM:
    """A model without values and without memory. Raises ValueError for a configuration that makes none."""
    try:
        with torch.device("meta"):
            return SpikeLMForCausalLM(config)
    except Exception as error:
        raise ValueError(f"The source's configuration does not make a model: {reason(error)}") from error


def spelled_dtype(name: str | torch.dtype) -> torch.dtype | None:
    """The dtype meant by an argument; None for "auto"."""
    if name == "auto":
        return None
    dtype = _DTYPES.get(name) if isinstance(name, str) else name
    if dtype not in _DTYPES.values():
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(_DTYPES)}; got {name!r}.")
    return dtype
