"""Attention transfer: new mixers learn the outputs of the attention that they replace, from one streamed pass.

The source reads a text. At every replaced layer the new mixer sees what its attention sees, the layer's normed input
x, and is fitted to what it gives, y:

    loss_i = mean (mixer_i(x_i) - y_i)^2 / var(y_i)        0: the same; 1: no better than a constant

A layer's mixer never meets the errors of another (teacher forcing), so all of them learn side by side. Each takes its
gradient steps inside the source's own pass, at the moment when x_i and y_i exist, and nothing outlives its batch.
(First stage of LoLCATs, Zhang et al. 2024, arXiv 2410.10254, and RADLADS, Goldstein et al. 2025, arXiv 2505.03005.)
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spikelm.configuration import SpikeLMConfig
from spikelm.conversion.texts import Texts, tokenized
from spikelm.modeling import SpikeLMForCausalLM
from spikelm.rotary import make_rotaries
from spikelm.spiking.site import Site

WINDOW = 2048  # states are trained on what is this far away
HELD = 4  # windows that the losses before and after are measured on
STEPS = 2  # gradient steps on each batch: a step costs a layer far less than the source's pass
RATE, NEW_RATE = 2e-4, 1e-2  # of what the source gave, and of what is new
GIVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
CLIP = 1.0
SHORTEST = 16

Visit = Callable[[int, Tensor, Tensor, Any], None]


def transfer(
    model: SpikeLMForCausalLM,
    teacher: SpikeLMForCausalLM,
    layers: Sequence[int],
    tokens: int,
    *,
    tokenizer: Any = None,
    text: Texts = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit the mixers of `layers` to those of a teacher, in place; the rest of the model stays as it is.

    Args:
        model: the converted model. Its spike sites pass on what they get while its mixers learn.
        teacher: the source, as `teacher_of` gives it.
        layers: the indices of the replaced layers.
        tokens: how many to learn from, in windows of at most 2,048; a shorter text is read again and again.
        tokenizer: turns text into ids; None if `text` is ids.
        text: what to learn from: a text, token ids `[N]`, or a list of either; None: `texts.calibration_sample()`.
        progress: whether to show a bar.

    Returns:
        What was done, ready for a record: `text`, `text_sha256`, `tokens`, `window`, `held_out_tokens`, and the loss
        of every layer, by index, `before` and `after`, on windows of the text that no mixer learned from.

    Raises:
        ValueError: a text that is too short to learn from one part and measure on another.
    """
    ids, described = tokenized(text, tokenizer)
    rows, held = windows(ids.to(model.device), min(WINDOW, model.config.max_position_embeddings))
    with learning(model, layers) as students:
        before = losses(students, teacher, held)
        seen = fit(students, teacher, rows, tokens, progress)
        after = losses(students, teacher, held)
    return described | {
        "tokens": seen,
        "window": rows.shape[1],
        "held_out_tokens": held.numel(),
        "layers": {str(i): {"before": before[i], "after": after[i]} for i in layers},
    }


def fit(students: "dict[int, Student]", teacher: SpikeLMForCausalLM, rows: Tensor, tokens: int, progress: bool) -> int:
    """Let every student learn from about so many tokens of `rows` `[n, T]`, in whole windows; returns how many."""
    steps = max(round(tokens / rows.shape[1]), 1)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(-(-steps // len(rows)))])
    bar = tqdm(order[:steps].tolist(), desc="Transferring", unit="window", disable=not progress, delay=1.0)
    for step, row in enumerate(bar):
        # A linear start over a twentieth of the steps, then half a cosine.
        share = min((step + 1) / max(steps / 20, 1), 1) * (1 + math.cos(math.pi * step / steps)) / 2
        run(
            teacher,
            students,
            rows[row : row + 1],
            lambda i, x, y, context, share=share: students[i].learn(x, y, context, share),
        )
        bar.set_postfix(loss=f"{sum(student.loss for student in students.values()) / len(students):.3f}")
    return steps * rows.shape[1]


@contextmanager
def learning(model: SpikeLMForCausalLM, layers: Sequence[int]) -> "Iterator[dict[int, Student]]":
    """The mixers of `layers` as students; afterwards they have their dtypes and their spikes again."""
    students = {i: Student(model.model.layers[i].mixer) for i in layers}
    try:
        yield students
    finally:
        for student in students.values():
            student.finish()


class Student:
    """One mixer that learns: in float32 or better, its spike sites silent bystanders, with an Adam of its own."""

    def __init__(self, mixer: nn.Module):
        self.mixer, self.loss = mixer, math.nan
        self.dtypes = [parameter.dtype for parameter in mixer.parameters()]
        self.wide = torch.float64 if torch.float64 in self.dtypes else torch.float32
        for parameter in mixer.parameters():
            parameter.data = parameter.data.to(self.wide, copy=True)  # a copy: the teacher holds the same tensors
        self.sites = [module for module in mixer.modules() if isinstance(module, Site)]
        for site in self.sites:
            site.substitute = _itself
        named = {name: p for name, p in mixer.named_parameters() if p.requires_grad}
        given = [p for name, p in named.items() if name.partition(".")[0] in GIVEN]
        new = [p for name, p in named.items() if name.partition(".")[0] not in GIVEN]
        groups = [{"params": given, "peak": RATE}, {"params": new, "peak": NEW_RATE}]
        self.parameters = [*given, *new]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))

    def relative(self, x: Tensor, y: Tensor, context: Any) -> Tensor:
        """The loss on x, y `[B, T, hidden]`."""
        y = y.to(self.wide)
        error = self.mixer(x.to(self.wide), context).to(self.wide) - y
        return error.square().mean() / y.flatten(0, -2).var(0, unbiased=False).mean().clamp_min(1e-12)

    def learn(self, x: Tensor, y: Tensor, context: Any, share: float) -> None:
        """A few gradient steps at a share of the learning rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak"]
        for _ in range(STEPS):
            with torch.enable_grad():
                loss = self.relative(x, y, context)
                loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.loss = float(loss)

    def finish(self) -> None:
        """Leave the mixer as it came, but for what it has learned."""
        for parameter, dtype in zip(self.mixer.parameters(), self.dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
        for site in self.sites:
            site.substitute = None


def replaced_layers(own: SpikeLMConfig, config: SpikeLMConfig) -> list[int]:
    """Indices of the layers whose mixer `config` changes, or sees less than in the source's `own` configuration."""
    fields = "mixers", "attention_window", "attention_sinks"
    return [i for i in range(own.num_hidden_layers) if any(own.at(name, i) != config.at(name, i) for name in fields)]


