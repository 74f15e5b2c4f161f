"""The decoding benchmark on a tiny random model: what it measures, what it writes, what it leaves behind."""

import json

import pytest
import torch

from small_models import SITES, small_model
from spikelm import prepare_for_inference
from spikelm.eval import bench_decode
from spikelm.eval.bench_decode import Texts, break_even, race, run, silence_curve
from spikelm.eval.decode_profile import WeightBytes, where_time_goes
from spikelm.eval.decoders import ModelDecoder, fastest_dense
from spikelm.inference.prepare import set_events

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 97,
}


def engine(weights="int8", **changes):
    return prepare_for_inference(small_model(torch.float32, spike_sites=SITES, **changes), weights, "always")


def test_the_command_writes_numbers_page_and_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_decode.SHAPES, "1b", TINY)
    run(None, shape="1b", weights=["int8"], batches=[1, 2], contexts=[6, 12], steps=5, quick=True, out=tmp_path)
    report = json.loads((tmp_path / "decode.json").read_text())
    rows = report["formats"]["int8"]["speed"]
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 6), (1, 12), (2, 6)]
    for row in rows:
        for summary in row["contenders"].values():
            assert summary["low_ms"] <= summary["ms"] <= summary["high_ms"]
            assert summary["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / summary["ms"])
    assert [point["silent"] for point in report["formats"]["int8"]["curve"]["points"]] == [0.0, 0.38, 0.7, 0.95]
    page = (tmp_path / "decode.md").read_text()
    assert "| batch | context |" in page and "At 70% silent" in page
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_either_a_model_or_a_shape():
    with pytest.raises(ValueError, match="either a model folder or --shape"):
        run(None, weights=["fp32"], batches=[1], contexts=[8])


class Recorder:
    """A contender that writes down what it reads."""

    batches = None

    def __init__(self, name, log):
        self.name, self.log = name, log

    def start(self, texts):
        self.log.append((self.name, "start", texts.tolist()))

    def step(self, tokens):
        self.log.append((self.name, "step", tokens.tolist()))
        return tokens


def test_contenders_read_the_same_tokens_in_turn():
    log = []
    text = torch.arange(16).view(2, 8)
    spent = race({name: Recorder(name, log) for name in "ab"}, text, context=2)
    steps = [(name, tokens) for name, kind, tokens in log if kind == "step"]
    assert [entry for entry in log if entry[1] == "start"] == [(n, "start", text[:, :2].tolist()) for n in "ab"]
    assert sorted(steps) == sorted((n, text[:, t].tolist()) for t in range(2, 8) for n in "ab")
    assert [name for name, _ in steps[:4]] == ["a", "b", "b", "a"]
    assert {name: len(times) for name, times in spent.items()} == {"a": 3, "b": 3}  # after the warm-up


def test_texts_rotate():
    texts = Texts(torch.arange(100), 20)
    first, second = texts.of(2, 20), texts.of(2, 20)
    assert first.shape == (2, 20) and not (first == second).all(1).any()


def test_weight_bytes_follow_the_silent_share():
    model = engine(spike_dead_zone=0.5)
    ids = torch.randint(0, 97, (1, 20))
    read = WeightBytes(model).of_text(ids)
    products = [m for m in model.modules() if type(m).__name__ == "EventProduct"]
    assert read["head"] == 97 * 32 + 4 * 97
    assert read["never"] == read["head"] + sum(p.data.nbytes + p.scales.nbytes for p in products)
    saved = read["silent_share_reads"] * sum(p.inputs * p.outputs for p in products)
    assert read["never"] - read["always"] == pytest.approx(saved)


def test_the_curve_silences_what_it_says_and_gives_back():
    model = engine()
    never, always = (ModelDecoder(m) for m in (set_events(engine(), "never"), model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    step = always.step

    def look(tokens):
        out = step(tokens)
        steps = model.model.runs[0].prepared[1].steps
        seen.append(torch.cat([(s.call.counts == 0).float().mean()[None] for one in steps for s in one.switches]))
        return out

    always.step = look
    curve = silence_curve(never, always, (0.0, 0.75), Texts(torch.randint(0, 97, (500,)), 30), 6, 5)
    shares = torch.stack(seen).view(2, -1).mean(1)
    assert shares[0] < 0.05 and abs(shares[1] - 0.75) < 0.03
    assert [set(point) for point in curve["points"]] == [{"silent", "never", "always"}] * 2
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "gains, expected",
    [([0.9, 1.1, 1.5], 0.25), ([1.0, 1.2, 2.0], 0.0), ([0.5, 0.6, 0.9], None), ([1.2, 0.9, 1.1], 0.75)],
)
def test_break_even(gains, expected):
    rows = [{"silent": s, "never": {"ms": g}, "always": {"ms": 1.0}} for s, g in zip((0.0, 0.5, 1.0), gains)]
    assert break_even(rows) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("mixers", ["attention", ["gla", "attention", "gla"]])
def test_the_profile_adds_up_and_leaves_no_trace(mixers):
    model = engine(mixers=mixers, spike_dead_zone=0.3)
    text = torch.randint(0, 97, (1, 14))
    before = model(text).logits
    parts = where_time_goes(model, text, 6)
    assert sum(parts.values()) == pytest.approx(2 * parts["total"])
    assert all(parts[name] > 0 for name in ("coding", "state", "head", "total"))
    assert torch.equal(model(text).logits, before)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_the_dense_model_competes_in_its_fastest_way():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**TINY, max_position_embeddings=64)
    decoder, tried = fastest_dense(LlamaForCausalLM(config).eval(), torch.randint(0, 97, (1, 16)))
    best = min(tried, key=tried.get)
    assert len(tried) == 4
    assert f"{str(decoder.model.dtype).removeprefix('torch.')}, {decoder.model.config._attn_implementation}" == best
