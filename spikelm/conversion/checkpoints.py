"""Weight files of a model folder: safetensors, or pickles through torch's weights-only loader; whole or in shards."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

_PLACES = (
    ("model.safetensors", False),
    ("model.safetensors.index.json", True),
    ("pytorch_model.bin", False),
    ("pytorch_model.bin.index.json", True),
)


SHARD_BYTES = 2 << 30


def write_checkpoint(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index, taking them one by one as they come.

    No more than `SHARD_BYTES`, or one larger tensor, are held at a time. Raises OSError if a file cannot be written.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    held: set[int] = set()
    size = total = 0

    def flush() -> None:
        partial = folder / f"{len(shards)}.partial"
        with _writing(partial):
            save_file(shard, partial, metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()
        held.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        tensor = tensor.contiguous()
        shard[name] = tensor.clone() if tensor.data_ptr() in held else tensor  # safetensors knows no shared memory
        held.add(tensor.data_ptr())
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    places: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"{i}.partial").replace(folder / file)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_pickle(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors as `.pth`: a pickled plain dictionary, no tensor with more memory behind it than its own.

    Tensors that are mapped to files stay so: memory fills as they are written. Raises OSError if the file cannot be.
    """
    with _writing(path):
        torch.save({name: _alone(tensor) for name, tensor in tensors}, path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full disk is an OSError, whatever the library that writes makes of it."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} could not be written ({reason(error)}) Is the disk full?") from error


def _alone(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def read_checkpoint(folder: Path, progress: bool) -> dict[str, Tensor]:
    """All tensors of the model folder `folder`, on the CPU and mapped to their files: memory fills as they are used.

    Raises:
        ValueError: no weights, a missing or damaged shard, or an index that names a tensor that no shard holds.
    """
    for name, is_index in _PLACES:
        if (folder / name).is_file():
            return _read_shards(folder, name, progress) if is_index else read_weight_file(folder / name)
    raise ValueError(
        f"{folder} has no weights; expected model.safetensors, its shards with an index, or pytorch_model.bin. "
        "Get the complete model."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {reason(error)} Get the file again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object. Get the file again.")
    return content


def reason(error: BaseException) -> str:
    """The first line of an error, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _read_shards(folder: Path, index: str, progress: bool) -> dict[str, Tensor]:
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{folder / index} has no weight_map; expected tensor -> file. Get the file again.")
    names = sorted({Path(str(shard)).name for shard in places.values()})
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder} lacks {len(absent)} of {len(names)} weight files: {', '.join(absent[:4])}. Get them, or the "
            "whole model, again."
        )
    tensors: dict[str, Tensor] = {}
    for name in tqdm(names, desc="Reading weights", unit="file", disable=not progress, delay=1.0):
        tensors |= read_weight_file(folder / name)
    lost = sorted(set(places) - set(tensors))
    if lost:
        raise ValueError(f"{index} names {', '.join(lost[:6])}, which no weight file holds. Get the model again.")
    return tensors


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, mapped to it. Raises ValueError for what is no dictionary of plain tensors."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            # Files from before torch 1.6 are no zip files and cannot be mapped.
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({reason(error)}) Get the file again.") from error
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as weights ({reason(error)}) Only plain tensors are accepted from pickles; get "
            "the model as safetensors."
        ) from error
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors. Get the model as safetensors.")
    return tensors
