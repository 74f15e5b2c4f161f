"""Runs of two processes in one start: `accelerate launch --config_file cpu_two.yaml -m tests.recipes.scaled FOLDER`.

In FOLDER: `ddp`, undisturbed, and `ddp-again`, which both processes leave in the middle and start again; `fsdp2-again`,
a spiking model in float64, left and started again; `fsdp2-bf16`, where `dtypes.json` says what layers compute with.
"""

import json
import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.utils.data import IterableDataset

from spikelm.recipes.run import run
from spikelm.recipes.trainer import RecipeTrainer
from tests.recipes.tiny_run import WINDOW, Data, Windows, tiny_settings

LAUNCH = Path(__file__).resolve().parents[2] / "recipes" / "launch"
PLAIN = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "attention_window": 4} | {
    "num_hidden_layers": 2,
    "mixers": ["gla", "swa"],
}
SPIKING = PLAIN | {"spike_sites": ["qkv", "o", "gate_up", "down"], "tie_word_embeddings": True}
LEARNED = SPIKING | {"mixers": ["delta", "swa"], "spike_threshold": "learned"}


def settings(out, config, micro_batch, **training):
    """Six steps of four windows, a checkpoint every three, the loss of every step."""
    fixed = {"learning_rate": 1e-2, "logging_steps": 1, "disable_tqdm": True}
    budget = {"tokens": 6 * 4 * WINDOW, "checkpoints": 3 * 4 * WINDOW, "batch": 4, "micro_batch": micro_batch}
    return tiny_settings(out, config=config, training=fixed | training, **budget)


class Stream(IterableDataset):
    """The windows of `Windows`, one after the other without end."""

    def __init__(self):
        self.start = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        windows = Windows(1, seed=1)
        return (windows[i] for i in count(self.start))

    def state_dict(self, items):
        return {"start": items}

    def load_state_dict(self, state):
        self.start = state["start"]


class Streamed(Data):
    def describe(self):
        return {}


def streamed(settings, tokenizer):
    return Streamed(Stream(), Windows(5, seed=2))


def mapped(settings, tokenizer):
    return Data(Windows(4, seed=1), Windows(5, seed=2))


def double(model, tokenizer, settings):
    return model.double()


class Left(Exception):
    """The run is left here."""


def left_and_started_again(at, *args, **kwargs):
    """A run that is left before its `at`-th micro-batch, and a second one that goes on."""
    original, calls = RecipeTrainer.training_step, count(1)

    def leaving(*args, **kwargs):
        if next(calls) == at:
            raise Left
        return original(*args, **kwargs)

    RecipeTrainer.training_step = leaving
    try:
        run(*args, **kwargs)
    except Left:
        RecipeTrainer.training_step = original
        GradientState._reset_state()  # a new process has a new one
    run(*args, **kwargs)


def shard_on_the_cpu(config):
    """What `accelerate launch --config_file CONFIG` does; and Accelerate, which knows FSDP on GPUs only, is told."""
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(config), "x.py"]))
    wanted = {k: v for k, v in prepare_multi_gpu_env(arguments).items() if k.startswith(("ACCELERATE_USE", "FSDP_"))}
    os.environ |= wanted
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


def main(folder):
    torch.set_num_threads(1)
    run(settings(folder / "ddp", PLAIN, 1), data=streamed)
    left_and_started_again(9, settings(folder / "ddp-again", PLAIN, 1), data=streamed)

    shard_on_the_cpu(LAUNCH / "fsdp2.yaml")
    left_and_started_again(9, settings(folder / "fsdp2-again", SPIKING, 1), prepare=double, data=mapped)

    seen = {}

    def watch(model, tokenizer, settings):
        def note(layer, _):
            seen.update({name: str(p.dtype) for name, p in layer.named_parameters()})

        model.model.layers[0].register_forward_pre_hook(note)
        return model

    bf16 = settings(folder / "fsdp2-bf16", LEARNED, 1, bf16=True, activation_checkpointing=True)
    run(bf16, prepare=watch, data=mapped)
    if PartialState().is_main_process:
        (folder / "dtypes.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
