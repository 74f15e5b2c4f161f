"""Event-based GRUs against straight re-statements of both published cells; events, states, zoneout, initial values."""

import math

import pytest
import torch

from small_models import PATTERNS, SITES, small_config, small_model
from spikelm import SpikeLMForCausalLM
from spikelm.cache import CACHE_NAME
from spikelm.spiking import SpikeStatistics, spike_groups

EXACT = 1e-9
LENGTH = 17


def restated(cell, x, state=None, mask=None, keep_old=0.0):
    """x `[T, inputs]` -> events `[T, H]`, final (c, y), head by head; `mask` 0 or `keep_old` holds the old state."""
    heads, width = cell.recurrent.shape[:2]
    blocks = slice(0, width), slice(width, 2 * width), slice(2 * width, 3 * width)
    thresholds = cell.events.thresholds.double().clamp(0, 1).view(heads, width)
    c, y = torch.zeros(2, heads, width, dtype=x.dtype) if state is None else state.clone().view(2, heads, width)
    out = []
    for t in range(len(x)):
        a = (cell.in_proj.weight @ x[t] + cell.in_proj.bias).view(heads, 3 * width)
        for h in range(heads):
            R, first, second, third = cell.recurrent[h], *(a[h, block] for block in blocks)
            if cell.form == "evnn":
                q = y[h] @ R + cell.recurrent_bias.view(heads, 3 * width)[h]
                z, r = torch.sigmoid(first + q[blocks[0]]), torch.sigmoid(second + q[blocks[1]])
                new = z * c[h] + (1 - z) * torch.tanh(third + r * q[blocks[2]])
            else:
                u, r = torch.sigmoid(first + y[h] @ R[:, blocks[0]]), torch.sigmoid(second + y[h] @ R[:, blocks[1]])
                z = torch.tanh(third + (r * y[h]) @ R[:, blocks[2]])
                new = u * z + (1 - u) * c[h] - y[h]
            held = keep_old if mask is None else 1 - mask[t].double().view(heads, width)[h]
            new = held * c[h] + (1 - held) * new
            fires = new > thresholds[h]
            y[h] = torch.where(fires, new, 0.0)
            c[h] = new - fires * thresholds[h] if cell.form == "evnn" else new
        out.append(y.flatten().clone())
    return torch.stack(out), torch.stack([c.flatten(), y.flatten()])


def watch(model, *names):
    """name -> list of (input, output) of the modules called `names` in layer 0."""
    seen = {name: [] for name in names}
    for name in names:
        module = model.model.layers[0].get_submodule(name)
        module.register_forward_hook(lambda m, args, out, name=name: seen[name].append((args[0], out)))
    return seen


def check(events, expected):
    assert torch.equal(events == 0, expected == 0)
    assert 0.1 < (events == 0).double().mean() < 0.99, "silence and events must both occur"
    assert (events - expected).abs().max() < EXACT


@pytest.mark.parametrize(
    "fields",
    [
        {"egru_heads": 4, "egru_size": 48},
        {"egru_heads": 1},
        {"egru_heads": 1, "egru_form": "paper"},
        {"egru_heads": 2, "egru_form": "paper", "egru_size": 20},
    ],
    ids=["evnn-heads", "evnn", "paper", "paper-heads"],
)
@torch.no_grad()
def test_mixer_follows_the_published_equations(fields):
    model = small_model(mixers="egru", **fields)
    seen = watch(model, "mixer", "mixer.cell")
    out = model(torch.randint(0, 97, (1, LENGTH)), use_cache=True)
    mixer, (x, events), (_, y) = model.model.layers[0].mixer, seen["mixer.cell"][0], seen["mixer"][0]
    expected, state = restated(mixer.cell, x[0])
    check(events[0], expected)
    assert (expected @ mixer.o_proj.weight.T - y[0]).abs().max() < EXACT
    assert (out[CACHE_NAME].layers[0].states["mixer.cell.egru"][0] - state).abs().max() < EXACT


