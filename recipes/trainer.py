"""transformers' Trainer with the loss, the checkpoints and the figures of the recipes.

A recipe says what it minimises by named terms, each summed over the tokens that count (shifted labels != -100):

    loss = sum over terms of (sum over tokens) / N,    N = tokens that count in the whole step

N is counted over all micro-batches and processes, so the gradient of a step does not depend on how it is split. As
DDP, FSDP and DeepSpeed average gradients over P processes, each of them multiplies its loss by P.

What is logged covers the steps since the last log. A checkpoint is always a point of the log as well, so nothing is
half summed up when it is written, and a run that goes on from it logs what an undisturbed one logs.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from spikelm import SpikeLMForCausalLM, SpikeStatistics, spike_groups
from spikelm.conversion.sources import quiet
from spikelm.kernels.linear_loss import linear_cross_entropy
from spikelm.kernels.runtime import wide_dtype
from spikelm.recipes.checkpoints import UNWRITABLE, Checkpoints
from spikelm.recipes.lora import export_adapter
from spikelm.recipes.packing import IGNORED
from spikelm.recipes.sharding import ShardedTrainer
from spikelm.spiking.rate import RateRegulariser

STREAM = "stream.json"


class MatrixDecayTrainer(Trainer):
    """Decays matrices only: not thresholds, decays, mixing coefficients, norms."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters with more than one dimension."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]


