"""The teacher of a distillation: a language model made one of ours, and what it says of a window.

A teacher reads windows as the student does. Models of other libraries let packed documents see each other; so a source
is converted with nothing changed (same logits), and then restarting positions separate documents in every layer, and
its layers and mixers stand at the student's places.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import spikelm
from spikelm import SpikeLMConfig, SpikeLMForCausalLM
from spikelm.conversion.checkpoints import read_json
from spikelm.kernels.runtime import wide_dtype
from spikelm.loading import load_model

_ROWS = 512  # tokens whose whole logits are held at a time


def load_teacher(source: str) -> SpikeLMForCausalLM:
    """A teacher in float32, in evaluation mode, without gradients. Raises ValueError for what cannot be loaded."""
    config = Path(source).expanduser() / "config.json"
    if config.is_file() and read_json(config).get("model_type") == SpikeLMConfig.model_type:
        model = load_model(source, dtype=torch.float32, progress=False)[0]
    else:
        model = spikelm.convert(source, mixers="keep", sites="none", dtype=torch.float32, progress=False)
    return model.eval().requires_grad_(False)


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within this context, the newest output of every module, by name."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> "torch.utils.hooks.RemovableHandle":
        return modules[name].register_forward_hook(lambda module, args, output: outputs.__setitem__(name, output))

    hooks = [record(name) for name in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def top_log_probs(hidden: Tensor, head: nn.Linear, k: int, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The k most probable tokens at every place.

    Args:
        hidden: `[N, D]`, last hidden states. head, softcap: of the model. k: 1 to V.

    Returns:
        Ids `[N, k]` int64, their log-probabilities `[N, k]`, and the log of what is left for all others `[N]` (-inf
        if k = V); float32, or float64 for float64 inputs.
    """
    ids, values, rests = [], [], []
    for rows in hidden.split(_ROWS):
        logits = head(rows)
        logits = logits.to(wide_dtype(logits))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_probs = logits.log_softmax(-1)
        top = log_probs.topk(k)
        ids.append(top.indices)
        values.append(top.values)
        rests.append(log_probs.scatter_(1, top.indices, float("-inf")).logsumexp(-1))
    return torch.cat(ids), torch.cat(values), torch.cat(rests)
