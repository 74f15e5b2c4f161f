"""What a recipe's YAML file says: strict, so that a misspelt field is an error and not a default.

Every recipe reads the fields of `Settings` and adds its own in a subclass. Budgets are in tokens; a step of the
optimiser takes `batch` windows over all processes, however they are split:

    steps         = tokens / (batch * window)
    accumulation  = batch / (micro_batch * processes)
"""

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import TrainingArguments

from spikelm import SpikeLMConfig

T = TypeVar("T")
S = TypeVar("S", bound="Settings")

# Fields of TrainingArguments that follow from ours, or would change what a step or a checkpoint is.
_OURS = {
    "output_dir": "out",
    "max_steps": "tokens",
    "num_train_epochs": "tokens",
    "per_device_train_batch_size": "micro_batch",
    "per_device_eval_batch_size": "micro_batch",
    "gradient_accumulation_steps": "batch and micro_batch",
    "auto_find_batch_size": "micro_batch",
    "seed": "seed",
    "data_seed": "seed",
    "save_steps": "checkpoints",
    "eval_steps": "checkpoints",
}
_FIXED = (
    *("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    *("save_strategy", "save_only_model", "save_total_limit", "save_on_each_node", "enable_jit_checkpoint"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "eval_strategy", "eval_delay"),
    *("eval_on_start", "eval_do_concat_batches", "eval_accumulation_steps", "eval_use_gather_object"),
    *("batch_eval_metrics", "include_for_metrics", "prediction_loss_only", "logging_strategy"),
    *("logging_nan_inf_filter", "ignore_data_skip", "remove_unused_columns", "label_names", "label_smoothing_factor"),
    *("train_sampling_strategy", "length_column_name", "dataloader_drop_last", "average_tokens_across_devices"),
    *("accelerator_config", "use_liger_kernel", "push_to_hub", "hub_strategy", "local_rank"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fields that all recipes share.

    Attributes:
        out: folder of the run: checkpoints on the way, the trained model and a report at the end.
        data: fields of `DataSettings`, `window` (tokens of a window) among them.
        tokens: budget of the whole run, in tokens of input. batch: windows of a step, over all processes.
        micro_batch: windows of a forward pass on one process. checkpoints: tokens between two checkpoints.
        heldout_tokens: how many held-out tokens a checkpoint is measured on, in windows spread over all of them. None:
            all of them.
        model: a model folder, a hub id or a `.gguf` file to go on from. tokenizer: to train from nothing instead: a
            folder, a hub id, or `bytes` (a token is a byte).
        config: fields of `SpikeLMConfig`; beside `model`, those that replace its own.
        spikes: how spikes come into the model, see `spikes.py`.
        lora: fields of `Lora`: adapters are trained in place of the weights, and written to `out/adapter` as well.
        seed: of initial values, data order, dropout and noise.
        training: further fields of transformers' `TrainingArguments`.
    """

    out: str
    data: dict[str, Any]
    tokens: int
    batch: int
    micro_batch: int
    checkpoints: int
    heldout_tokens: int | None = None
    model: str | None = None
    tokenizer: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    spikes: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "micro_batch", "checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.heldout_tokens is not None and self.heldout_tokens < 1:
            raise ValueError(f"heldout_tokens must be at least 1; got {self.heldout_tokens}.")
        if (self.model is None) == (self.tokenizer is None):
            raise ValueError(
                "give either `model`, to go on from it, or `tokenizer` and `config`, to train from nothing."
            )
        fields = {f.name for f in dataclasses.fields(SpikeLMConfig)}
        for name in self.config:
            if name not in fields:
                raise ValueError(f"config.{name} is no field of SpikeLMConfig.")
        if type(self.data.get("window")) is not int or self.window < 2:
            raise ValueError(f"data.window must be an int of at least 2; got {self.data.get('window')!r}.")
        known = typing.get_type_hints(TrainingArguments)
        for name, value in self.training.items():
            if name in _OURS:
                raise ValueError(f"training.{name} follows from `{_OURS[name]}`; leave it out.")
            if name in _FIXED:
                raise ValueError(f"training.{name} is set by the recipe; leave it out.")
            if name not in known:
                raise ValueError(f"training.{name} is no field of transformers' TrainingArguments.")
            _check(f"training.{name}", value, known[name])

    @classmethod
    def read(cls: type[S], path: str | Path) -> S:
        """The settings of a YAML file. Raises ValueError, with the file and the field, for what does not fit."""
        content = read_yaml(path)
        try:
            return strict(cls, content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return self.data["window"]

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.window

    @property
    def steps(self) -> int:
        """Steps of the optimiser that the budget pays for. Raises ValueError if it pays for none."""
        steps = self.tokens // self.step_tokens
        if not steps:
            raise ValueError(
                f"tokens ({self.tokens}) is less than one step: batch ({self.batch}) times window ({self.window})."
            )
        return steps

    def accumulation(self, processes: int) -> int:
        """Forward passes of a step on each of so many processes. Raises ValueError if they do not come out even."""
        passes, rest = divmod(self.batch, self.micro_batch * processes)
        if rest or not passes:
            raise ValueError(
                f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch}) times processes "
                f"({processes})."
            )
        return passes


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file. Raises ValueError if there is none."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; expected a YAML file of settings.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def strict(cls: type[T], mapping: Any, prefix: str = "") -> T:
    """An instance of a dataclass from a mapping of its fields.

    Raises:
        ValueError: no mapping, an unknown or missing field, a value of another type; names are given with `prefix`.
    """
    if not isinstance(mapping, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the file'} must hold named fields; got {type(mapping).__name__}.")
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := [name for name in mapping if name not in known]:
        raise ValueError(f"unknown field {prefix}{unknown[0]}; the fields are {', '.join(known)}.")
    for name, f in known.items():
        if name not in mapping and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"field {prefix}{name} is missing.")
    hints = typing.get_type_hints(cls)
    for name, value in mapping.items():
        _check(f"{prefix}{name}", value, hints[name])
    return cls(**mapping)


def _check(name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        wanted = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint
        raise ValueError(f"{name} must be {wanted}; got {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of a type as simple as settings have; an int is a float, a bool is no int."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if origin is dict:
        of = typing.get_args(hint)[1]
        return isinstance(value, dict) and all(isinstance(k, str) and _fits(v, of) for k, v in value.items())
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, to which 1e-4 is a number, as in YAML 1.2, and not text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
