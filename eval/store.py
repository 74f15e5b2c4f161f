"""What an evaluation has finished so far: one file for each part, so that an interrupted run goes on where it stopped.

A file says for which models, texts, settings and version it was made; another evaluation into the same folder measures
anew. A part that failed is kept with its error, and tried again by the next run.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spikelm
from spikelm.eval.files import write_whole
from spikelm.eval.parts import Part, Subject


class Store:
    """Results of parts in a folder; without a folder, in memory.

    Args:
        folder: where `NAME.json` of each part lies; None: nothing is kept.
        subject: what is evaluated.
    """

    def __init__(self, folder: Path | None, subject: Subject):
        self.folder = folder
        self._subject = _described(subject) if folder is not None else {}

    def read(self, part: Part, settings: Any, needed: dict[str, Any]) -> dict[str, Any] | None:
        """What was kept of a part that had come to an end; None if there is nothing.

        Args:
            part, settings: what is asked for. needed: the results that it is made from.
        """
        if self.folder is None:
            return None
        try:
            kept = json.loads((self.folder / f"{part.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(kept, dict) or kept.get("for") != self._key(part, settings, needed):
            return None
        return kept if kept["record"]["status"] == "finished" else None

    def write(
        self,
        part: Part,
        settings: Any,
        needed: dict[str, Any],
        record: dict[str, Any],
        result: dict[str, Any] | None,
    ) -> None:
        """Keep how a part ended, and its result; see `read`."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {"for": self._key(part, settings, needed), "record": record, "result": result}
        text = json.dumps(kept, ensure_ascii=False, allow_nan=False)
        write_whole(self.folder / f"{part.name}.json", text.encode())

    def _key(self, part: Part, settings: Any, needed: dict[str, Any]) -> str:
        asked = {
            "part": part.name,
            "settings": dataclasses.asdict(settings),
            "needed": needed,
            "files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in part.reads(settings) if file.is_file()],
            **self._subject,
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of everything that `state_dict` holds."""
    total = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _described(subject: Subject) -> dict[str, Any]:
    networks: list[Any] = [network for network, _ in subject.networks().values()]
    texts = [subject.calibration, *subject.texts]
    return {
        "version": spikelm.__version__,
        "networks": [
            [
                network.config.to_dict(),
                weights_hash(network),
                str(next(network.parameters()).device),
                str(getattr(network, "prepared", None)),
            ]
            for network in networks
        ],
        "texts": [[text.name, text.source, hashlib.sha256(text.content.encode()).hexdigest()] for text in texts],
        "tokenizer": hashlib.sha256(repr(sorted(subject.tokenizer.get_vocab().items())).encode()).hexdigest(),
        "execute": subject.execute,
    }
