"""Distillation: a converted model learns to say what its source says.

    spikelm train distill recipes/distill.yaml
    accelerate launch -m spikelm.recipes.distill recipes/distill.yaml

Terms, per token, each with a weight (p: teacher, q: student, h: output of a layer, m: output of a mixer, C channels):

    logits          sum_v p_v log(p_v / q_v)                       over the vocabulary, or its k tokens that the teacher
                                                                   finds most probable and "all others" (`top_k`)
    hidden          mean over layers of |h_student - h_teacher|^2 / |h_teacher|^2
    mixers          mean over replaced layers of |m_student - m_teacher|^2 / C
    cross_entropy   -log q(next token of the text)

The teacher is in evaluation mode and sees the student's documents, boundaries included. With `cache`, it is asked once
for all windows of the run, its `top_k` answers are kept on disk, and nothing but the student is trained in memory.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from spikelm import SpikeLMForCausalLM
from spikelm.kernels.linear_loss import linear_cross_entropy, linear_kl, linear_kl_top
from spikelm.kernels.runtime import wide_dtype
from spikelm.recipes.run import command, run
from spikelm.recipes.settings import Settings
from spikelm.recipes.teacher import load_teacher, recorded, top_log_probs
from spikelm.recipes.teacher_cache import TeacherCache
from spikelm.recipes.trainer import IGNORED, RecipeTrainer, shifted

TERMS = ("logits", "hidden", "mixers", "cross_entropy")


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings):
    """Fields of this recipe beside those of all.

    Attributes:
        teacher: the model to learn from, usually the source of the conversion: a folder, a hub id, a `.gguf` file.
        terms: the weight of every term that counts.
        top_k: tokens of the teacher's distribution that are told apart; None: all.
        cache: folder to keep the teacher's answers in.
    """

    teacher: str
    terms: dict[str, float] = field(default_factory=lambda: {"logits": 1.0})
    top_k: int | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.terms) - set(TERMS)):
            raise ValueError(f"terms has no {unknown[0]!r}; the terms are {', '.join(TERMS)}.")
        if min(self.terms.values(), default=0) < 0 or not any(self.terms.values()):
            raise ValueError(f"terms must have weights >= 0, one of them above 0; got {self.terms}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {self.top_k}.")
        if self.cache is not None:
            if self.top_k is None:
                raise ValueError("cache keeps the teacher's top_k answers: give top_k, e.g. 64.")
            for name in ("hidden", "mixers"):
                if self.terms.get(name):
                    raise ValueError(f"the term {name} needs the teacher in memory: leave out cache, or the term.")


class DistillTrainer(RecipeTrainer):
    """Terms of the loss by a teacher in memory or on disk."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.teacher: SpikeLMForCausalLM | None = None
        self.cache: TeacherCache | None = None
        self.places: dict[str, list[int]] = {}  # layers whose outputs are compared, by term
        terms = self.settings.terms
        if self.settings.cache is not None:
            self._open_cache()
        elif any(terms.get(name) for name in ("logits", "hidden", "mixers")):
            self.teacher = self._load_teacher()
            if terms.get("hidden"):
                self.places["hidden"] = list(range(len(self.teacher.model.layers)))
            if terms.get("mixers"):
                self.places["mixers"] = replaced_layers(self.inner, self.teacher)

    def _load_teacher(self) -> SpikeLMForCausalLM:
        teacher = load_teacher(self.settings.teacher).to(self.args.device)
        check_pair(self.inner, teacher, self.settings)
        return teacher

    def _open_cache(self) -> None:
        """Ask the teacher for what is missing; the main process does, the others wait and read."""
        if isinstance(self.train_dataset, IterableDataset):
            raise ValueError("cache needs windows that are known beforehand: leave out data.streaming, or cache.")
        sets = [data for data in (self.train_dataset, self.eval_dataset) if data is not None]
        with self.args.main_process_first(local=False, desc="asking the teacher"):
            self.cache = TeacherCache(self.settings.cache, self.settings.teacher, self.settings.top_k)
            with self.compute_loss_context_manager():
                windows = (data[i] for data in sets for i in range(len(data)))
                self.cache.fill(self._load_teacher, windows, progress=not self.args.disable_tqdm)

    def token_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms that have a weight; see the head of this file."""
        weights, targets = self.settings.terms, shifted(inputs["labels"])
        counts = targets != IGNORED
        read = {name: value for name, value in inputs.items() if name != "labels"}
        answer, wanted = self._ask(read, counts)

        def head_loss(hidden: Tensor, head: nn.Linear) -> Tensor:
            terms = self._head_terms(hidden[counts], head.weight, answer, targets[counts])
            return torch.stack(terms) if terms else hidden.new_zeros(0)

        with recorded(watched(self.inner, self.places)) as got:
            losses = model(**read, use_cache=False, head_loss=head_loss).loss
        names = [name for name in ("logits", "cross_entropy") if weights.get(name)]
        terms = dict(zip(names, losses, strict=True))
        for name, layers in self.places.items():
            error = relative_error if name == "hidden" else squared_error
            pairs = [(got[f"{name}.{i}"], wanted[f"{name}.{i}"]) for i in layers]
            terms[name] = torch.stack([error(a[counts], b[counts]) for a, b in pairs]).mean()
        return {name: weights[name] * term for name, term in terms.items()}

    @torch.no_grad()
    def _ask(self, read: dict[str, Tensor], counts: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """What `linear_kl` or `linear_kl_top` compare the student with, at places that count; outputs by name."""
        if self.cache is not None:
            ids, log_probs = self.cache.answers(read["input_ids"], read["position_ids"])
            return (ids[counts], log_probs[counts]), {}
        if self.teacher is None:
            return (), {}
        with recorded(watched(self.teacher, self.places)) as wanted:
            hidden = self.teacher.model(**read, use_cache=False).last_hidden_state[counts]
        head, softcap = self.teacher.lm_head, self.teacher.config.logit_softcap
        if not self.settings.terms.get("logits"):
            return (), wanted
        if self.settings.top_k is None:
            return (hidden, head.weight), wanted
        return top_log_probs(hidden, head, self.settings.top_k, softcap)[:2], wanted

    def _head_terms(self, x: Tensor, weight: Tensor, answer: tuple[Tensor, ...], targets: Tensor) -> list[Tensor]:
        """The sums of logits and cross_entropy, where they have a weight, over rows x `[N, D]` of the student."""
        softcap, terms = self.inner.config.logit_softcap, []
        if self.settings.terms.get("logits"):
            divergence = linear_kl if self.settings.top_k is None else linear_kl_top
            terms.append(divergence(x, weight, *answer, softcap=softcap, reduction="sum"))
        if self.settings.terms.get("cross_entropy"):
            terms.append(linear_cross_entropy(x, weight, targets, softcap=softcap, reduction="sum"))
        return terms


def replaced_layers(student: SpikeLMForCausalLM, teacher: SpikeLMForCausalLM) -> list[int]:
    """Layers whose mixer is another than the teacher's. Raises ValueError if there are none."""
    pairs = zip(student.config.mixers, teacher.config.mixers)
    if not (replaced := [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]):
        raise ValueError("the term mixers compares replaced layers, and no mixer differs from the teacher's.")
    return replaced


