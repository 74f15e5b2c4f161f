"""The model type of lm-evaluation-harness: a text may not depend on those that share its batch; nothing needs a hub."""

import copy

import lm_eval
import pytest
import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM

from small_models import EVERY_SITE, PATTERNS, SITES, leaves, small_model
from spikelm import prepare_for_inference
from spikelm.eval.lm_eval_model import SpikeLM
from spikelm.loading import load_model
from spikelm.spiking import SpikeStatistics

EXACT = 1e-9
TEXT = "A neuron is silent until it has something to say; then it fires. Nobody knows what it will say next, or why."
SAID = [{"text": "A neuron is", "word": " silent"}, {"text": "Then it", "word": " fires"}]
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


@pytest.mark.parametrize("name", ["attention", "gla+swa", "hgrn", "rwkv7", "egru", "lif"])
def test_models_laid_out_for_inference(name, tokenizer):
    model = prepare_for_inference(
        small_model(spike_sites=SITES, spike_dead_zone=0.4, **PATTERNS[name]), "int8", "never"
    )
    assert_same(harness(model, tokenizer, 8), harness(model, tokenizer, 1))


def llama(vocab_size=97):
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).eval().double()
    model.lm_head.weight.data.mul_(20)
    return model


def test_models_of_transformers_give_what_the_harness_itself_gets(tokenizer):
    model = llama()
    own = harness(model, tokenizer)
    theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1, max_length=24)
    theirs.tokenizer.eos_token = "\n"  # it cannot generate without one
    assert_same(own, harness(model, tokenizer, 1))
    assert scores(own)[0] == pytest.approx(scores(theirs)[0], abs=EXACT, rel=0)
    assert scores(own)[1] == scores(theirs)[1]
    assert texts(own, until=["e", "s"]) == texts(theirs, until=["e", "s"])


def numbers(nested):
    return {name: value for name, value in leaves(nested).items() if isinstance(value, (int, float))}


def test_padding_counts_no_spikes(tokenizer):
    model = small_model(spike_sites=EVERY_SITE, **PATTERNS["gla-swa-attention"])
    counted = []
    for batch_size in (8, 1):
        lm = harness(model, tokenizer, batch_size)
        with SpikeStatistics(model) as statistics:
            scores(lm), texts(lm, until=[])
        counted.append(statistics.by_site())
    assert numbers(counted[0]) == pytest.approx(numbers(counted[1]), rel=1e-12)


def test_one_pass_for_choices_of_one_token(tokenizer):
    read = []
    lm = SpikeLM(small_model(), tokenizer, on_tokens=lambda tokens, generated: read.append(tokens))
    pairs = [("It is ", letter) for letter in "abcd"]
    together = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert read == [6]
    apart = [lm.loglikelihood(requests("loglikelihood", [pair]), disable_tqdm=True)[0] for pair in pairs]
    assert [total for total, _ in together] == pytest.approx([total for total, _ in apart], abs=EXACT)
    assert len({total for total, _ in together}) == 4


def test_windows_of_a_long_text_predict_every_token_once(tokenizer):
    model = small_model()
    text = TEXT[:60]
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
    expected = 0.0
    for begin, first in ((0, 1), (24, 25), (36, 49)):  # the last one predicts 12 tokens behind 13
        window = ids[begin : begin + 25]
        logp = model(window[None, :-1]).logits[0].log_softmax(-1).gather(1, window[1:, None])
        expected += logp[first - begin - 1 :].sum().item()
    total = harness(model, tokenizer).loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert total == pytest.approx([expected], abs=1e-6)


def test_long_contexts_lose_their_beginning_and_are_counted(tokenizer):
    lm = harness(small_model(), tokenizer)
    long, short = ("x" + TEXT[:40], TEXT[16:40]), TEXT[40:43]
    scored = lm.loglikelihood(requests("loglikelihood", [(long[0], short), (TEXT[:40], short)]), disable_tqdm=True)
    assert scored[0] == scored[1] and lm.shortened == 2
    assert texts(lm, max_gen_toks=3)[5] and lm.shortened == 3
    with pytest.raises(ValueError, match="leaves no room for a context: max_length is 24"):
        texts(lm, max_gen_toks=24)
    with pytest.raises(ValueError, match="30 tokens are to be scored at once, but max_length is 24"):
        lm.loglikelihood(requests("loglikelihood", [("a", "b" * 30)]), disable_tqdm=True)