class RecipeTrainer(ShardedTrainer, MatrixDecayTrainer):
    """Trains on windows of tokens. A recipe overrides `token_losses`, and `export` if its result is no plain model.

    Attributes:
        settings: the recipe's. checkpoints: where the run keeps them.
        progress: what the run has done so far; see `Progress`.
    """

    control: Any

    def __init__(self, *, settings: Any, **kwargs: Any):
        super().__init__(**kwargs)
        if settings.lora is not None and self.is_split:
            raise ValueError("lora needs whole parameters in every process: use DDP, or leave it out.")
        self.settings = settings
        self.checkpoints = Checkpoints(Path(settings.out) / "checkpoints")
        self.progress = Progress(self)
        self.add_callback(self.progress)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Bar())
        # `num_items_in_batch` is counted and divided by here, whatever the model's forward takes.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._watch = False
        self._sums: dict[str, Tensor] = {}
        self._spikes: Tensor | None = None

    # What is minimised

    def token_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms of the loss by name, each weighted already and summed over the tokens that count.

        Args:
            model: as wrapped for training; call it, do not reach into it.
            inputs: `input_ids`, `labels`, `position_ids`, each `[B, T]` int64.
        """
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        targets = shifted(inputs["labels"])
        if self.fused:
            softcap = self.inner.config.logit_softcap

            def head_loss(x: Tensor, head: nn.Linear) -> Tensor:
                return linear_cross_entropy(x, head.weight, targets, softcap=softcap, reduction="sum")

            return {"cross_entropy": model(**rest, use_cache=False, head_loss=head_loss).loss}
        logits = model(**rest, use_cache=False).logits
        wide = logits.to(wide_dtype(logits))
        loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return {"cross_entropy": loss}

    @property
    def inner(self) -> nn.Module:
        """The model that the recipe loaded, without the wrappers of accelerate and peft."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def fused(self) -> bool:
        """Whether the loss is taken from hidden states, a few tokens at a time, so that logits are never all there."""
        return isinstance(self.inner, SpikeLMForCausalLM) and not self.inner.config.head_bias

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """All terms over the tokens of the step, times the number of processes."""
        with self._watching():
            terms = self.token_losses(model, inputs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RateRegulariser):
                terms |= callback.loss_terms(shifted(inputs["labels"]) != IGNORED)
        # Each divided in its own precision: 1 / N would be float32.
        terms = {name: term * self.accelerator.num_processes / num_items_in_batch for name, term in terms.items()}
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term.detach()
        return torch.stack([*terms.values()]).sum()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """The micro-batches of a step, and N."""
        batches = list(islice(epoch_iterator, num_batches))
        items = torch.stack([counting(batch["labels"]).sum() for batch in batches]).sum().to(device)
        return batches, self.accelerator.reduce(items, "sum").clamp(min=1)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Last look before the optimiser moves the weights. A scaler of float16 skips steps whose gradients overflow.
        norm = super()._get_grad_norm(model, grad_norm)
        bad = not torch.isfinite(self._tr_loss)
        if bad or (self.accelerator.scaler is None and norm is not None and not math.isfinite(norm)):
            step = self.state.global_step + 1
            what = f"the loss is {self._tr_loss.item()}" if bad else f"the norm of the gradient is {float(norm)}"
            raise FloatingPointError(
                f"Step {step}: {what}. {self.kept()} Lower the learning rate, or look at the data."
            )
        return norm

    def kept(self) -> str:
        """What an error can say of the work that is safe."""
        steps = self.checkpoints.steps()
        return f"The checkpoint of step {steps[-1]} is whole." if steps else "There is no checkpoint yet."

    # Data: the same windows in every step, however it is split

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Held-out windows, filled up with windows without labels to the same number of full batches everywhere."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().get_eval_dataloader(Filled(dataset, self.args.eval_batch_size * self.args.world_size))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean of every term per token that counts, `PREFIX_loss` their sum."""
        if not self.accelerator._models:  # not in training
            self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        model = self.model_wrapped
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        tokens = torch.zeros((), dtype=torch.float64)
        sums: dict[str, Tensor] = {}
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                terms = self.token_losses(model, inputs)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.double().cpu()
            tokens += counting(inputs["labels"]).sum().cpu()
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        totals = torch.stack([tokens, *sums.values()]).to(self.args.device)
        tokens, *values = self.accelerator.reduce(totals, "sum").tolist()
        if not tokens:
            raise ValueError("No token of the held-out data counts: all of its labels are -100.")
        metrics = {f"{metric_key_prefix}_loss": sum(values) / tokens}
        if len(sums) > 1:
            metrics |= {f"{metric_key_prefix}_{name}": value / tokens for name, value in zip(sums, values)}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    # Checkpoints

    def resume(self) -> int:
        """Train, from the newest whole checkpoint on if there is one; returns its step, or 0."""
        if self.args.should_save:
            self.checkpoints.clean()
        self.accelerator.wait_for_everyone()
        if not (steps := self.checkpoints.steps()):
            self.train()
            return 0
        folder = self.checkpoints.path(steps[-1])
        self.check_layout(folder)
        if self.args.should_save:
            print(f"Going on from step {steps[-1]} of {self.args.max_steps}.", file=sys.stderr, flush=True)
        if isinstance(self.train_dataset, Bounded):
            self.train_dataset.resume((folder / STREAM).read_text())
        self.train(resume_from_checkpoint=str(folder))
        return steps[-1]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # What is tied is stored once, and what an adapter leaves frozen not at all. Anything else that lacks would be
        # trained on from its initial value.
        absent = {*(getattr(self.inner, "all_tied_weights_keys", None) or ())}
        absent |= {*(getattr(self.inner, "_keys_to_ignore_on_save", None) or ())}
        if wrong := sorted({*load_result.missing_keys} - absent) + sorted(load_result.unexpected_keys):
            raise ValueError(f"The checkpoint is of another model: {', '.join(wrong[:4])} are not in both.")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        folder = self.checkpoints.staging(step)
        try:
            self.store_flos()
            if not self.is_split:
                with quiet():
                    self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self.args.should_save:
                for callback in self._exportable():
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
                self.state.save_to_json(str(folder / "trainer_state.json"))
                if isinstance(self.train_dataset, Bounded):
                    (folder / STREAM).write_text(self.train_dataset.state(step * self.settings.batch))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.checkpoints.commit(step, self.state.best_global_step)
            self.accelerator.wait_for_everyone()
        except UNWRITABLE as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"The checkpoint of step {step} could not be written: {error} {self.kept()}") from error

    def _exportable(self) -> list[Any]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, ExportableState)]

    def _load_callback_state(self) -> None:
        # In place: callbacks keep what they were made with, and their order.
        for callback in self._exportable():
            stored = self.state.stateful_callbacks.get(type(callback).__name__, {"attributes": {}})
            for name, value in stored["attributes"].items():
                setattr(callback, name, value)

    def export(self, folder: str) -> None:
        """Write the trained model as a complete model folder; an adapter is written by itself, then merged."""
        if self.settings.lora is not None:
            export_adapter(self.inner, self.settings, write=self.args.should_save)
        with quiet():
            self.save_model(folder, _internal_call=True)

    # What is logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the terms, tokens per second and spikes to what Trainer logs of the last steps."""
        if "loss" in logs:
            logs |= self._terms() | self.progress.speed() | self._spike_metrics()
        if "train_loss" in logs:  # Trainer's would be of the time since the last start alone
            points = [(row["step"], row["loss"]) for row in self.state.log_history if "loss" in row]
            spans = [step - before for (step, _), (before, _) in zip(points, [(0, 0.0), *points])]
            logs["train_loss"] = sum(n * loss for n, (_, loss) in zip(spans, points)) / sum(spans)
        super().log(logs, start_time)

    def _terms(self) -> dict[str, float]:
        values = self.accelerator.reduce(torch.stack([*self._sums.values()]), "mean") / self.progress.new_steps()
        names, self._sums = list(self._sums), {}
        return dict(zip(names, values.tolist()))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Counts spikes of one micro-batch of a step that will be logged, and of its forward pass alone."""
        if not self._watch:
            yield
            return
        self._watch = False
        with SpikeStatistics(self.model) as statistics:
            yield
        self._spikes = torch.zeros(5, dtype=torch.float64)
        for row in statistics.by_site():
            inputs = row["tokens"] * row["width"]
            rates, silent, reads = row["firing_rate"], inputs * row["silent_share"], row["fan_out"]
            sums = (inputs, silent, inputs * reads, silent * reads, inputs * rates["unary"])
            self._spikes += torch.tensor(sums, dtype=torch.float64)

    def _spike_metrics(self) -> dict[str, float]:
        if self._spikes is None:
            return {}
        sums = self.accelerator.reduce(self._spikes.to(self.args.device), "sum").tolist()
        self._spikes = None
        inputs, silent, reads, silent_reads, spikes = sums
        if not inputs:  # sites that hand on something else, such as real values, code nothing
            return {}
        shares = {"silent_share": silent / inputs, "firing_rate_unary": spikes / inputs}
        return shares | ({"silent_share_reads": silent_reads / reads} if reads else {})


class Progress(TrainerCallback, ExportableState):
    """When to log, evaluate and save; and how long the training itself took.

    Attributes:
        seconds: spent on steps so far, in all starts up to the last checkpoint and the last one since.
    """

    def __init__(self, trainer: RecipeTrainer):
        self.trainer = trainer
        self.seconds = 0.0
        self._mark, self._logged, self._at = 0.0, 0.0, 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._mark, self._logged, self._at = time.perf_counter(), self.seconds, state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Watch the spikes of a step that will be logged."""
        logged = _logs(state.global_step + 1, args, state)
        self.trainer._watch = logged and next(spike_groups(self.trainer.model), None) is not None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint comes with a point of the log and a held-out loss; the last step is one."""
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        if control.should_save or _saves(state.global_step, state):
            control.should_save = control.should_log = True
            control.should_evaluate = self.trainer.eval_dataset is not None
        control.should_log |= _logs(state.global_step, args, state)

    def _pause(self, *_: Any, **__: Any) -> None:
        self._mark = time.perf_counter()

    on_evaluate = on_save = _pause

    def new_steps(self) -> int:
        """Steps since the last log."""
        return self.trainer.state.global_step - self._at

    def speed(self) -> dict[str, float]:
        """Tokens per second since the last log; starts a new count."""
        steps, seconds = self.new_steps(), self.seconds - self._logged
        self._logged, self._at = self.seconds, self.trainer.state.global_step
        tokens = self.trainer.settings.step_tokens
        return {"tokens": self._at * tokens, "tokens_per_second": steps * tokens / seconds}


class Bar(ProgressCallback):
    """Trainer's bar, with tokens per second and the silent share behind it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest figures."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is None or "tokens_per_second" not in logs:
            return
        text = f"{logs['tokens_per_second']:,.0f} tokens/s"
        if (share := logs.get("silent_share_reads", logs.get("silent_share"))) is not None:
            text += f", {share:.1%} silent"
        self.training_bar.set_postfix_str(text)