@torch.no_grad()
def test_each_cell_of_a_stack_reads_the_events_of_the_one_before():
    model = small_model(**PATTERNS["egru-stack"])
    seen = watch(model, "mixer")
    ids = torch.randint(0, 97, (1, LENGTH))
    logits = model(ids).logits[0]
    x = model.model.embed_tokens.weight[ids[0]]
    for cell in model.model.layers[0].mixer.cells:
        x, _ = restated(cell, x)
    check(seen["mixer"][0][1][0], x)
    assert (x @ model.lm_head.weight.T + model.lm_head.bias - logits).abs().max() < EXACT


@pytest.mark.parametrize("drop", [False, True])
@torch.no_grad()
def test_the_internal_state_is_carried_or_dropped_between_passes(drop):
    """EvNN's benchmark hands on y alone; by default c survives as well."""
    model = small_model(mixers="egru", egru_drop_internal=drop)
    seen, cache, state, carried = watch(model, "mixer.cell"), None, None, None
    cell = model.model.layers[0].mixer.cell
    for ids in torch.randint(0, 97, (1, LENGTH)).split([5, 1, 4, 7], dim=1):  # one step, too
        cache = model(ids, cache=cache, use_cache=True)[CACHE_NAME]
        x, events = seen["mixer.cell"][-1]
        if state is not None:
            assert state[0].abs().max() > 0.1, "nothing to drop"
            state = torch.stack([state[0] * (not drop), state[1]])
        expected, state = restated(cell, x[0], state)
        _, carried = restated(cell, x[0], carried)
        assert torch.equal(events[0] == 0, expected == 0) and (events[0] - expected).abs().max() < EXACT
    assert ((state - carried).abs().max() > 1e-3) == drop


@pytest.mark.parametrize("form", ["evnn", "paper"])
def test_zoneout_draws_in_training_and_averages_in_evaluation(form):
    model = small_model(mixers="egru", egru_form=form, egru_zoneout=0.3)
    cell, ids, masks = model.model.layers[0].mixer.cell, torch.randint(0, 97, (1, 40)), []
    draw = cell._mask
    cell._mask = lambda a: masks.append(draw(a)) or masks[-1]
    seen = watch(model, "mixer.cell")
    with torch.no_grad():
        model(ids)
        x, events = seen["mixer.cell"][-1]
        check(events[0], restated(cell, x[0], keep_old=0.3)[0])
        assert masks == []
        model.train()
        out = model(ids, use_cache=True)
        x, events = seen["mixer.cell"][-1]
        expected, state = restated(cell, x[0], mask=masks[0][0])
        check(events[0], expected)
        assert masks[0].double().mean().item() == pytest.approx(0.7, abs=0.05)
        model(ids[:, :1], cache=out[CACHE_NAME])  # a single token in training draws, too
        x, events = seen["mixer.cell"][-1]
        assert len(masks) == 2 and (events[0] - restated(cell, x[0], state, masks[1][0])[0]).abs().max() < EXACT


@torch.no_grad()
def test_events_are_counted_with_the_recurrent_weights_they_meet():
    """Silent share and synaptic operations by hand, padding left out."""
    fields = {"egru_heads": 4, "egru_size": 48, "num_hidden_layers": 1, "ffns": "none"}
    model = small_model(mixers="egru", **fields)
    (group,) = spike_groups(model)
    assert group.path == "model.layers.0.mixer.cell.events" and list(group.readers) == ["o_proj"]
    assert group.fan_out == 3 * 12 + 32
    seen, mask = watch(model, "mixer.cell"), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    with SpikeStatistics(model) as statistics:
        model(torch.randint(0, 97, (2, 9)), attention_mask=mask)
    rows = seen["mixer.cell"][0][1][mask.bool()]
    events, summary = (rows != 0).sum().item(), statistics.summary()
    assert summary["silent_share"] == pytest.approx(1 - events / (14 * 48)) and 0 < events < 14 * 48
    assert summary["synops_per_token"]["unary"] == pytest.approx(events * (3 * 12 + 32) / 14)
    weights = 32 * 144 + 48 * 36 + 48 * 32 + 32 * 97  # in, recurrent, out, head
    saved = (14 * 48 - events) / 14 * (3 * 12 + 32)
    assert summary["silent_share_reads_all_weights"] == pytest.approx(saved / weights)
    dense = summary["dense_macs_per_token"]
    assert (dense["linear_attention"], dense["float_fed_linears"]) == (3 * 48, 32 * 144)


