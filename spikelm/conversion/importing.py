"""Published spiking checkpoints in, spikelm folders out, and back; file to file, without a model in between.

Tensors stay mapped to their files and pass through one by one, so that a checkpoint of any size needs the memory of one
output shard. Every tensor is accounted for, and nothing in a checkpoint is ever executed.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from spikelm.configuration import SpikeLMConfig
from spikelm.conversion.checkpoints import (
    read_checkpoint,
    read_json,
    read_weight_file,
    reason,
    write_checkpoint,
    write_pickle,
)
from spikelm.conversion.convert import SCHEMA_VERSION, blank_model, versions
from spikelm.conversion.families import HEAD
from spikelm.conversion.folder import check_out, staged, write_record
from spikelm.conversion.keys import listed
from spikelm.conversion.published import KINDS, kind_named
from spikelm.conversion.published.kind import Kind, Rule, unchanged
from spikelm.conversion.sources import check_tensors, licence_files, stated_licence
from spikelm.loading import read_config
from spikelm.modeling import SpikeLMForCausalLM
from spikelm.spiking.site import SpikeSite
from spikelm.validation import PER_LAYER

# Copied as they are, so that an export gives them back unchanged.
_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
# Fields that say nothing about what a trained model computes.
_INCIDENTAL = {
    "architectures",
    "dtype",
    "transformers_version",
    "auto_map",
    "use_cache",
    "layer_types",
    "gla_gate_bias",
    "gla_longest_memory",
    "delta_longest_memory",
}


def import_checkpoint(
    kind: str,
    checkpoint: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
    **choices: Any,
) -> dict[str, Any]:
    """Write a published checkpoint as a spikelm model folder.

    Args:
        kind: one of `spikelm.conversion.published.KINDS`.
        checkpoint: a folder with weights (safetensors, or pickles of plain tensors; whole or in shards) and, where the
            kind has one, config.json; or one file of weights (safetensors, `.pth`), with what lies beside it.
        out: the folder to write. It appears when everything is written, or not at all.
        overwrite: replace `out` if it is a folder that a conversion wrote.
        progress: whether to show bars.
        choices: what the model computes and a checkpoint of this kind does not state: fields of the configuration that
            the kind names in `choices` (`binary_embedding` of `spikegpt`).

    Returns:
        The record that stands in `conversion.json`.

    Raises:
        ValueError: another kind of checkpoint, a tensor too many, missing, misshapen or not finite, a choice that the
            kind does not leave, an unusable `out`.
    """
    published, place, source = kind_named(kind), Path(out).expanduser(), Path(checkpoint).expanduser()
    check_out(place, overwrite)
    _check_choices(published, choices)
    if not source.exists():
        raise ValueError(f"{checkpoint} does not exist; expected a {published.title} checkpoint. Check the path.")
    folder = source if source.is_dir() else source.parent
    tensors = _tensors(published, source, progress)
    has_config = published.file is None and (folder / "config.json").is_file()
    raw = read_json(folder / "config.json") if has_config else {}
    config = _config(published, raw, tensors, choices)
    model = blank_model(config)
    rules = published.rules(config)
    sites = _site_tensors(model)
    _check_names(source, published, rules, raw, tensors)
    _check_shapes(source, published, rules, _expected(model), tensors)
    dtypes = _dtypes(tensors)
    config.dtype = dtypes[0]
    config.architectures = [type(model).__name__]
    tally: Counter[str] = Counter()
    notes = []
    with staged(place, overwrite) as staging:
        bar = tqdm(rules, desc="Importing", unit="rule", disable=not progress, delay=1.0)
        write_checkpoint(staging, _read(bar, tensors, sites, tally))
        config.save_pretrained(staging)
        for field in published.choices:
            notes.append(
                f"{field} is {getattr(config, field)}: the checkpoint does not state it; chosen at the import."
            )
        if published.moved is not None:
            notes.append(f"{published.moved} ({tally['moved']} of {tally['values']} values changed).")
        if len(dtypes) > 1:
            notes.append(f"Tensors are stored in several dtypes, as published: {', '.join(map(_dtype_name, dtypes))}.")
        if not _copy_companions(folder, staging):
            notes.append("The checkpoint has no tokenizer: none was written. For text, add its tokenizer.json here.")
        record = {
            "schema_version": SCHEMA_VERSION,
            "versions": versions(),
            "source": {
                "name": str(checkpoint),
                "kind": "published",
                "family": published.title,
                "format": published.name,
                "dtype": ", ".join(map(_dtype_name, dtypes)),
                "licence": stated_licence(folder),
                "choices": {field: getattr(config, field) for field in published.choices},
            },
            "plan": None,
            "calibration": None,
            "result": {
                "dtype": _dtype_name(config.dtype),
                "layers": config.mixers,
                "spike_sites": config.spike_sites or [],
                "parameters": sum(p.numel() for p in model.parameters()),
            },
            "keys": {"source_tensors": len(tensors), "filled": tally["filled"], "new": len(sites)},
            "new_parameters": sorted(sites),
            "measured": {},
            "notes": notes,
        }
        write_record(staging, record)
    return record


def export_checkpoint(kind: str, model: str | Path, out: str | Path, *, progress: bool = True) -> None:
    """Write a spikelm model folder in a published format: the published keys, values and dtypes as they are stored.

    Args:
        kind: one of `spikelm.conversion.published.KINDS`.
        model: a spikelm model folder, imported or made in another way.
        out: the folder to write; must not exist. It appears when everything is written, or not at all.
        progress: whether to show bars.

    Raises:
        ValueError: no spikelm folder, a model that the format cannot express, an unusable `out`.
    """
    published, place, source = kind_named(kind), Path(out).expanduser(), Path(model).expanduser()
    check_out(place, overwrite=False)
    if not (source / "config.json").is_file():
        raise ValueError(f"{model} has no config.json; expected a spikelm model folder.")
    config = read_config(source)
    raw, rules, blank = published.config(config), published.rules(config), blank_model(config)
    _check_expressible(source, published, rules, raw, blank)
    tensors = read_checkpoint(source, progress)
    expected, sites = _expected(blank), _site_tensors(blank)
    lacking, foreign = set(expected) - set(tensors) - set(sites), set(tensors) - set(expected)
    if lacking or foreign:
        what, names = ("lacks", lacking) if lacking else ("holds unknown", foreign)
        raise ValueError(f"{model} {what} {len(names)} tensors: {listed(sorted(names))}. Get the whole model again.")
    changed = [name for name, initial in sites.items() if not torch.equal(tensors.get(name, initial), initial)]
    if changed:
        raise ValueError(
            f"{published.title} holds no tensors of spike sites, and {len(changed)} here are not at their published "
            f"values: {listed(sorted(changed))}. Keep the model in spikelm's own format."
        )
    with staged(place, overwrite=False) as staging:
        bar = tqdm(rules, desc="Exporting", unit="rule", disable=not progress, delay=1.0)
        written = _written(source, published, bar, tensors)
        if published.file is not None:
            write_pickle(staging / published.file, written)
        else:
            write_checkpoint(staging, written)
            raw["torch_dtype"] = _dtype_name(_dtypes(tensors)[0])
            (staging / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        _copy_companions(source, staging)


def _check_choices(published: Kind, choices: Mapping[str, Any]) -> None:
    if foreign := sorted(set(choices) - set(published.choices)):
        left = f"only of {', '.join(published.choices)}" if published.choices else "nor of anything else"
        raise ValueError(f"Kind {published.name} leaves no choice of {', '.join(foreign)}, {left}. Leave it out.")


def _tensors(published: Kind, source: Path, progress: bool) -> dict[str, Tensor]:
    if not source.is_dir():
        return read_weight_file(source)
    pickles = sorted(source.glob(f"*{Path(published.file).suffix}")) if published.file is not None else []
    if len(pickles) > 1:
        names = listed([path.name for path in pickles])
        raise ValueError(f"{source} holds {len(pickles)} checkpoints: {names}. Name one of them.")
    return read_weight_file(pickles[0]) if pickles else read_checkpoint(source, progress)


def _config(
    published: Kind, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], choices: Mapping[str, Any]
) -> SpikeLMConfig:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        return SpikeLMConfig(**(published.fields(raw, shapes) | dict(choices)))
    except Exception as error:  # a strict configuration raises errors of its own for values of another type
        raise ValueError(f"The checkpoint is not a {published.title} one: {reason(error)}") from error


def _expected(model: SpikeLMForCausalLM) -> dict[str, Tensor]:
    """Every tensor of a blank model, without a tied head."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state[HEAD]
    return state


