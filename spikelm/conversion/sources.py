"""Sources of a conversion: a local folder, a hub id, a `.gguf` file, or a model that transformers has loaded.

Every way of being unusable is one `ValueError` of one line. No code of a source is ever run, and pickled weights are
read by torch's weights-only loader alone.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from spikelm.conversion.checkpoints import read_checkpoint, read_json, reason
from spikelm.conversion.families import HEAD, family_named

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "*USE_POLICY*")
_HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.md", *_LICENCES]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass
class Source:
    """What a conversion starts from.

    Attributes:
        name: as the user gave it. kind: `folder`, `hub`, `gguf` or `model`.
        config: the source's configuration, of a supported family.
        read: gives name -> tensor, not shared with anything that the caller holds.
        tokenizer, generation_config: if it has them.
        licence: its licence's name where it states one. licence_files: to be copied beside the weights.
        notes: what a user should know, one line each.
    """

    name: str
    kind: str
    config: Any
    read: Callable[[], dict[str, Tensor]]
    tokenizer: Any = None
    generation_config: GenerationConfig | None = None
    licence: str | None = None
    licence_files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The weights, read when they are first asked for. Raises ValueError for what is not plain, finite floats."""
        tensors = self.read()
        check_tensors(self.name, tensors)
        return tensors

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights, as the configuration states it; without a statement, that of the first."""
        declared = getattr(self.config, "dtype", None)
        return declared if isinstance(declared, torch.dtype) else next(iter(self.tensors.values())).dtype


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own reports and bars: what they say of a load is checked here, and said as errors."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def open_source(source: "str | Path | PreTrainedModel", *, tokenizer: Any = None, progress: bool = True) -> Source:
    """Open a source: everything but its weights, which `Source.tensors` reads.

    Args:
        source: a folder, a hub id, a `.gguf` file, or a loaded model (whose tensors are copied).
        tokenizer: used in place of the source's own.
        progress: whether to show bars for what takes long.

    Raises:
        ValueError: it is missing, damaged, incomplete, quantised, of an unsupported architecture or spiking already.
    """
    if isinstance(source, PreTrainedModel):
        opened = _from_model(source)
    elif not isinstance(source, (str, Path)):
        raise ValueError(
            f"A source must be a folder, a hub id, a .gguf file or a transformers model; got "
            f"{type(source).__name__}. Of a wrapped model (PEFT, compiled), give the model inside."
        )
    else:
        path = Path(source).expanduser()
        if str(source).lower().endswith(".gguf"):
            opened = _from_gguf(path, str(source))
        elif path.is_dir():
            opened = _from_folder(path, str(source), progress)
        else:
            opened = _from_hub(str(source), path, progress)
    if tokenizer is not None:
        opened.tokenizer = tokenizer
    if opened.tokenizer is None:
        opened.notes.append("The source has no tokenizer: none was written.")
    return opened


def _from_model(model: PreTrainedModel) -> Source:
    family_named(model.config.model_type)
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    opened = Source(name, "model", model.config, partial(_copied, model))
    opened.generation_config = _usable(model.generation_config)
    folder = Path(name)
    if folder.is_dir():
        _read_surroundings(opened, folder)
    return opened


def _copied(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies, so that training the result leaves the source as it is; a tied tensor is copied once."""
    tensors: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"Tensor {name} of the source is on the meta device and has no values; load it first.")
        if tensor.data_ptr() not in copies:
            copies[tensor.data_ptr()] = tensor.detach().clone()
        tensors[name] = copies[tensor.data_ptr()]
    return tensors


def _from_folder(folder: Path, name: str, progress: bool, kind: str = "folder") -> Source:
    if not (folder / "config.json").is_file():
        hint = " It holds an adapter: merge it into its base model first." if _is_adapter(folder) else ""
        raise ValueError(f"{name} has no config.json; expected a model folder as save_pretrained writes it.{hint}")
    raw = read_json(folder / "config.json")
    family = family_named(raw.get("model_type"))
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise ValueError(f"{name} is quantised ({method}); expected float weights. Convert the original checkpoint.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{name}/config.json is not a {family.name} configuration: {reason(error)}") from error
    opened = Source(name, kind, config, partial(read_checkpoint, folder, progress))
    if (folder / "generation_config.json").is_file():
        try:
            opened.generation_config = _usable(GenerationConfig.from_pretrained(folder))
        except Exception as error:
            opened.notes.append(f"The source's generation_config.json could not be read: {reason(error)}")
    _read_surroundings(opened, folder)
    return opened


