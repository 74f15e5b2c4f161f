"""New mixers learn the attention that they replace."""

import json
import weakref

import pytest
import torch
from torch import nn

from spikelm.conversion import transfer as stage
from spikelm.conversion.convert import convert
from spikelm.conversion.families import FAMILIES
from spikelm.conversion.plan import ConversionPlan
from spikelm.conversion.transfer import SHORTEST, fit, learning, losses, run, teacher_of, windows
from spikelm.loading import load_model
from spikelm.spiking.site import spike_groups
from tests.conversion.test_sources import words
from tests.conversion.tiny import MODELS, VOCAB, llama, widened

TARGETS = ["gla", "gla+swa", "window_linear", "delta", "delta+swa", "retention", "swa"]


def text_ids(count: int = 1024) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(1))


def own_config(source):
    return ConversionPlan(mixers="keep", sites="none").apply(FAMILIES[source.config.model_type].fields(source.config))


def converted(source=None, *, mixers="gla+swa", tokens=512, ids=None, **choices):
    choices = {"window": 6} | choices if "swa" in str(mixers) or "window" in str(mixers) else choices
    ids = text_ids() if ids is None else ids
    return convert(
        source or llama(), mixers=mixers, transfer_tokens=tokens, transfer_text=ids, progress=False, **choices
    )


@pytest.mark.parametrize("target", TARGETS)
def test_transfer_lowers_the_loss_of_every_replaced_layer(target):
    model = converted(mixers=["keep", "keep", target, "keep"], sites="none", tokens=2048, ids=text_ids(2560))
    record = model.conversion["transfer"]
    assert list(record["layers"]) == ["2"]
    assert record["layers"]["2"]["after"] < 0.99 * record["layers"]["2"]["before"]
    assert (record["tokens"], record["window"], record["held_out_tokens"]) == (2048, 64, 256)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_teacher_is_the_source(make):
    source = widened(make())
    model, same = (convert(source, mixers=mixers, sites="none", progress=False) for mixers in ("gla", "keep"))
    teacher = teacher_of(model, own_config(source))
    ids = text_ids(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(teacher(ids).logits, same(ids).logits, atol=1e-9, rtol=0)
    owned = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert all(tensor.data_ptr() in owned for tensor in teacher.state_dict().values()), "shared, not copied"


def test_the_loss_is_the_relative_error_at_the_teachers_inputs():
    """Recomputed from outside: the source's own attention, its inputs and its outputs."""
    source = llama()
    model = convert(source, mixers=["keep", "swa", "keep", "gla"], window=5, sites="none", progress=False)
    teacher, seen = teacher_of(model, own_config(source)), {}
    for i in (1, 3):
        source.model.layers[i].self_attn.register_forward_hook(
            lambda _, args, kwargs, out, i=i: seen.update({i: (kwargs["hidden_states"], out[0])}), with_kwargs=True
        )
    rows = text_ids(128).view(2, 64)
    expected = dict.fromkeys((1, 3), 0.0)
    for row in rows:
        with torch.no_grad():
            source(row[None])
            for i, (x, y) in seen.items():
                got = []
                handle = model.model.layers[i].mixer_norm.register_forward_hook(lambda *_, x=x: x)
                catch = model.model.layers[i].mixer.register_forward_hook(lambda _, a, out, got=got: got.append(out))
                model(row[None])
                handle.remove()
                catch.remove()
                expected[i] += float((got[0] - y).square().mean() / y[0].var(0, unbiased=False).mean()) / len(rows)
    with learning(model, [1, 3]) as students:
        got = losses(students, teacher, rows)
    assert got == pytest.approx(expected, rel=0.02)  # products in bfloat16, where there are units for them


def test_only_the_mixers_of_replaced_layers_change():
    source = llama()
    plain = convert(source, mixers=["gla", "keep", "keep", "delta"], progress=False).state_dict()
    learned = converted(source, mixers=["gla", "keep", "keep", "delta"]).state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], learned[name])}
    mixers = ("model.layers.0.mixer.", "model.layers.3.mixer.")
    assert changed == {name for name in plain if name.startswith(mixers) and "_site." not in name}
    for i, layer in enumerate(source.model.layers):
        assert torch.equal(layer.self_attn.q_proj.weight, plain[f"model.layers.{i}.mixer.q_proj.weight"])


def test_spikes_stand_aside_while_mixers_learn_and_are_back_afterwards():
    float_model = converted(mixers="gla", sites="none")
    spiking = converted(mixers="gla")
    assert spiking.conversion["transfer"] == float_model.conversion["transfer"]
    assert all(group.site.substitute is None for group in spike_groups(spiking))
    ids = text_ids(20)[None]
    with torch.no_grad():
        assert not torch.equal(spiking(ids).logits, float_model(ids).logits)


def test_a_window_beside_a_linear_branch_starts_as_the_window_alone():
    ids = text_ids(60).view(2, 30)
    with torch.no_grad():
        alone = convert(llama(), mixers="swa", window=6, progress=False)(ids).logits
        for mixer in ("gla+swa", "swa+delta", "retention+swa"):
            beside = convert(llama(), mixers=mixer, window=6, progress=False)
            torch.testing.assert_close(beside(ids).logits, alone, atol=1e-6, rtol=0)
    branch = converted(sites="none").model.layers[1].mixer.gla
    assert branch.norm.weight.abs().max() > 1e-3, "and learns to add to it"


def test_the_same_conversion_gives_the_same_numbers():
    first, second = converted(), converted()
    assert first.conversion["transfer"] == second.conversion["transfer"]
    for (name, mine), other in zip(first.state_dict().items(), second.state_dict().values()):
        assert torch.equal(mine, other), name


