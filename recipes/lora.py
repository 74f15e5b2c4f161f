"""Adapters in recipes: low-rank pairs are trained in place of the weights.

    lora: {rank: 8, alpha: 16, targets: [q_proj, k_proj, v_proj, o_proj]}       # `lora: {}`: 8, 16, all linears

Checkpoints hold what trains. In the end `out/adapter` is what `spikelm.load_adapter(base, folder)` makes the trained
model of, and `out/model` that model, merged. The base is `model` in the settings, or the source that it was converted
from (see `spikelm.adapters`).
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spikelm import SpikeLMForCausalLM
from spikelm.adapters import add_adapter, merge_adapter, save_adapter
from spikelm.recipes.settings import Settings, strict


@dataclass(frozen=True)
class Lora:
    """Arguments of `add_adapter`.

    Attributes:
        rank, alpha: of every low-rank pair. targets: names of linears; None: all that the base has.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] | None = None

    @classmethod
    def of(cls, mapping: dict[str, Any]) -> "Lora":
        """Raises ValueError, with the field, for what does not fit."""
        return strict(cls, mapping, "lora.")

    def added_to(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with an adapter. Raises ValueError if it can have none."""
        if not isinstance(model, SpikeLMForCausalLM):
            raise ValueError("lora needs a spikelm model: convert the source first.")
        return add_adapter(model, **asdict(self))


def export_adapter(model: SpikeLMForCausalLM, settings: Settings, *, write: bool) -> None:
    """Write the adapter of a trained model to `out/adapter`, in one process, and merge it."""
    folder = Path(settings.out) / "adapter"
    if write:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted right after it
        save_adapter(model, folder, base=settings.model or "")
    merge_adapter(model)
