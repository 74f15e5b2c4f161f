"""lm-evaluation-harness reads and scores with models of this library: the model type `spikelm`, the class `SpikeLM`.

    import spikelm.eval.lm_eval_model  # registers the type: the harness finds models by import, not by entry points
    lm_eval.simple_evaluate(model="spikelm", model_args={"pretrained": "folder"}, tasks=["lambada_openai"])
    lm_eval.simple_evaluate(model=SpikeLM(model, tokenizer, batch_size=8), tasks=[...])

Three kinds of requests: for texts c (context) and t (what follows), of tokens c_1 .. c_m and t_1 .. t_n,

    loglikelihood          sum_i log p(t_i | c, t_1 .. t_i-1), and whether every t_i is the likeliest token
    loglikelihood_rolling  the same over a whole text behind the prefix token, in windows of `max_length` predicted
                           tokens, each behind the last token of the one before; the last window, which predicts fewer,
                           is filled up with the tokens before them
    generate_until         the continuation of c, until a stop string or so many tokens

A text may not depend on those that share its batch. So every pass is told what is padding: recurrent states and spike
statistics leave it out. The harness' own class for models of transformers pads a batch to be scored with tokens 0 and
gives no mask, which keeps the logits of a causal model but counts the padding's spikes; it lets the first text of a
batch say for all whether a begin-of-text token is put before it; and it gives the tokenizer a padding token. Nothing
of what is asked for here could be kept of it, so that `SpikeLM` builds on the harness' `TemplateLM`.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from spikelm.eval.fidelity import log_probs
from spikelm.inference import prepare_for_inference
from spikelm.inference.prepare import set_events
from spikelm.loading import load_model

Ids = list[int]
Request = tuple[Any, Ids, Ids]  # what names it in a cache, tokens of the context, tokens to score

# Tokens of a batch that is scored: each may leave a row of logits as wide as the vocabulary.
_SCORED = 4096
_GENERATED = 256  # tokens of a continuation, if the task does not say; as in the harness


@register_model("spikelm")
class SpikeLM(TemplateLM):
    """A causal language model, of this library or of transformers, for `lm_eval.simple_evaluate` and `evaluate`.

    Args:
        pretrained: a model folder, a `.gguf` file or a hub id, as `spikelm.loading.load_model` takes them; or a loaded
            model, which is set to evaluation mode and stays on its device.
        tokenizer: of a loaded model.
        dtype: of the weights: a torch dtype or its name; "auto": as stored.
        weights, events: lay the weights out for event-driven inference first, as `prepare_for_inference` takes them.
        device: where a model that is loaded here goes; None: the GPU if there is one. Without one, "cuda:0" (which
            the harness' command line asks for unless told otherwise) is the CPU too.
        max_length: tokens that the model reads at once, predicted ones included but for the last: the window of
            rolling requests; longer contexts lose their beginning. None: `max_position_embeddings` of its
            configuration. Numbers of rolling requests depend on it.
        prefix_token_id: stands before a text that has no context. None: the begin-of-text token of the tokenizer, or
            the end-of-text token where there is none.
        batch_size: texts in one pass; fewer where they are long.
        on_tokens: called with the tokens read and the tokens generated since the last call, in place of a bar.

    Attributes:
        shortened: requests so far whose context lost its beginning.

    Raises:
        ValueError: a model that cannot be loaded or laid out, a tokenizer or length that is missing, a size below 1.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        dtype: str | torch.dtype = "auto",
        weights: str | None = None,
        events: str | None = None,
        device: str | torch.device | None = None,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str = 1,
        on_tokens: Callable[[int, int], Any] | None = None,
    ):
        super().__init__()
        if isinstance(pretrained, (str, Path)):
            # Laid out for inference, activations are fastest in float32.
            wanted = torch.float32 if dtype == "auto" and weights is not None else _dtype(dtype)
            model, tokenizer = load_model(pretrained, dtype=wanted, progress=on_tokens is None)
            model.to(_device(device))
        else:
            model = pretrained
        if tokenizer is None:
            raise ValueError("A loaded model needs its tokenizer: SpikeLM(model, tokenizer).")
        if weights is not None:
            prepare_for_inference(model, weights, events or "auto")
        elif events is not None:
            set_events(model, events)
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer
        self._device = model.device
        if max_length is None:
            max_length = getattr(model.config, "max_position_embeddings", None)
        self.max_length = _positive(max_length, "max_length", "tokens")
        self.batch_size = _positive(batch_size, "batch_size", "texts")
        self.on_tokens = on_tokens
        self.shortened = 0
        prefixes = (prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._prefix = next((token for token in prefixes if token is not None), None)
        # Where only the end of a text is scored, the head need not run on the rest.
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def eot_token_id(self) -> int | None:
        """End of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context. Raises ValueError if there is no such token."""
        if self._prefix is None:
            raise ValueError(
                "The tokenizer has neither a begin-of-text nor an end-of-text token to predict a first token from: "
                "give prefix_token_id."
            )
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in caches of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the template of the tokenizer."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the numbers depend on; the harness keeps it under `config` of its results."""
        return {
            "model_dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "model_weights": getattr(getattr(self.model, "prepared", None), "weights", None),
            "max_length": self.max_length,
            "prefix_token_id": self._prefix,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """Tokens of a text, with what the tokenizer puts around it unless told otherwise or already written there."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, verbose=False, **options)["input_ids"]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, given the prefix token, in nats; see the head of this file."""
        windows: list[Request] = []
        owners = []
        for i, request in enumerate(requests):
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            for start in range(0, len(ids) - 1, self.max_length):
                stop = min(start + self.max_length, len(ids) - 1)
                windows.append((None, ids[max(0, stop - self.max_length) : start + 1], ids[start + 1 : stop + 1]))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += logprob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of what follows each context, and whether it is the likeliest all along."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Choices of one token need one pass together: what is read is the same.
        asked: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"{len(continuation)} tokens are to be scored at once, but max_length is {self.max_length}: "
                    "make it larger."
                )
            if continuation:
                self.shortened += len(context) + len(continuation) > self.max_length + 1
                asked.setdefault(tuple((context + continuation)[-self.max_length - 1 : -1]), []).append(i)
        lengths = {text: len(text) for text in asked}
        for texts in self._batches(lengths, disable_tqdm, "loglikelihood", _SCORED):
            scored = [max(len(requests[i][2]) for i in asked[text]) for text in texts]
            logits, starts = self._logits(texts, scored)
            for text, row, start, size in zip(texts, logits, starts, scored):
                logp = log_probs(row[start : start + size])
                likeliest = logp.argmax(-1)
                for i in asked[text]:
                    name, _, continuation = requests[i]
                    target = torch.tensor(continuation, device=logp.device)
                    n = len(target)
                    total = logp[-n:].gather(1, target[:, None]).double().sum().item()
                    results[i] = (total, bool((likeliest[-n:] == target).all()))
                    if name is not None:
                        self.cache_hook.add_partial("loglikelihood", name, results[i])
        return results

    def _logits(self, texts: list[tuple[int, ...]], scored: list[int]) -> tuple[Tensor, list[int]]:
        """Logits `[B, t, vocab]` of right-padded texts, and per row where the last `scored` real positions begin."""
        ids, mask = self._padded(texts, "right")
        length = ids.shape[1]
        first = min(len(text) - n for text, n in zip(texts, scored)) if self._keeps_logits else 0
        options = {"logits_to_keep": length - first} if self._keeps_logits else {}
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        self._count(sum(map(len, texts)), 0)
        return logits, [len(text) - n - first for text, n in zip(texts, scored)]

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, each cut before the first stop string; greedy unless a task samples."""
        results = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        for indices in alike.values():
            options: dict[str, Any] = dict(normalize_gen_kwargs(requests[indices[0]].args[1], _GENERATED))
            stops = [stop for stop in options.pop("until") if stop]
            new = options.pop("max_gen_toks")
            if not options["do_sample"]:
                options.pop("temperature", None)
            room = self.max_length - new
            if room < 1:
                raise ValueError(
                    f"{new} tokens are to be generated, which leaves no room for a context: max_length is "
                    f"{self.max_length}; make it larger."
                )
            contexts = {}
            for i in indices:
                ids = self.tok_encode(requests[i].args[0]) or [self.prefix_token_id]
                self.shortened += len(ids) > room
                contexts[i] = ids[-room:]
            lengths = {i: len(ids) for i, ids in contexts.items()}
            for batch in self._batches(lengths, disable_tqdm, "generate_until"):
                texts = self._generate([contexts[i] for i in batch], new, stops, options)
                for i, text in zip(batch, texts):
                    results[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results

    def _generate(self, contexts: list[Ids], new: int, stops: list[str], options: dict[str, Any]) -> list[str]:
        ids, mask = self._padded(contexts, "left")
        stored = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(stored if isinstance(stored, list) else [stored])} - {None}
        pad = self.tokenizer.pad_token_id
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            max_new_tokens=new,
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad if pad is not None else min(ends, default=0),
            stopping_criteria=StoppingCriteriaList([_StopStrings(self.tokenizer, stops, ids.shape[1])]),
            use_cache=True,
            **options,
        )[:, ids.shape[1] :].tolist()
        texts = []
        for row in out:
            end = next((n for n, token in enumerate(row) if token in ends), len(row))  # padding may follow
            texts.append(_before(self.tokenizer.decode(row[:end], skip_special_tokens=True), stops))
        self._count(sum(map(len, contexts)), sum(map(len, out)))
        return texts

    def _padded(self, texts: list[Any], side: str) -> tuple[Tensor, Tensor | None]:
        """Ids `[B, T]` and their mask, None if there is no padding."""
        length = max(map(len, texts))
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            place = slice(length - len(text), None) if side == "left" else slice(len(text))
            ids[row, place] = torch.tensor(text)
            mask[row, place] = 1
        return ids.to(self._device), None if bool(mask.all()) else mask.to(self._device)

    def _batches(
        self, lengths: dict[Any, int], disable: bool, name: str, most: int | None = None
    ) -> Iterator[list[Any]]:
        """Batches of texts of similar length, longest first: what does not fit the memory is found at once.

        With `most`, so many tokens together, or one text.
        """
        ordered = sorted(lengths, key=lengths.__getitem__, reverse=True)
        start = 0
        with tqdm(total=len(ordered), desc=name, disable=disable or self.on_tokens is not None) as bar:
            while start < len(ordered):
                rows = self.batch_size if most is None else min(self.batch_size, most // lengths[ordered[start]])
                batch = ordered[start : start + max(rows, 1)]
                yield batch
                bar.update(len(batch))
                start += len(batch)

    def _count(self, read: int, generated: int) -> None:
        if self.on_tokens is not None:
            self.on_tokens(read, generated)


class _StopStrings(StoppingCriteria):
    """Ends each row of a batch as soon as one of some strings occurs in what was generated for it."""

    def __init__(self, tokenizer: Any, stops: list[str], prompt: int):
        self.tokenizer, self.stops, self.prompt = tokenizer, stops, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def _before(text: str, stops: list[str]) -> str:
    """What stands before the first of some strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _device(wanted: str | torch.device | None) -> torch.device:
    device = torch.device("cuda" if wanted is None else wanted)
    return device if device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")


def _dtype(name: str | torch.dtype) -> torch.dtype | None:
    if isinstance(name, torch.dtype) or name == "auto":
        return None if name == "auto" else name
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype must be 'auto' or the name of a floating dtype of torch, such as float32; got {name!r}."
        )
    return found


def _positive(value: Any, name: str, unit: str) -> int:
    """A positive integer, perhaps written as text: so the harness' command line gives it."""
    try:
        size = int(value)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise ValueError(f"{name} must be a positive number of {unit}; got {value!r}.")
    return size