def test_nothing_outlives_its_batch():
    """What a pass read and made is gone at the next one, whatever has been learned from it."""
    source = llama()
    model = convert(source, mixers="gla", sites="none", progress=False)
    teacher, alive, passes = teacher_of(model, own_config(source)), [], []

    def watch(module, args, out):
        passes.append(sum(reference() is not None for reference in alive))
        alive[:] = [weakref.ref(args[0]), weakref.ref(out)]

    teacher.model.layers[2].mixer.register_forward_hook(watch)
    with learning(model, range(4)) as students:
        fit(students, teacher, text_ids(640).view(10, 64), 640, progress=False)
    assert passes == [0] * 10
    assert not any(reference() for reference in alive)


def test_a_pass_ends_behind_the_last_layer_that_learns():
    source = llama()
    model = convert(source, progress=False, sites="none")
    later = []
    model.model.layers[2].register_forward_hook(lambda *_: later.append(1))
    visited = []
    run(model, [0, 1], text_ids(20)[None], lambda i, x, y, context: visited.append((i, x.shape, y.shape)))
    assert visited == [(0, (1, 20, 48), (1, 20, 48)), (1, (1, 20, 48), (1, 20, 48))]
    assert not later and len(model.model.layers) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_those_of_the_conversion(dtype):
    model = converted(mixers="delta", dtype=dtype, sites="none")
    core = model.model.layers[1].mixer.delta
    assert core.norm.weight.dtype == model.model.layers[1].mixer.q_proj.weight.dtype == dtype
    assert core.rates.A_log.dtype == torch.float32
    for entry in model.conversion["transfer"]["layers"].values():
        assert entry["after"] < entry["before"]


def test_windows_to_learn_from_and_to_measure_on_are_disjoint():
    learned, held = windows(torch.arange(1000), 64)
    assert learned.shape == (12, 64) and held.shape == (3, 64)
    assert len(torch.cat([learned, held]).unique()) == 15 * 64
    learned, held = windows(torch.arange(4 * SHORTEST), 64)
    assert learned.shape == (3, SHORTEST) and held.shape == (1, SHORTEST)


def test_texts_of_every_kind():
    names = [f"w{i}" for i in text_ids(600).tolist()]
    whole, first = " ".join(names), " ".join(names[:200])
    ids, cut = torch.tensor(words()(whole)["input_ids"]), len(words()(first)["input_ids"])
    records = [
        converted(ids=text, tokenizer=words(), tokens=128).conversion["transfer"]
        for text in (ids, whole, [first, ids[cut:]])
    ]
    assert [record["text"] for record in records] == ["the token ids given", "the text given", "the text given"]
    assert records[0]["layers"] == records[1]["layers"] == records[2]["layers"]
    assert len({record["text_sha256"] for record in records}) == 3
    own = convert(llama(), mixers="gla", sites="none", transfer_tokens=128, calibration_text=ids, progress=False)
    assert own.conversion["transfer"]["text"] == "the token ids given", "the calibration text, where no other is given"


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"ids": text_ids(4 * SHORTEST - 1)}, "has 63 tokens; expected at least 64"),
        ({"mixers": "keep"}, "replaces no layer"),
        ({"ids": "some text"}, "needs a tokenizer"),
        ({"ids": torch.rand(100)}, "str or token ids"),
        ({"tokens": -1}, "transfer_tokens must be"),
    ],
)
def test_errors_are_one_line(choices, message):
    with pytest.raises(ValueError, match=message) as raised:
        converted(**choices)
    assert "\n" not in str(raised.value)


def test_record_and_card_tell_of_the_transfer(tmp_path):
    out = tmp_path / "model"
    model = converted(tokenizer=words(), out=out)
    record = json.loads((out / "conversion.json").read_text())
    assert record["transfer"] == model.conversion["transfer"]
    assert "512 tokens" in (out / "README.md").read_text()
    assert load_model(out)[0].conversion["transfer"] == record["transfer"]


@torch.no_grad()
def test_new_gates_remember_from_sixteen_to_two_thousand_tokens():
    model = convert(llama(), mixers=["gla", "delta", "gla+swa", "keep"], window=6, progress=False)
    for i in (0, 2):
        gla = model.model.layers[i].mixer.gla
        lives = -torch.log(torch.tensor(2.0)) * 16 / nn.functional.logsigmoid(gla.gate[1].bias)
        lives = lives.view(gla.heads, gla.head_dim)
        assert lives[:, 0] == pytest.approx(16.0, rel=1e-4) and lives[:, -1] == pytest.approx(2048.0, rel=1e-2)
        steps = lives.log().diff(dim=1)
        torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=0.05, atol=0)
    rates = model.model.layers[1].mixer.delta.rates
    lives = -torch.log(torch.tensor(2.0)) / rates(torch.zeros(1, 1, 2))[0, 0]
    torch.testing.assert_close(lives, torch.tensor([16.0, 2048.0]), rtol=1e-3, atol=0)


def test_learning_rate_rises_and_falls(monkeypatch):
    rates = []
    monkeypatch.setattr(stage.Student, "learn", lambda self, x, y, context, share: rates.append(share))
    model = convert(llama(), mixers=["gla", "keep", "keep", "keep"], sites="none", progress=False)
    own = own_config(llama())
    with learning(model, [0]) as students:
        seen = fit(students, teacher_of(model, own), text_ids(640).view(10, 64), 64 * 40, progress=False)
    assert seen == 64 * 40 and len(rates) == 40
    assert rates.index(max(rates)) == 1 and rates[0] < rates[1] and rates[-1] < 0.01
    assert rates[1:] == sorted(rates[1:], reverse=True)
