"""The model type of lm-evaluation-harness: a text may not depend on those that share its batch; nothing needs a hub."""

import pytest
import torch
from lm_eval.api.instance import Instance

from small_models import small_model
from spikelm.eval.lm_eval_model import SpikeLM

EXACT = 1e-9
TEXT = "A neuron is silent until it has something to say; then it fires. Nobody knows what it will say next, or why."
LENGTHS = [9, 3, 17, 1, 12, 26, 7, 21]


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def contexts():
    """Eight texts of different lengths."""
    return [TEXT[i : i + n] for i, n in enumerate(LENGTHS)]


def harness(model, tokenizer, batch_size=8, **options):
    return SpikeLM(model, tokenizer, batch_size=batch_size, max_length=24, on_tokens=lambda *n: None, **options)


def scores(lm):
    """Log-probabilities of eleven pairs and of eight texts that are longer than a window, and the greedy flags."""
    pairs = [(text, TEXT[40 + i : 42 + 3 * i]) for i, text in enumerate(contexts())]
    pairs += [("", "silent"), ("Then it", " fires"), ("Then it", " fired")]
    scored = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    rolling = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(2 * text,) for text in contexts()]))
    return [total for total, _ in scored] + rolling, [greedy for _, greedy in scored]


def texts(lm, **settings):
    settings = {"until": ["e"], "max_gen_toks": 4} | settings
    return lm.generate_until(requests("generate_until", [(text, settings) for text in contexts()]))


def assert_same(one, other):
    (one_scores, one_greedy), (other_scores, other_greedy) = scores(one), scores(other)
    assert one_scores == pytest.approx(other_scores, abs=EXACT, rel=0) and one_greedy == other_greedy
    generated = texts(one)
    assert generated == texts(other) and len(set(generated)) > 1


def test_a_batch_of_eight_equals_single_texts(pattern, sites, tokenizer):
    model = small_model(spike_sites=sites, **pattern)
    if model.lm_head.bias is not None:
        model.lm_head.bias.data.zero_()  # else it decides alone what is likeliest
    assert_same(harness(model, tokenizer, 8), harness(model, tokenizer, 1))


def test_a_batch_of_eight_equals_single_texts_in_float32(pattern, tokenizer):
    model = small_model(torch.float32, **pattern)
    eight, one = (scores(harness(model, tokenizer, n))[0] for n in (8, 1))
    # The tier is 1e-4 on logits; the longest sum is one of 52.
    assert eight == pytest.approx(one, abs=1e-3, rel=0)
