"""A kind of published checkpoint: its configuration and its tensors, and how ours are read from them and written back.

    config.json --fields--> SpikeLMConfig --config--> config.json
    published tensors --Rule.read--> our tensors --Rule.write--> published tensors

Both directions are declared; nothing is discovered. The shapes that a checkpoint must have need no declaration: they
are what `write` makes of the shapes of our model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikelm.configuration import SpikeLMConfig

Fields = dict[str, Any]
Tensors = tuple[Tensor, ...]


def unchanged(*tensors: Tensor) -> Tensors:
    """The tensors as they are."""
    return tensors


@dataclass(frozen=True)
class Rule:
    """Some published tensors and those of ours that hold the same.

    Attributes:
        published, ours: their names.
        read: published tensors -> ours, in the order of the names. Raises ValueError for values that cannot be right.
        write: ours -> published tensors; undoes `read`. Must run on the meta device.
    """

    published: tuple[str, ...]
    ours: tuple[str, ...]
    read: Callable[..., Tensors] = unchanged
    write: Callable[..., Tensors] = unchanged


@dataclass(frozen=True)
class Kind:
    """One published format.

    Attributes:
        name: on the command line. title: what people call it.
        fields: the checkpoint's config.json (empty if it has none) and the shapes of its tensors -> fields of
            `SpikeLMConfig`. Raises ValueError for what has no counterpart.
        config: our configuration -> config.json as published; undoes `fields`.
        rules: our configuration -> the key table: every tensor of ours but those of spike sites, once.
        dtype: that every tensor must have; None: any float.
        moved: what `read` changes in values that `write` cannot bring back; None: nothing.
        choices: fields that decide what the model computes and that a checkpoint does not state: `fields` gives their
            defaults, an import may choose otherwise, an export accepts any value.
        unstated: fields that the format does not state and that change nothing in what its models compute; an export
            accepts any value.
        file: for kinds that are one pickled file without config.json, what an export calls it (a folder holds one file
            of its suffix); None: exports are safetensors with config.json.
    """

    name: str
    title: str
    fields: Callable[[Mapping[str, Any], Mapping[str, torch.Size]], Fields]
    config: Callable[[SpikeLMConfig], dict[str, Any]]
    rules: Callable[[SpikeLMConfig], list[Rule]]
    dtype: torch.dtype | None = None
    moved: str | None = None
    choices: tuple[str, ...] = ()
    unstated: frozenset[str] = frozenset()
    file: str | None = None