def _from_hub(name: str, path: Path, progress: bool) -> Source:
    if path.is_file():
        raise ValueError(f"{name} is a file; expected a model folder, a .gguf file or a hub id. Give its folder.")
    if not _HUB_ID.fullmatch(name) or name.count("/") != 1:
        raise ValueError(f"{name} does not exist; expected a model folder, a .gguf file or a hub id (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, "pytorch_model*.bin"]))
    except Exception as error:
        raise ValueError(
            f"{name} is not a local folder, and the model hub did not give it: {reason(error)} Check the name and "
            "the connection, or give a local folder or .gguf file."
        ) from error
    return _from_folder(folder, name, progress, kind="hub")


def _from_gguf(path: Path, name: str) -> Source:
    if not path.is_file():
        raise ValueError(f"{name} does not exist; expected a .gguf file. Check the path.")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{name} is not a GGUF file: it does not begin with 'GGUF'. Get the file again.")
    place, gguf = str(path.parent), path.name
    metadata = _gguf_metadata(path, name)
    try:
        config = AutoConfig.from_pretrained(place, gguf_file=gguf)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be read as a language model ({metadata['architecture']}): {reason(error)}"
        ) from error
    family_named(config.model_type)
    config.dtype = torch.float32
    opened = Source(name, "gguf", config, partial(_read_gguf, path, name, config))
    opened.generation_config = _usable(GenerationConfig.from_model_config(config))
    opened.licence = metadata["license"]
    opened.licence_files = licence_files(path.parent)
    _read_tokenizer(opened, place, gguf_file=gguf)
    return opened


def _read_gguf(path: Path, name: str, config: Any) -> dict[str, Tensor]:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path.parent), config=config, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        raise ValueError(f"{name} is damaged: {reason(error)} Get the file again.") from error
    lacking = [key for key in info["missing_keys"] if not (key == HEAD and config.tie_word_embeddings)]
    if lacking:
        raise ValueError(f"{name} lacks tensors: {', '.join(sorted(lacking)[:6])}. Get the complete file.")
    return {key: tensor.detach() for key, tensor in model.state_dict().items()}


def _gguf_metadata(path: Path, name: str) -> dict[str, Any]:
    """Architecture and licence, after a check that every tensor lies inside the file. Raises ValueError."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        texts = {key: reader.fields.get(f"general.{key}") for key in ("architecture", "license")}
        metadata = {key: text.contents() if text else None for key, text in texts.items()}
        parts = reader.fields.get("split.count")
    except Exception as error:
        raise ValueError(f"{name} is damaged or truncated: {reason(error)} Get the file again.") from error
    if parts is not None and parts.contents() > 1:
        raise ValueError(f"{name} is one of {parts.contents()} parts; expected a single file. Merge the parts first.")
    return metadata


def _read_surroundings(opened: Source, folder: Path) -> None:
    """Tokenizer, licence and licence files that lie in the source's folder."""
    opened.licence_files = licence_files(folder)
    opened.licence = stated_licence(folder)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return
    _read_tokenizer(opened, folder)


def _read_tokenizer(opened: Source, folder: str | Path, **where: str) -> None:
    try:
        opened.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
    except Exception as error:
        opened.notes.append(f"The source's tokenizer could not be loaded: {reason(error)}")


def stated_licence(folder: Path) -> str | None:
    """The licence's name in the front matter of the folder's model card."""
    if not (card := folder / "README.md").is_file():
        return None
    stated = re.search(r"^license:\s*(\S+)\s*$", card.read_text(errors="replace"), re.MULTILINE)
    return stated.group(1) if stated else None


def licence_files(folder: Path) -> list[Path]:
    """Licences and notices in a model folder."""
    found = {path for pattern in _LICENCES for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _usable(generation: GenerationConfig | None) -> GenerationConfig | None:
    """A copy that transformers agrees to save: sampling settings of a greedy configuration act on nothing, and go."""
    if generation is None:
        return None
    generation = GenerationConfig.from_dict(generation.to_dict())
    if not generation.do_sample:
        for name in _SAMPLING:
            setattr(generation, name, None)
    return generation


def check_tensors(source: str, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for weights that are not plain, finite floats."""
    for name, tensor in _real(tensors):
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"Tensor {name} of {source} is {str(tensor.dtype).removeprefix('torch.')}; expected float16, "
                "bfloat16, float32 or float64. Convert the checkpoint from before quantisation."
            )
        wide = torch.float64 if tensor.dtype is torch.float64 else torch.float32
        if not bool(tensor.sum(dtype=wide).isfinite()):  # one value that is not makes the sum so
            raise ValueError(f"Tensor {name} of {source} holds values that are not finite. Get the source again.")


def _real(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name, tensor