def _site_tensors(model: SpikeLMForCausalLM) -> dict[str, Tensor]:
    """The tensors of spike sites, which no published format holds, at the values that the configuration says."""
    tensors = {}
    for path, site in model.named_modules():
        if isinstance(site, SpikeSite):
            for name, tensor in site.named_buffers():
                tensors[f"{path}.{name}"] = torch.full(tensor.shape, site.initial[name], dtype=tensor.dtype)
    return tensors


def _check_names(
    source: Path, published: Kind, rules: list[Rule], raw: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    known = {name for rule in rules for name in rule.published}
    strangers, absent = sorted(set(tensors) - known), sorted(known - set(tensors))
    if not (strangers or absent):
        return
    for kind in KINDS.values():
        if _fits(kind, raw, tensors):
            raise ValueError(
                f"{source} holds the tensors of kind {kind.name}, not of {published.name}. Name that kind."
            )
    faults = []
    if strangers:
        faults.append(
            f"holds {len(strangers)} tensors that a {published.title} checkpoint does not: {listed(strangers)}"
        )
    if absent:
        faults.append(f"lacks {len(absent)} of its {len(known)}: {listed(absent)}")
    raise ValueError(f"{source} {'; and '.join(faults)}. Get the checkpoint as it was published.")


def _fits(kind: Kind, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    try:
        config = _config(kind, raw, tensors, {})
    except ValueError:
        return False
    return {name for rule in kind.rules(config) for name in rule.published} == set(tensors)


def _check_shapes(
    source: Path, published: Kind, rules: list[Rule], expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    for rule in rules:
        shapes = rule.write(*(expected[name] for name in rule.ours))
        for name, blank in zip(rule.published, shapes, strict=True):
            tensor = tensors[name]
            if tensor.shape != blank.shape:
                raise ValueError(
                    f"Tensor {name} of {source} has shape {list(tensor.shape)}; its config.json or its other tensors "
                    f"expect {list(blank.shape)}. They do not belong together: get the checkpoint again."
                )
            _check_dtype(source, published, name, tensor)


def _check_dtype(source: Path, published: Kind, name: str, tensor: Tensor) -> None:
    if published.dtype not in (None, tensor.dtype):
        raise ValueError(
            f"Tensor {name} of {source} is {_dtype_name(tensor.dtype)}; a {published.title} checkpoint is "
            f"{_dtype_name(published.dtype)}, and another dtype would change what it computes."
        )


def _read(
    rules: Iterable[Rule], tensors: Mapping[str, Tensor], sites: Mapping[str, Tensor], tally: Counter[str]
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors one by one; `tally` counts tensors filled, values read by a rule of its own, and those it moved."""
    for rule in rules:
        given = [tensors[name] for name in rule.published]
        check_tensors("the checkpoint", dict(zip(rule.published, given, strict=True)))
        try:
            ours = rule.read(*given)
        except ValueError as error:
            raise ValueError(f"Tensor {rule.published[0]} of the checkpoint: {error}") from error
        if rule.read is not unchanged:
            for before, after in zip(given, rule.write(*ours), strict=True):
                tally["moved"] += int((before != after).sum())
                tally["values"] += before.numel()
        tally["filled"] += len(ours)
        yield from zip(rule.ours, ours, strict=True)
    yield from sites.items()


def _written(
    source: Path, published: Kind, rules: Iterable[Rule], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Published tensors one by one, each rule's read back to see that it holds what ours do."""
    for rule in rules:
        ours = [tensors[name] for name in rule.ours]
        for name, tensor in zip(rule.ours, ours, strict=True):
            _check_dtype(source, published, name, tensor)
        written = rule.write(*ours)
        again = ours if rule.read is unchanged else rule.read(*written)
        if not all(torch.equal(before, after) for before, after in zip(ours, again, strict=True)):
            raise ValueError(
                f"Tensor {rule.ours[0]} of the model has values that {published.title} cannot hold: the published "
                "forward would change them. Keep the model in spikelm's own format."
            )
        yield from zip(rule.published, written, strict=True)


def _check_expressible(
    source: Path, published: Kind, rules: list[Rule], raw: Mapping[str, Any], blank: SpikeLMForCausalLM
) -> None:
    """Raise ValueError unless the published configuration, with the shapes of the tensors, means this model."""
    expected = _expected(blank)
    tensors: dict[str, Tensor] = {}
    for rule in rules:
        if all(name in expected for name in rule.ours):
            tensors |= zip(rule.published, rule.write(*(expected[name] for name in rule.ours)), strict=True)
    chosen = {field: getattr(blank.config, field) for field in published.choices}
    try:
        theirs, ours = _meaning(_config(published, raw, tensors, chosen)), _meaning(blank.config)
    except ValueError as error:
        absent = [name for rule in rules for name in rule.ours if name not in expected]
        # The cause is what a checkpoint would be refused for; here it speaks of the model.
        why = f"it lacks {listed(absent)}." if absent else reason(error.__cause__ or error)
        raise ValueError(f"{source} cannot be written as {published.name}; {why}") from error
    differing = sorted(field for field in set(ours) - published.unstated if ours[field] != theirs.get(field))
    if differing:
        shown = [f"{field} ({_brief(ours[field])}, the format has {_brief(theirs.get(field))})" for field in differing]
        raise ValueError(f"{source} cannot be written as {published.name}; it differs in {listed(shown)}.")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _meaning(config: SpikeLMConfig) -> dict[str, Any]:
    """The fields that decide what a model computes; one that differs between layers as a list."""
    layers = range(config.num_hidden_layers)
    fields = {k: v for k, v in config.to_dict().items() if k not in _INCIDENTAL}
    for field in PER_LAYER:
        values = [config.at(field, i) for i in layers]
        fields[field] = values[0] if all(value == values[0] for value in values) else values
    windows = {config.at("attention_window", i) for i in layers if "swa" in config.mixers[i]}
    fields["attention_window"] = sorted(windows)
    fields["spike_sites"] = [sorted(config.sites_at(i)) for i in layers] if config.is_spiking else None
    return fields


def _copy_companions(source: Path, target: Path) -> bool:
    """Copy tokenizer, chat template, generation settings and licences; returns whether there was a tokenizer."""
    files = [source / name for name in _COMPANIONS if (source / name).is_file()] + licence_files(source)
    for file in files:
        shutil.copyfile(file, target / file.name)
    return any(file.name.startswith(("tokenizer", "vocab")) for file in files)


def _dtypes(tensors: Mapping[str, Tensor]) -> list[torch.dtype]:
    """The dtypes of a checkpoint, the most frequent first."""
    return [dtype for dtype, _ in Counter(tensor.dtype for tensor in tensors.values()).most_common()]


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
