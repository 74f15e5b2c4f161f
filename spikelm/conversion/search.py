"""Which layers keep their attention: those whose replacement alone costs most, under a budget.

All candidates learn from one streamed pass (`spikelm.conversion.transfer`); then each of them is put into the source
alone, and its cost is how far the predictions move on held-out tokens: KL(source || source with that layer replaced).
Nothing says that costs of single layers add up, so the plan that follows is measured as a whole, beside a random plan
of the same budget. (Ranking by the KL of single layers: arXiv 2512.20569.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from spikelm.conversion.texts import Texts, tokenized
from spikelm.conversion.transfer import fit, learning, reduced_precision, windows
from spikelm.kernels.runtime import wide_dtype
from spikelm.modeling import SpikeLMForCausalLM

TOKENS = 16_384  # that the candidates learn from before they are measured
WINDOW = 1024
SEED = 0


def search(
    model: SpikeLMForCausalLM,
    teacher: SpikeLMForCausalLM,
    layers: Sequence[int],
    keep: int,
    *,
    tokenizer: Any = None,
    text: Texts = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Rank layers by what replacing each of them costs.

    Args:
        model: the source with all of `layers` replaced; their mixers learn, in place.
        teacher: the source, as `transfer.teacher_of` gives it.
        layers: the candidates.
        keep: how many of them keep their own mixer.
        tokenizer: turns text into ids; None if `text` is ids.
        text: as in `transfer`.
        progress: whether to show bars.

    Returns:
        What was found, ready for a record: `text`, `text_sha256`, `tokens` learned from, `held_out_tokens`, `seed` of
        the random plan; `ranking`: candidates from the costliest on, each with `layer`, `kl` (nats per token) and
        `nll` (rise of the mean negative log-likelihood); and for `auto` and `random` the layers `kept`, `kl` and `nll`.

    Raises:
        ValueError: a text that is too short.
    """
    ids, described = tokenized(text, tokenizer)
    rows, held = windows(ids.to(model.device), min(WINDOW, model.config.max_position_embeddings))
    with learning(model, layers) as students:
        seen = fit(students, teacher, rows, TOKENS, progress)
        mixers = {i: student.mixer for i, student in students.items()}
        alone = _costs(teacher, [{i: mixers[i]} for i in layers], held, progress)
        ranking = sorted(zip(layers, alone, strict=True), key=lambda entry: (-entry[1]["kl"], entry[0]))
        chosen = sorted(layer for layer, _ in ranking[:keep])
        drawn = torch.randperm(len(layers), generator=torch.Generator().manual_seed(SEED))[:keep].tolist()
        plans = {"auto": chosen, "random": sorted(layers[i] for i in drawn)}
        swaps = [{i: mixer for i, mixer in mixers.items() if i not in kept} for kept in plans.values()]
        whole = _costs(teacher, swaps, held, progress)
    return described | {
        "tokens": seen,
        "held_out_tokens": held.numel(),
        "seed": SEED,
        "ranking": [{"layer": layer} | cost for layer, cost in ranking],
        **{name: {"kept": kept} | cost for (name, kept), cost in zip(plans.items(), whole, strict=True)},
    }


@torch.no_grad()
def _costs(
    teacher: SpikeLMForCausalLM, swaps: list[dict[int, nn.Module]], rows: Tensor, progress: bool
) -> list[dict[str, float]]:
    """What each set of new mixers costs on `rows` `[n, T]`: KL and rise of the loss, in nats per token."""
    totals = torch.zeros(len(swaps), 2, dtype=torch.float64)
    bar = tqdm(total=len(rows) * len(swaps), desc="Measuring plans", unit="pass", disable=not progress, delay=1.0)
    with bar, reduced_precision(teacher):
        for row in rows:
            own = _predictions(teacher, row)
            for n, mixers in enumerate(swaps):
                with _swapped(teacher, mixers):
                    other = _predictions(teacher, row)
                totals[n, 0] += float(F.kl_div(other, own, log_target=True, reduction="sum")) / len(row)
                totals[n, 1] += float((own - other)[:-1].gather(1, row[1:, None]).mean())
                bar.update()
    return [{"kl": kl, "nll": nll} for kl, nll in (totals / len(rows)).tolist()]


def _predictions(model: SpikeLMForCausalLM, row: Tensor) -> Tensor:
    """Log-probabilities `[T, vocab]`, float32 or better."""
    logits = model(row[None], use_cache=False).logits[0]
    return logits.log_softmax(-1, dtype=wide_dtype(logits))


@contextmanager
def _swapped(teacher: SpikeLMForCausalLM, mixers: dict[int, nn.Module]) -> Iterator[None]:
    own = {i: teacher.model.layers[i].mixer for i in mixers}
    try:
        for i, mixer in mixers.items():
            teacher.model.layers[i].mixer = mixer
        yield
    finally:
        for i, mixer in own.items():
            teacher.model.layers[i].mixer = mixer
