"""What a teacher says of every window, kept on disk: its k most probable tokens at every place.

    folder/TEACHER-topK/teacher.json
    folder/TEACHER-topK/00000.safetensors      windows, each with
        window     [n, 16]      uint8     digest of its tokens and positions
        ids        [n, T, k]    int32
        log_probs  [n, T, k]    float16
        rest       [n, T]       float32   log of the probability of all other tokens

So a token costs 6 k + 4 bytes on disk. TEACHER is a digest of the teacher's files, and a window is found by its own
digest: order, sources and epochs may change, a wrong answer cannot be found. Files appear whole; whoever is
interrupted goes on with the windows that are missing. The teacher answers in the precision of the run that asks first.
Reading maps files into memory.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from spikelm import SpikeLMForCausalLM
from spikelm.recipes.teacher import top_log_probs

_WINDOWS = 64  # of a file
_TOKENS = 2048  # of a forward pass
_WEIGHTS = ("config.json", "*.safetensors", "pytorch_model*.bin")


class TeacherCache:
    """The answers of one teacher.

    Args:
        folder: of all caches; made if it is not there. teacher: folder, `.gguf` file or hub id. k: tokens kept.
    """

    def __init__(self, folder: str | Path, teacher: str, k: int):
        self.k, self.teacher = k, teacher
        self.folder = Path(folder).expanduser() / f"{fingerprint(teacher)}-top{k}"
        self._places: dict[bytes, tuple[Any, int]] = {}
        self._files = 0
        self._open()

    @property
    def bytes_per_token(self) -> int:
        """On disk."""
        return 6 * self.k + 4

    def __len__(self) -> int:
        """Windows that are there."""
        return len(self._places)

    def fill(
        self, load: Callable[[], SpikeLMForCausalLM], items: Iterable[dict[str, Tensor]], progress: bool = True
    ) -> None:
        """Ask the teacher for windows that have no answer yet; each file is on disk before the next one is begun.

        Args:
            load: gives the teacher; called if there is something to ask.
            items: with `input_ids` and `position_ids`, each `[T]`, all of one length. progress: whether to show a bar.

        Raises:
            OSError: a file could not be written.
        """
        missing, model = self._missing(items), None
        with tqdm(desc="Asking the teacher", unit="window", disable=not progress, delay=1.0) as bar:
            while part := list(islice(missing, _WINDOWS)):
                model = model or load()
                self._write(model, part)
                bar.update(len(part))
        self._open()

    def _missing(self, items: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Items without an answer, each once."""
        seen = set(self._places)
        for item in items:
            key = digests(item["input_ids"][None], item["position_ids"][None])[0]
            if key not in seen:
                seen.add(key)
                yield item

    def answers(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids `[B, T, k]` int64 and log-probabilities float32 of windows `[B, T]`, on their device.

        Probabilities and their rest are scaled to add up to 1, which rounding to float16 took from them.

        Raises:
            ValueError: a window that the teacher was never asked for.
        """
        rows = []
        for key in digests(input_ids, position_ids):
            if key not in self._places:
                raise ValueError(f"{self.folder} has no answer for a window: the data are not those it was made from.")
            file, row = self._places[key]
            rows.append([file.get_slice(name)[row] for name in ("ids", "log_probs", "rest")])
        ids, log_probs, rest = (torch.stack(column).to(input_ids.device) for column in zip(*rows, strict=True))
        log_probs = log_probs.float()
        total = torch.cat([log_probs, rest[..., None]], -1).logsumexp(-1, keepdim=True)
        return ids.long(), log_probs - total

    def _write(self, model: SpikeLMForCausalLM, items: list[dict[str, Tensor]]) -> None:
        ids, positions = (torch.stack([item[name] for item in items]) for name in ("input_ids", "position_ids"))
        parts = []
        for some, places in zip(*(t.split(max(1, _TOKENS // ids.shape[1])) for t in (ids, positions))):
            parts.append(answers_of(model, some.to(model.device), places.to(model.device), self.k))
        found, log_probs, rest = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"teacher": self.teacher, "top": self.k, "bytes_per_token": self.bytes_per_token}
        (self.folder / "teacher.json").write_text(json.dumps(facts, indent=1) + "\n")
        keys = np.frombuffer(b"".join(digests(ids, positions)), np.uint8).reshape(len(items), -1)
        tensors = {
            "window": torch.from_numpy(keys.copy()),
            "ids": found.int(),
            "log_probs": log_probs.half(),
            "rest": rest.float(),
        }
        place = self.folder / f"{self._files:05}.safetensors"
        partial = place.with_suffix(".partial")
        save_file(tensors, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(place)
        self._files += 1

    def _open(self) -> None:
        """Map every file; a file is whole or was never renamed."""
        self._places.clear()
        paths = sorted(self.folder.glob("*.safetensors"))
        for path in paths:
            file = safe_open(path, "pt")
            for row, key in enumerate(file.get_tensor("window").numpy()):
                self._places[key.tobytes()] = file, row
        self._files = len(paths)


@torch.no_grad()
def answers_of(
    model: SpikeLMForCausalLM, input_ids: Tensor, position_ids: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`top_log_probs` of windows `[B, T]`: ids and log-probabilities `[B, T, k]`, rest `[B, T]`."""
    hidden = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    found = top_log_probs(hidden.flatten(0, 1), model.lm_head, k, model.config.logit_softcap)
    return tuple(t.view(*input_ids.shape, *t.shape[1:]) for t in found)  # type: ignore[return-value]


def digests(input_ids: Tensor, position_ids: Tensor) -> list[bytes]:
    """16 bytes for every row of `[B, T]`."""
    rows = torch.stack([input_ids, position_ids], 1).to("cpu", torch.int64).contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def fingerprint(source: str) -> str:
    """16 letters for a model: of its weight files' contents, or of the name of a hub's model."""
    path, digest = Path(source).expanduser(), hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for pattern in _WEIGHTS for file in path.glob(pattern))
    if not files:
        digest.update(source.encode())
    for name in files:
        digest.update(name.name.encode())
        with open(name, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]