def test_generation_stops_for_each_text_alone(tokenizer):
    model = small_model(spike_sites=SITES, mixers="gla")
    lm = harness(model, tokenizer)
    free = texts(lm, until=[], max_gen_toks=6)
    stop = free[0][1]
    assert texts(lm, until=[stop], max_gen_toks=6) == [text.split(stop)[0] for text in free]


def test_a_begin_of_text_token_of_the_tokenizer_is_put_once(bos_tokenizer):
    lm = harness(small_model(), bos_tokenizer)
    bos, plain = bos_tokenizer.bos_token_id, bos_tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert lm.tok_encode("ab") == lm.tok_encode("<s>ab") == [bos, *plain]
    read = []
    lm.on_tokens = lambda tokens, generated: read.append(tokens)
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("abc",)]))
    assert read == [3]  # the token, a, b; the first predicted token is a


def test_an_embedding_wider_than_the_vocabulary(tokenizer):
    model = small_model(vocab_size=130)
    model.lm_head.weight.data[100] = 50 * model.lm_head.weight.data[100]  # no text has this token
    eight, one = (scores(harness(model, tokenizer, n))[0] for n in (8, 1))
    assert eight == pytest.approx(one, abs=EXACT)
    assert texts(harness(model, tokenizer, 8)) == texts(harness(model, tokenizer, 1))


def test_wrong_arguments_are_refused(tokenizer):
    model = small_model()
    for message, arguments in {
        "batch_size must be a positive number of texts; got 'auto'": {"batch_size": "auto"},
        "max_length must be a positive number of tokens; got 0": {"max_length": 0},
        "needs its tokenizer": {"tokenizer": None},
        "a dense one": {"events": "always"},
    }.items():
        with pytest.raises(ValueError, match=message):
            SpikeLM(model, **({"tokenizer": tokenizer} | arguments))
    with pytest.raises(ValueError, match="floating dtype of torch, such as float32; got 'int3'"):
        SpikeLM("folder", dtype="int3")
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="give prefix_token_id"):
        harness(model, tokenizer).loglikelihood(requests("loglikelihood", [("", "a")]), disable_tqdm=True)
    assert scores(harness(model, tokenizer, prefix_token_id=3))


def test_it_is_found_by_its_name_and_loads_a_folder(tokenizer, tmp_path):
    model = small_model(torch.float32, spike_sites=SITES, spike_dead_zone=0.3, max_position_embeddings=48)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = {
        "task": "said", "output_type": "loglikelihood", "custom_dataset": lambda **_: {"test": Dataset.from_list(SAID)},
        "test_split": "test", "doc_to_text": "{{text}}", "doc_to_target": "{{word}}", "target_delimiter": "",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }  # fmt: skip
    shared = {"tasks": [task], "bootstrap_iters": 0, "task_manager": TaskManager(include_defaults=False)}
    arguments = {"pretrained": str(tmp_path), "dtype": "float64", "weights": "int8", "events": "never"}
    asked = {"batch_size": 2, "device": "cpu" if torch.cuda.is_available() else "cuda:0"}
    found = lm_eval.simple_evaluate("spikelm", arguments | {"max_length": 32}, **asked, **shared)
    told = found["config"]
    assert (told["model_dtype"], told["model_weights"], told["max_length"]) == ("float64", "int8", 32)
    assert told["prefix_token_id"] == tokenizer.bos_token_id
    loaded = prepare_for_inference(load_model(tmp_path, dtype=torch.float64, progress=False)[0], "int8", "never")
    given = lm_eval.simple_evaluate("spikelm", {"pretrained": loaded, "tokenizer": tokenizer}, **shared)
    assert given["config"]["max_length"] == 48
    assert found["results"]["said"]["perplexity,none"] == pytest.approx(given["results"]["said"]["perplexity,none"])
