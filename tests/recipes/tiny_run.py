"""A run small enough for a test: windows that a formula makes, a model of two layers, a dozen steps."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from spikelm.recipes.settings import Settings

WINDOW = 16


@dataclass(frozen=True)
class Windows(Dataset):
    """Item i depends on the seed and i alone; two documents, and some labels that do not count."""

    length: int
    seed: int

    def sized(self, length):
        return replace(self, length=length)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(1000 * self.seed + i)
        ids = torch.randint(0, 3, (WINDOW,), generator=generator).cumsum(0) + 40
        labels = ids.clone()
        labels[: i % 5] = labels[9] = -100
        positions = torch.cat([torch.arange(9), torch.arange(WINDOW - 9)])
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


@dataclass(frozen=True)
class Data:
    train: Any
    heldout: Any

    def describe(self):
        return {"windows": len(self.train)}


def tiny_data(settings, tokenizer):
    return Data(Windows(4, seed=1), Windows(5, seed=2))


def tiny_settings(out, **changes) -> Settings:
    """Twelve steps, a checkpoint every four, a log every three; dropout, spikes, two micro-batches per step."""
    fields = {
        "out": str(out),
        "data": {"window": WINDOW},
        "tokens": 12 * 4 * WINDOW,
        "batch": 4,
        "micro_batch": 2,
        "checkpoints": 4 * 4 * WINDOW,
        "tokenizer": "bytes",
        "config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mixers": ["gla", "swa"],
            "attention_window": 4,
            "spike_sites": ["qkv", "o", "gate_up", "down"],
            "residual_dropout": 0.1,
        },
        "training": {"learning_rate": 1e-2, "use_cpu": True, "logging_steps": 3, "disable_tqdm": True},
    }
    return Settings(**(fields | changes))


def curve(report_or_history) -> list[dict]:
    """What a run logged, without what a clock measured."""
    return [{k: v for k, v in row.items() if not k.endswith(("_second", "_runtime"))} for row in report_or_history]
