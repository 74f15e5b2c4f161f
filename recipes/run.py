"""One run of a recipe, from its settings to a model folder; started again, it goes on where it was.

out/settings.json     what the run was started with
out/checkpoints/      see `checkpoints.py`
out/model/            the trained model: weights, tokenizer, generation config
out/adapter/          with `lora`: what makes the trained model of its base, see `spikelm.adapters`
out/report.json       written last: losses, speed, versions; a run that has it is finished
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import accelerate
import click
import torch
import transformers
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import IterableDataset, Subset
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import set_seed

import spikelm
from spikelm import SpikeLMConfig, SpikeLMForCausalLM
from spikelm.conversion.checkpoints import reason
from spikelm.loading import load_model
from spikelm.recipes.checkpoints import UNWRITABLE, sync_all, write_whole
from spikelm.recipes.data import Data, DataSettings, load_data
from spikelm.recipes.lora import Lora
from spikelm.recipes.settings import Settings
from spikelm.recipes.spikes import spike_callbacks
from spikelm.recipes.trainer import Bounded, RecipeTrainer

MISTAKES = (ValueError, OSError, FloatingPointError, StrictDataclassError)
# A run may go on with other values of these: they change neither data nor, beyond rounding and what dropout draws, the
# gradient of a step.
_HARMLESS = ("report_to", "run_name", "disable_tqdm", "log_level", "dataloader_num_workers", "dataloader_pin_memory")
HARMLESS = ("out", "micro_batch", *(f"training.{name}" for name in _HARMLESS))


def run(
    settings: Settings,
    trainer_class: Callable[..., RecipeTrainer] = RecipeTrainer,
    prepare: Callable[[PreTrainedModel, Any, Settings], Any] | None = None,
    data: Callable[[Settings, Any], Data] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train as the settings say; returns the report.

    Args:
        settings: of the recipe.
        trainer_class: called with `settings` and Trainer's arguments by name.
        prepare: changes the loaded model before training: (model, tokenizer, settings) -> model. It is called at every
            start, and what a checkpoint holds is loaded after it.
        data: (settings, tokenizer) -> `Data`; None: what `settings.data` says, as plain text.
        callbacks: further ones; an `ExportableState` has its state kept in checkpoints.

    Raises:
        ValueError: settings, model or data that do not fit, or that differ from those of the run in `out`.
        OSError: a checkpoint or the result could not be written.
        FloatingPointError: the loss or its gradient is not finite.
    """
    out = Path(settings.out)
    _check_unchanged(out / "settings.json", asdict(settings))
    if (out / "report.json").is_file():
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        _say(f"{out} is finished: {report['steps']} steps, {report['tokens']} tokens. For another run, change `out`.")
        return report
    arguments = training_arguments(settings)
    callbacks = [*callbacks, *spike_callbacks(settings.spikes)]
    lora = None if settings.lora is None else Lora.of(settings.lora)
    main = PartialState().is_main_process
    set_seed(settings.seed)
    model, tokenizer = load(settings)
    if prepare is not None:
        model = prepare(model, tokenizer, settings)
    if lora is not None:
        model = lora.added_to(model)
    use_cache = model.config.use_cache
    texts = (data or _texts)(settings, tokenizer)
    items = settings.steps * settings.batch
    if isinstance(texts.train, IterableDataset):
        facts, train = texts.describe(), Bounded(texts.train, items, settings.window)
    else:
        train = texts.train.sized(items)
        facts = replace(texts, train=train).describe()
    _check_unchanged(out / "data.json", facts)
    trainer = trainer_class(
        settings=settings,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=_spread(texts.heldout, settings),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    model.config.use_cache = use_cache  # Trainer has switched it off, also for whoever loads what it saves
    if main:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "settings.json", json.dumps(asdict(settings), indent=1) + "\n")
        write_whole(out / "data.json", json.dumps(facts, indent=1) + "\n")
    trainer.resume()
    _export(trainer, out / "model")
    report = _report(trainer, facts)
    if main:
        write_whole(out / "report.json", json.dumps(report, indent=1) + "\n")
        _say(f"Wrote {out / 'model'} and {out / 'report.json'}.")
    trainer.accelerator.wait_for_everyone()
    return report