def check_pair(student: SpikeLMForCausalLM, teacher: SpikeLMForCausalLM, settings: DistillSettings) -> None:
    """Raise ValueError if the terms cannot compare these two models."""
    if not isinstance(student, SpikeLMForCausalLM):
        raise ValueError("the student must be a spikelm model: convert the source first.")
    if student.config.head_bias or teacher.config.head_bias:
        raise ValueError("distillation has no terms for a head with a bias.")
    names = ["vocab_size", "logit_softcap"] if settings.terms.get("logits") else []
    if settings.terms.get("hidden") or settings.terms.get("mixers"):
        names += ["num_hidden_layers", "hidden_size"]
    for name in names:
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ValueError(
                f"the teacher {settings.teacher} has {name} {theirs}, the student {ours}; a teacher is usually the "
                "source that the student was converted from."
            )
    if settings.top_k is not None and settings.top_k > teacher.config.vocab_size:
        raise ValueError(f"top_k is {settings.top_k}, but the vocabulary has {teacher.config.vocab_size} tokens.")


def watched(model: SpikeLMForCausalLM, places: dict[str, list[int]]) -> dict[str, nn.Module]:
    """The layers and mixers of a model whose outputs the terms compare, by names such as `hidden.3`."""
    modules: dict[str, nn.Module] = {f"hidden.{i}": model.model.layers[i] for i in places.get("hidden", ())}
    return modules | {f"mixers.{i}": model.model.layers[i].mixer for i in places.get("mixers", ())}


def relative_error(x: Tensor, wanted: Tensor) -> Tensor:
    """Sum over rows `[N, C]` of |x - wanted|^2 / |wanted|^2, in float32 or better.

    The size of a hidden state differs a thousandfold between tokens; so every token has its own measure.
    """
    x, wanted = x.to(wide_dtype(x)), wanted.to(wide_dtype(wanted))
    return ((x - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).sum()


def squared_error(x: Tensor, wanted: Tensor) -> Tensor:
    """Sum over rows `[N, C]` of the mean over channels of (x - wanted)^2, in float32 or better."""
    return (x.to(wide_dtype(x)) - wanted.to(wide_dtype(wanted))).square().mean(-1).sum()


def train(config: Path) -> dict[str, Any]:
    """Distil as CONFIG, a YAML file, says."""
    return run(DistillSettings.read(config), DistillTrainer)


main = command(train)

if __name__ == "__main__":
    main()
