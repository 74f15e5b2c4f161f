"""Four small tasks that need no download, one for each thing that lm-evaluation-harness can ask of a model.

    spikelm_prose          rolling: bits per byte of prose
    spikelm_next_sentence  multiple choice: which of four sentences follows; chance is 1/4
    spikelm_last_word      log-likelihood: the last word of a passage, and whether the model would write it
    spikelm_passkey        generation: five digits that stood earlier in the prompt, among filler

The first three are made of Python's reference prose, those paragraphs that are never calibrated on
(`conversion.texts.evaluation_sample`); the fourth of a random generator with a fixed seed. They are made to compare a
model with the one that it came from, in minutes: as benchmarks of knowledge they are nothing.
"""

import random
import re
from collections.abc import Callable
from typing import Any

from spikelm.conversion.texts import evaluation_sample

VERSION = 1.0
Document = dict[str, Any]

_PARAGRAPHS = 6  # of a document of prose, about 550 tokens
_CHOICES = 4
_KEYS = 60
_FILLER = (
    "The grass is green and the sky is blue.",
    "The road goes on, and there is nobody on it.",
    "A bell rings in the valley.",
    "It has rained all morning, and it will rain again.",
)


def configs(names: list[str]) -> list[dict[str, Any]]:
    """Configurations of bundled tasks, as `lm_eval.simple_evaluate(tasks=[...])` takes them beside names.

    Args:
        names: of `BUNDLED`.
    """
    return [
        {
            "task": name,
            "custom_dataset": _Built(build),
            "test_split": "test",
            "target_delimiter": "",
            "num_fewshot": 0,
            "metadata": {"version": VERSION},
            **fields,
        }
        for name in names
        for build, fields in [BUNDLED[name]]
    ]


def paragraphs() -> list[str]:
    """Paragraphs of prose, no code and no tables, each on one line."""
    kept = []
    for block in evaluation_sample().split("\n\n"):
        line = " ".join(block.split())
        if block[:1].isalpha() and len(line) > 200 and line.endswith(".") and line.count(".") < len(line) / 30:
            kept.append(line)
    return kept


def prose() -> list[Document]:
    """`text`: consecutive paragraphs."""
    found = paragraphs()
    starts = range(0, len(found) - _PARAGRAPHS + 1, _PARAGRAPHS)
    return [{"text": "\n\n".join(found[start : start + _PARAGRAPHS])} for start in starts]


def next_sentence() -> list[Document]:
    """`text`: the beginning of a paragraph; `choices`: sentences, `answer` the index of the one that follows."""
    split = [parts for line in paragraphs() if len(parts := sentences(line)) > 1]
    draw = random.Random(0)
    documents = []
    for i, parts in enumerate(split):
        others = draw.sample([other[1] for j, other in enumerate(split) if j != i], _CHOICES - 1)
        choices = [parts[1], *others]
        draw.shuffle(choices)
        documents.append(
            {"text": parts[0], "choices": [f" {choice}" for choice in choices], "answer": choices.index(parts[1])}
        )
    return documents


def last_word() -> list[Document]:
    """`text`: a paragraph up to its last word; `word`: that word, of four letters at least, and a space before it."""
    matches = (re.fullmatch(r"(.*)( [a-z]{4,})\.", line) for line in paragraphs())
    return [{"text": match[1], "word": match[2]} for match in matches if match]


def passkey() -> list[Document]:
    """`text`: filler with a sentence that holds a key, at depths from beginning to end; `key`: its five digits."""
    draw = random.Random(0)
    documents = []
    for i in range(_KEYS):
        key = str(draw.randrange(10_000, 100_000))
        lines = [_FILLER[n % len(_FILLER)] for n in range(16)]
        lines.insert(i % 8 * 2, f"The pass key is {key}. Remember it.")
        documents.append({"text": " ".join(lines) + " What is the pass key? The pass key is", "key": key})
    return documents


def sentences(line: str) -> list[str]:
    """A paragraph in sentences."""
    return re.split(r"(?<=[a-z)][.:]) (?=[A-Z])", line)


class _Built:
    """Makes the documents of a task when the harness asks for them; it keeps configurations by copying them."""

    def __init__(self, build: Callable[[], list[Document]]):
        self.build = build

    def __call__(self, **metadata: Any) -> dict[str, Any]:
        from datasets import Dataset  # of the extra `eval`, and slow to import

        return {"test": Dataset.from_list(self.build())}


def _metric(name: str, aggregation: str, higher: bool = True, **options: Any) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher, **options}


# Name -> what makes the documents, and the fields of its configuration.
BUNDLED: dict[str, tuple[Callable[[], list[Document]], dict[str, Any]]] = {
    "spikelm_prose": (
        prose,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                _metric("bits_per_byte", "bits_per_byte", False),
                _metric("word_perplexity", "weighted_perplexity", False),
            ],
        },
    ),
    "spikelm_next_sentence": (
        next_sentence,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "metric_list": [_metric("acc", "mean"), _metric("acc_norm", "mean")],
        },
    ),
    "spikelm_last_word": (
        last_word,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{word}}",
            "metric_list": [_metric("perplexity", "perplexity", False), _metric("acc", "mean")],
        },
    ),
    "spikelm_passkey": (
        passkey,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{key}}",
            "generation_kwargs": {"until": ["\n", "."], "do_sample": False, "max_gen_toks": 8},
            "filter_list": [
                {
                    "name": "digits",
                    "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}],
                }
            ],
            "metric_list": [_metric("exact_match", "mean")],
        },
    ),
}