def test_readers_of_events():
    stack = small_model(**PATTERNS["egru-stack"])
    assert [(g.path.split("mixer.")[1], list(g.readers), g.fan_out) for g in spike_groups(stack)] == [
        ("cells.0.events", ["cells.1.in_proj"], 3 * 40 + 3 * 24),
        ("cells.1.events", ["cells.2.in_proj"], 3 * 24 + 3 * 32),
        ("cells.2.events", [], 3 * 32),
    ]
    coded = small_model(mixers="egru", num_hidden_layers=1, ffns="none", spike_sites=SITES)
    assert [(g.name, list(g.readers), g.fan_out) for g in spike_groups(coded)] == [
        ("qkv", ["cell.in_proj"], 96),
        ("events", [], 96),  # the site `o` codes them anew
        ("o", ["o_proj"], 32),
    ]


def test_thresholds_beyond_their_range_act_as_its_ends_and_come_back():
    model = small_model(mixers="egru", num_hidden_layers=1).train()
    cell, ids = model.model.layers[0].mixer.cell, torch.randint(0, 97, (2, LENGTH))

    def run(thresholds):
        model.zero_grad()
        cell.events.thresholds.data[:4] = torch.tensor(thresholds)
        out = model(ids, labels=ids)
        out.loss.backward()
        return out.logits, cell.events.thresholds.grad.clone()

    (beyond, gradient), (ends, at_ends) = run([-0.3, -1e-6, 1.2, 7.0]), run([0.0, 0.0, 1.0, 1.0])
    assert torch.equal(beyond, ends) and torch.equal(gradient, at_ends) and gradient[0] != 0


def test_initial_values_are_the_published_ones():
    fields = {"hidden_size": 256, "num_hidden_layers": 2, "egru_size": 512, "egru_heads": 4}
    mixer = SpikeLMForCausalLM(small_config(mixers="egru", **fields)).model.layers[1].mixer
    cell = mixer.cell
    assert cell.in_proj.weight.std().item() == pytest.approx((2 / (256 + 3 * 512)) ** 0.5, rel=0.02)
    assert cell.recurrent.shape == (4, 128, 384)
    assert cell.recurrent.std().item() == pytest.approx((2 / (128 + 384)) ** 0.5, rel=0.02)
    assert mixer.o_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.02)
    assert not cell.in_proj.bias.any() and not cell.recurrent_bias.any()
    thresholds, alpha = cell.events.thresholds, 3 * 0.3 / 0.7
    spread = (alpha * 3 / ((alpha + 3) ** 2 * (alpha + 4))) ** 0.5  # of Beta(alpha, 3)
    assert thresholds.mean().item() == pytest.approx(0.3, abs=0.03) and thresholds.min() >= 0 and thresholds.max() <= 1
    assert thresholds.std().item() == pytest.approx(spread, rel=0.1)


def test_thresholds_stay_float32_in_a_bfloat16_model():
    model = small_model(torch.float32, mixers="egru")
    before = model.model.layers[0].mixer.cell.events.thresholds.clone()
    cell = model.to(torch.bfloat16).model.layers[0].mixer.cell
    assert torch.equal(cell.events.thresholds, before) and cell.recurrent.dtype is torch.bfloat16
    with torch.no_grad():
        states = model(torch.arange(9)[None], use_cache=True)[CACHE_NAME].layers[0].states
    assert states["mixer.cell.egru"].dtype is torch.float32


def test_compiled_without_graph_breaks():
    model = small_model(torch.float32, mixers="egru", use_cache=False, num_hidden_layers=1)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
        assert (compiled - model(ids).logits).abs().max() < 1e-4
