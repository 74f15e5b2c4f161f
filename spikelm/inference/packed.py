"""Packed model folders: the stored weights of a prepared model as they are, marked in `config.json`.

`save_pretrained` of a prepared model writes one, `from_pretrained` reads it: `config.packed_weights` names the format,
`model.safetensors` holds every product under its first reader (`...q_proj.product.data`, `.scales`, `.bias`) and the
table of words under the embedding. Nothing dense is made on the way.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from spikelm.conversion.checkpoints import read_checkpoint, read_json, write_checkpoint
from spikelm.inference.linears import StoredWeights
from spikelm.inference.prepare import Prepared, finish, install_group, install_tables, linear_groups
from spikelm.kernels.weight_rows import FLOATS, GROUP, LARGEST_CODE, Rows, Table
from spikelm.rotary import make_rotaries


def is_packed(folder: Any) -> bool:
    """Whether `folder` is a local model folder with packed weights."""
    config = Path(str(folder)) / "config.json"
    return config.is_file() and read_json(config).get("packed_weights") is not None


def save_packed(model: Any, folder: str | Path) -> None:
    """Write a prepared model to `folder`: configuration, generation configuration and packed weights.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = model.get_input_embeddings().dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    write_checkpoint(folder, model.state_dict().items())


@torch.no_grad()
def load_packed(
    model_class: Any, config: Any, folder: str | Path, events: str = "auto", dtype: torch.dtype | None = None
) -> Any:
    """The prepared model in `folder`.

    Args:
        model_class: such as `SpikeLMForCausalLM`. config: the folder's configuration.
        events: as in `prepare_for_inference`.
        dtype: of activations and norms; None: as saved.

    Raises:
        ValueError: missing or unknown tensors, or sizes that do not fit the configuration.
    """
    tensors = read_checkpoint(Path(folder), progress=False)
    with torch.device("meta"):
        model = model_class(config)
    model.base_model.rotary = nn.ModuleDict(make_rotaries(config))  # computed, not stored
    saved = _Saved(tensors, config.packed_weights, config.weight_group_size or GROUP, str(folder))
    paths = {id(module): path for path, module in model.named_modules()}
    for group in list(linear_groups(model)):
        first, *_ = linears = group.linears
        outputs = sum(linear.out_features for linear in linears)
        rows = saved.weights(f"{paths[id(first)]}.product", Rows, first.in_features, outputs)
        install_group(group, rows, tensors.get(f"{paths[id(first)]}.product.bias"), events)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    words, hidden = embedding.num_embeddings, embedding.embedding_dim
    table = own = StoredWeights(saved.weights(f"{paths[id(embedding)]}.table", Table, hidden, words), None)
    if head is not None and not config.tie_word_embeddings:
        own = StoredWeights(saved.weights(f"{paths[id(head)]}.table", Table, hidden, words), None)
    embedding.weight = nn.Parameter(torch.empty(0, dtype=config.dtype or torch.float32))
    install_tables(model, table, own)
    saved.check(model.load_state_dict(tensors, strict=False, assign=True))
    if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return finish(model if dtype is None else model.to(dtype), Prepared(config.packed_weights, events))


class _Saved:
    """The tensors of a packed folder, and what is said about those that do not fit."""

    def __init__(self, tensors: dict[str, Tensor], format: str, group: int, folder: str):
        self.tensors, self.format, self.group, self.folder = tensors, format, group, folder

    def weights(self, path: str, layout: type[Rows] | type[Table], inputs: int, outputs: int) -> Rows | Table:
        """The `Rows` or `Table` stored under `path`."""
        data, scales = self.tensors.get(f"{path}.data"), self.tensors.get(f"{path}.scales")
        if data is None or (scales is None) == (self.format in LARGEST_CODE):
            raise ValueError(f"{self.folder} lacks {path}, or it is not {self.format}. Get or pack the model again.")
        format = "fp64" if data.dtype == FLOATS["fp64"] else self.format
        expected = inputs if layout is Rows else outputs
        if data.shape[0] != expected:
            raise ValueError(f"{self.folder}: {path} has {data.shape[0]} rows; its configuration asks for {expected}.")
        return layout(format, data, scales, self.group, inputs, outputs)

    def check(self, result: Any) -> None:
        """Raise for missing or unknown tensors."""
        wrong = sorted(result.missing_keys) or sorted(result.unexpected_keys)
        if wrong:
            what = "lacks" if result.missing_keys else "holds unknown"
            raise ValueError(f"{self.folder} {what} tensors: {', '.join(wrong[:4])}. Get or pack the model again.")
