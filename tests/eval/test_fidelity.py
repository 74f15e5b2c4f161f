import math

import pytest
import torch
from tqdm import tqdm

from spikelm.eval.data import tokenize
from spikelm.eval.fidelity import Row, WindowScore, combine, compare, merge


def compared(model, baseline, texts, *rows):
    with tqdm(disable=True) as bar:
        compare(model, baseline, texts, list(rows), bar)
    return rows


def test_quality_equals_a_computation_by_hand(make_pair, tokenizer, letters, prose):
    model, baseline = make_pair()
    texts = [tokenize(letters, tokenizer, 50, 24), tokenize(prose, tokenizer, 24, 24)]
    (row,) = compared(model, baseline, texts, Row("model"))

    nll: dict = {model: [], baseline: []}
    kl, agreed, common, text_bytes = [], [], [], 0
    for text in texts:
        for window in text.windows:
            p = {}
            for network in (model, baseline):
                with torch.no_grad():
                    p[network] = network(window[None]).logits[0, :-1].softmax(-1)
                nll[network] += [-math.log(p[network][i, token]) for i, token in enumerate(window[1:])]
            q, r = p[baseline], p[model]
            kl += (q * (q / r).log()).sum(1).tolist()
            agreed += (q.argmax(1) == r.argmax(1)).tolist()
            fives = zip(q.topk(5).indices.tolist(), r.topk(5).indices.tolist())
            common += [len(set(one) & set(other)) / 5 for one, other in fives]
            text_bytes += len(window) - 1  # every character here is one byte
    mean = {network: sum(values) / len(values) for network, values in nll.items()}
    result = combine([one.score for one in row.select()])
    assert len(kl) == 50 - 3 + 23
    assert result["nll_nats"] == pytest.approx({"model": mean[model], "baseline": mean[baseline]}, rel=1e-9)
    assert result["perplexity"]["model"] == pytest.approx(math.exp(mean[model]), rel=1e-9)
    assert result["perplexity_ratio"] == pytest.approx(math.exp(mean[model]) / math.exp(mean[baseline]), rel=1e-9)
    differences = torch.tensor(nll[model]) - torch.tensor(nll[baseline])
    error = result["perplexity_ratio"] * differences.std(correction=0).item() / len(kl) ** 0.5
    assert result["perplexity_ratio_error"] == pytest.approx(error, rel=1e-5)
    assert result["kl_nats"] == pytest.approx(sum(kl) / len(kl), rel=1e-9)
    assert result["top1_agreement"] == sum(agreed) / len(agreed)
    assert result["top5_agreement"] == pytest.approx(sum(common) / len(common), rel=1e-12)
    bits = sum(nll[model]) / math.log(2) / text_bytes
    assert result["bits_per_byte"]["model"] == pytest.approx(bits, rel=1e-9)


def test_a_model_equals_itself(make_pair, tokenizer, letters):
    _, baseline = make_pair()
    (row,) = compared(baseline, baseline, [tokenize(letters, tokenizer, 40, 20)], Row("model"))
    result = combine([one.score for one in row.select()])
    assert result["perplexity_ratio"] == 1 and result["top1_agreement"] == 1 and result["kl_nats"] < 1e-12
    assert all(one.spikes is None for one in row.select())


def test_without_a_baseline_there_is_nothing_to_compare(make_pair, tokenizer, letters):
    model, baseline = make_pair()
    text = tokenize(letters, tokenizer, 40, 20)
    alone, paired = compared(model, None, [text], Row("model")), compared(model, baseline, [text], Row("model"))
    one, both = (combine([m.score for m in row.select()]) for (row,) in (alone, paired))
    assert one.keys() == both.keys()
    for key in ("nll_nats", "perplexity", "bits_per_byte"):
        assert one[key]["model"] == pytest.approx(both[key]["model"], rel=1e-12) and one[key]["baseline"] is None
    assert one["kl_nats"] is one["perplexity_ratio"] is one["top1_agreement"] is one["top5_agreement"] is None


def test_one_baseline_pass_serves_all_rows(make_pair, tokenizer, letters):
    model, baseline = make_pair()
    calls = []
    baseline.register_forward_hook(lambda *_: calls.append(1))
    text = tokenize(letters, tokenizer, 64, 16)
    first, second = compared(model, baseline, [text], Row("a"), Row("b", windows=[2]))
    assert len(calls) == 4
    assert len(first.select()) == 4 and len(second.select()) == 2
    assert first.select(0, [2]) == second.select()


def test_bfloat16_is_compared_in_float32(make_pair, tokenizer, letters):
    model, baseline = make_pair(torch.bfloat16)
    (row,) = compared(model, baseline, [tokenize(letters, tokenizer, 32, 32)], Row("model"))
    window = tokenize(letters, tokenizer, 32, 32).windows[0]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:])
    assert combine([one.score for one in row.select()])["nll_nats"]["model"] == pytest.approx(expected.item(), rel=1e-5)


def test_different_vocabularies_are_refused(make_pair, tokenizer, letters):
    model, _ = make_pair()
    _, other = make_pair(vocab_size=101)
    with pytest.raises(ValueError, match="vocabulary of 97 and its baseline one of 101"):
        compared(model, other, [tokenize(letters, tokenizer, 16, 16)], Row("model"))


def test_logits_that_are_not_finite_are_refused(make_pair, tokenizer, letters):
    model, baseline = make_pair()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        compared(model, baseline, [tokenize(letters, tokenizer, 16, 16)], Row("model"))


def test_an_enormous_loss_has_no_perplexity():
    score = WindowScore(2, text_bytes=2, nll=4000.0, baseline_nll=2.0, kl=4000.0, agreed=0, squares=8e6)
    result = combine([score])
    assert result["perplexity"]["model"] is None and result["perplexity_ratio"] is None
    assert result["nll_nats"]["model"] == 2000.0


def test_merging_weighs_by_tokens():
    entries = [
        {"tokens": 10, "max_count": 3, "slots": [3, 4], "site": "o", "rate": {"unary": 1.0}},
        {"tokens": 30, "max_count": 2, "slots": [3, 4], "site": "o", "rate": {"unary": 2.0}},
    ]
    assert merge(entries) == {"tokens": 40, "max_count": 3, "slots": [3, 4], "site": "o", "rate": {"unary": 1.75}}
