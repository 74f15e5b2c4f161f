"""The folder that a conversion leaves: weights, tokenizer, licence, model card, record; complete, or not there."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.conversion.card import model_card
from spikelm.conversion.checkpoints import read_json

if TYPE_CHECKING:
    from spikelm.conversion.sources import Source
    from spikelm.modeling import SpikeLMForCausalLM

RECORD, CARD = "conversion.json", "README.md"


def check_out(out: Path, overwrite: bool) -> None:
    """Raise ValueError if `out` cannot become a model folder."""
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; choose another place, or allow overwriting.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a place for a folder. Choose another place.")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise ValueError(f"{out} was not written by a conversion and is never overwritten; choose another place.")
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{out} cannot be written: {parent} is not a writable folder. Choose another place.")


def write_folder(
    out: Path, model: "SpikeLMForCausalLM", source: "Source", record: dict[str, Any], overwrite: bool
) -> None:
    """Write a converted model with all that belongs to it."""
    with staged(out, overwrite) as staging:
        model.save_pretrained(staging)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(staging)
        for licence in source.licence_files:
            shutil.copyfile(licence, staging / licence.name)
        write_record(staging, record)


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` to write in, moved there at the end; whatever goes wrong, no part of it stays."""
    out = out.absolute()
    created = [parent for parent in out.parents if not parent.exists()]
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}")
    try:
        staging.mkdir(parents=True)
        yield staging
        check_out(out, overwrite)  # the work took a while
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in [] if out.exists() else created:
            if parent.exists():
                parent.rmdir()


def add_measurements(folder: str | Path, measured: dict[str, float | int | str]) -> None:
    """Add measured numbers, by name, to the record and the model card of a converted model's folder.

    Raises:
        ValueError: the folder holds no record of a conversion.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder} has no {RECORD}; expected the folder that a conversion wrote.")
    record = read_json(folder / RECORD)
    record["measured"] |= measured
    write_record(folder, record)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record and the model card that follows from it, each as a whole."""
    for name, text in ((RECORD, json.dumps(record, indent=2) + "\n"), (CARD, model_card(record))):
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def _publish(staging: Path, out: Path) -> None:
    """Move `staging` to `out`; a folder that was there goes only when the new one stands."""
    old = staging.with_name(staging.name + ".old")
    if out.exists():
        out.replace(old)
    try:
        staging.replace(out)
    finally:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.replace(out)