def teacher_of(model: SpikeLMForCausalLM, config: SpikeLMConfig) -> SpikeLMForCausalLM:
    """The source of a converted model, from which no mixer has learned yet, in evaluation mode.

    It shares every tensor with `model`, so it costs no memory, and must not be trained.

    Args:
        model: the converted model, whose projections are still those of the source.
        config: of the source: no layer replaced, no spike sites.
    """
    config.tie_word_embeddings = model.config.tie_word_embeddings
    with torch.device("meta"):
        teacher = SpikeLMForCausalLM(config)
    tensors = model.state_dict()
    teacher.load_state_dict({name: tensors[name] for name in teacher.state_dict()}, assign=True)
    teacher.tie_weights()
    # Rotary tables are no part of a state: they are made anew, on the device of the model.
    teacher.model.rotary = nn.ModuleDict(make_rotaries(config)).to(model.device)
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def losses(students: dict[int, Student], teacher: SpikeLMForCausalLM, rows: Tensor) -> dict[int, float]:
    """The loss of every student on `rows` `[n, T]`, the mean over windows."""
    totals = dict.fromkeys(students, 0.0)

    def measure(i: int, x: Tensor, y: Tensor, context: Any) -> None:
        totals[i] += float(students[i].relative(x, y, context))

    for row in rows:
        run(teacher, students, row[None], measure)
    return {i: total / len(rows) for i, total in totals.items()}


@torch.no_grad()
def run(teacher: SpikeLMForCausalLM, layers: Collection[int], ids: Tensor, visit: Visit) -> None:
    """One pass over ids `[B, T]`, up to the last of `layers`: each of them calls `visit(index, x, y, context)`."""
    handles = [
        teacher.model.layers[i].mixer.register_forward_hook(lambda _, args, y, i=i: visit(i, args[0], y, args[1]))
        for i in layers
    ]
    whole, teacher.model.layers = teacher.model.layers, teacher.model.layers[: max(layers) + 1]
    try:
        with reduced_precision(teacher):
            teacher.model(input_ids=ids, use_cache=False)
    finally:
        teacher.model.layers = whole
        for handle in handles:
            handle.remove()


@contextmanager
def reduced_precision(model: nn.Module) -> Iterator[None]:
    """Products of float32 in bfloat16, where the processor has units for them."""
    parameter = next(model.parameters())
    if parameter.device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    else:
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    with torch.autocast(parameter.device.type, torch.bfloat16, enabled=fast and parameter.dtype != torch.float64):
        yield


def windows(ids: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Windows `[n, T]` of ids `[N]` to learn from, and a few others, spread over the text, to measure on.

    T is at most `longest`, and at most a quarter of a short text. Raises ValueError for one that is too short.
    """
    length = min(longest, len(ids) // 4)
    if length < SHORTEST:
        raise ValueError(
            f"The text to transfer on has {len(ids)} tokens; expected at least {4 * SHORTEST}. Give a longer text."
        )
    rows = ids[: len(ids) // length * length].view(-1, length)
    count = min(HELD, len(rows) // 4)
    held = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
    held[((torch.arange(count) + 0.5) * len(rows) / count).long()] = True
    return rows[~held], rows[held]


def _itself(x: Tensor) -> Tensor:
    return x