def _saves(step: int, state: Any) -> bool:
    return step % state.save_steps == 0 or step == state.max_steps


def _logs(step: int, args: Any, state: Any) -> bool:
    return step % state.logging_steps == 0 or _saves(step, state) or (step == 1 and args.logging_first_step)


class Bounded(IterableDataset):
    """The first `total` items of a stream without end, as `state_dict` and `load_state_dict` of `Stream` know it.

    Trainer goes on by skipping what was trained on. After `resume`, those items are blanks that nobody reads, and the
    stream itself stands behind them.
    """

    def __init__(self, stream: Any, total: int, window: int):
        self.stream, self.total, self.skipped = stream, total, 0
        self._blank = torch.zeros(window, dtype=torch.int64)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        blank = dict.fromkeys(("input_ids", "labels", "position_ids"), self._blank)
        yield from repeat(blank, self.skipped)
        yield from islice(self.stream, self.total - self.skipped)

    def state(self, items: int) -> str:
        """What a checkpoint keeps after so many items."""
        return json.dumps({"items": items, "stream": self.stream.state_dict(items)})

    def resume(self, state: str) -> None:
        """Go on where `state` was taken."""
        stored = json.loads(state)
        self.skipped = stored["items"]
        self.stream.load_state_dict(stored["stream"])


class Filled(Dataset):
    """A data set, and copies of its first item without labels up to a multiple of `full` items."""

    def __init__(self, dataset: Any, full: int):
        self.dataset, self.full = dataset, full

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.full) * self.full

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i < len(self.dataset):
            return self.dataset[i]
        first = self.dataset[0]
        return first | {"labels": torch.full_like(torch.as_tensor(first["labels"]), IGNORED)}


def shifted(labels: Tensor) -> Tensor:
    """`[B, T]` labels -> `[B, T]` targets: what each token predicts is the label of the next one, the last nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def counting(labels: Tensor) -> Tensor:
    """`[B, T]` labels -> `[B, T - 1]` bool: which tokens predict one that counts."""
    return labels[:, 1:] != IGNORED