def load(settings: Settings) -> tuple[PreTrainedModel, Any]:
    """The model to train, in float32, and its tokenizer."""
    if settings.model is not None:
        return load_model(settings.model, dtype=torch.float32, changes=settings.config, progress=False)
    tokenizer = _tokenizer(str(settings.tokenizer))
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = SpikeLMConfig(**{"vocab_size": len(tokenizer), **special, **settings.config})
    return SpikeLMForCausalLM(config), tokenizer


def _tokenizer(name: str) -> Any:
    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    if not Path(name).is_dir() and name.count("/") != 1:
        raise ValueError(f"tokenizer {name} does not exist; expected a folder, a hub id (owner/name), or `bytes`.")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"tokenizer {name} cannot be read: {reason(error)}") from error


def _spread(heldout: Any, settings: Settings) -> Any:
    """The held-out windows that a checkpoint is measured on."""
    if heldout is None or settings.heldout_tokens is None:
        return heldout
    count = max(1, settings.heldout_tokens // settings.window)
    if count >= len(heldout):
        return heldout
    return Subset(heldout, torch.linspace(0, len(heldout) - 1, count).round().long().tolist())


def _texts(settings: Settings, tokenizer: Any) -> Data:
    return load_data(DataSettings.of(settings.data), tokenizer, settings.seed)


def training_arguments(settings: Settings) -> TrainingArguments:
    """Trainer's arguments that the settings amount to. Raises ValueError for what does not fit."""
    save = max(1, settings.checkpoints // settings.step_tokens)
    processes = int(os.environ.get("WORLD_SIZE", 1))  # asked for before the processes have met
    given = {
        "logging_steps": max(1, settings.steps // 100),
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    arguments = TrainingArguments(
        **(given | settings.training),
        output_dir=settings.out,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.accumulation(processes),
        save_strategy="steps",
        save_steps=save,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        seed=settings.seed,
    )
    if arguments.world_size != processes or arguments.n_gpu > 1:
        raise ValueError("several devices need one process each: start the recipe with `accelerate launch`.")
    return arguments


def _check_unchanged(file: Path, new: dict[str, Any]) -> None:
    """Raise ValueError if a run was started with something else than what goes into `file`."""
    if not file.is_file():
        return
    old, new = _flat(json.loads(file.read_text(encoding="utf-8"))), _flat(json.loads(json.dumps(new)))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed := [name for name in changed if name not in HARMLESS]:
        told = "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in changed)
        raise ValueError(
            f"{file.parent} holds a run with other {file.stem}: {told}. Change back, or choose another `out`."
        )


def _flat(nested: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) and value else {path + name: value}
    return flat


def _export(trainer: RecipeTrainer, folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        trainer.export(str(partial))
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            sync_all(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
    except UNWRITABLE as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} could not be written: {error} {trainer.kept()}") from error


def _report(trainer: RecipeTrainer, facts: dict[str, Any]) -> dict[str, Any]:
    state, settings = trainer.state, trainer.settings
    losses = [{"step": row["step"], "loss": row["loss"]} for row in state.log_history if "loss" in row]
    heldout = [{"step": row["step"], "loss": row["eval_loss"]} for row in state.log_history if "eval_loss" in row]
    tokens = settings.step_tokens * state.global_step
    return {
        "settings": asdict(settings),
        "data": facts,
        "steps": state.global_step,
        "tokens": tokens,
        "processes": trainer.args.world_size,
        "losses": losses,
        "heldout_losses": heldout,
        "best": {"step": state.best_global_step, "loss": state.best_metric} if heldout else None,
        "train_seconds": trainer.progress.seconds,
        "tokens_per_second": tokens / trainer.progress.seconds,
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {m.__name__: m.__version__ for m in (spikelm, torch, transformers, accelerate)},
    }


class Command(click.Command):
    """On its own, mistakes are one line and exit code 2; as a part of `spikelm train`, that command says them."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and exit."""
        try:
            return super().main(*args, **kwargs)
        except MISTAKES as error:
            _say("spikelm: error: " + " ".join(str(error).split()))
            raise SystemExit(2) from None


def command(train: Callable[[Path], Any]) -> Command:
    """The command line of a recipe: one YAML file."""
    config = click.Argument(["config"], type=click.Path(path_type=Path))
    return Command(train.__name__, callback=train, params=[config], help=train.__doc__)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
