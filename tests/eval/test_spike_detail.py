"""The part `spikes`: every number against a computation of a few lines."""

import json

import matplotlib
import pytest
import torch
from tqdm import tqdm

from report_keys import documented_keys, written_keys
from small_models import EVERY_SITE, PATTERNS, SITES, small_model
from spikelm import prepare_for_inference
from spikelm.eval import spike_detail
from spikelm.eval.data import Text, tokenize
from spikelm.eval.evaluate import evaluate
from spikelm.eval.parts import Subject
from spikelm.eval.spike_counts import ProductCounts, linear_rows, watched_channels
from spikelm.kernels.weight_rows import FORMATS, Rows, Table, pack_rows, pack_table, stored_bytes
from spikelm.spiking import SpikeStatistics, spike_groups

SMALL = spike_detail.Settings(tokens=40, window=20)


def measured(model, tokenizer, prose, baseline=None, settings=SMALL):
    subject = Subject(model, baseline, tokenizer, [prose], prose)
    with torch.no_grad():
        return spike_detail.measure(subject, settings, tqdm(disable=True), {})


@torch.no_grad()
def recorded(model, run):
    """path -> counts `[B, T, width]` or `[n, width]` of every pass."""
    seen = {}
    for group in spike_groups(model):
        group.site.observers.append(lambda s, c, v, x, path=group.path: seen.setdefault(path, []).append(c.clone()))
    run()
    for group in spike_groups(model):
        group.site.observers.clear()
    return seen


def test_the_documented_keys_are_the_written_keys(make_pair, tokenizer, prose):
    model, baseline = make_pair(num_hidden_layers=1)
    written = written_keys(json.loads(json.dumps(measured(model, tokenizer, prose, baseline))), "spikes")
    assert written == documented_keys("spikes")


def test_positions_histograms_and_channels_by_hand(make_pair, tokenizer, prose):
    model, _ = make_pair(num_hidden_layers=2, spike_k=9.0)
    windows = tokenize(prose, tokenizer, 40, 20).windows
    seen = recorded(model, lambda: [model(window[None]) for window in windows])
    result = measured(model, tokenizer, prose)
    assert result["tokens"] == 40
    for row in result["positions"]:
        counts = torch.cat([c[0, row["first"] : row["last"] + 1] for c in seen[row["path"]]]).abs()
        assert row["tokens"] == len(counts)
        assert row["silent_share"] == pytest.approx(float((counts == 0).double().mean()), rel=1e-12)
        assert row["firing_rate"]["unary"] == pytest.approx(float(counts.double().mean()), rel=1e-12)
        assert row["clipped_share"]["4"] == pytest.approx(float((counts > 15).double().mean()), rel=1e-12)
        assert row["max_count"] == counts.max()
    firsts = sorted({(row["first"], row["last"]) for row in result["positions"]})
    assert firsts == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]

    for site in result["sites"]:
        counts = torch.cat([c[0] for c in seen[site["path"]]])
        assert site["dead_channels"] == int((counts == 0).all(0).sum())
        assert site["always_active_channels"] == int((counts != 0).all(0).sum())
        assert site["overflowing_channels"] == int(((counts.abs() > 15).double().mean(0) > 0.5).sum())
        assert site["levels"] == 2 * counts.abs().max() + 1 and 2 ** (site["bits"] - 1) < site["levels"]
        assert site["levels"] <= 2 ** site["bits"]
    for row in result["histograms_by_site"]:
        paths = [site["path"] for site in result["sites"] if site["site"] == row["site"]]
        values = torch.cat([c.flatten() for path in paths for c in seen[path]])
        for one in row["bins"]:
            assert one["inputs"] == int(((values >= one["low"]) & (values <= one["high"])).sum())
        assert sum(one["inputs"] for one in row["bins"]) == len(values)
        assert sum(one["share"] for one in row["bins"]) == pytest.approx(1)
    assert any(one["high"] > 16 for row in result["histograms_by_layer"] for one in row["bins"])


def test_operations_and_bytes_by_hand(make_pair, tokenizer, prose):
    model, baseline = make_pair(num_hidden_layers=1, mixers="gla", spike_sites=["qkv", "down"])
    window = tokenize(prose, tokenizer, 20, 20).windows[0]
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0][0]}))
    result = measured(model, tokenizer, prose, baseline, spike_detail.Settings(tokens=20, window=20))
    counts = {path: c[0][0] for path, c in recorded(model, lambda: model(window[None])).items()}
    linears, behind = dict(model.named_modules()), {}
    for group in spike_groups(model):
        prefix = group.path.rpartition(".")[0]
        behind |= {f"{prefix}.{name}": group.path for name in group.readers}
    real = sum(int((x != 0).sum()) * linears[n].out_features for n, x in inputs.items() if n not in behind) / 20
    unary = sum(float(counts[path].abs().sum()) * linears[n].out_features for n, path in behind.items()) / 20
    rows = [row for row in result["operations"] if row["network"] == "model"]
    assert sum(row["macs"] for row in rows if row["kind"] in ("float_fed", "head")) == pytest.approx(real)
    assert next(row["acs"]["unary"] for row in rows if row["kind"] == "spike_fed") == pytest.approx(unary)
    assert result["totals"]["synops_per_token"]["unary"] == pytest.approx(unary)
    dense = sum(row["dense_macs"] for row in result["operations"] if row["kind"] in ("spike_fed", "float_fed", "head"))
    assert dense == sum(m.weight.numel() for n in (model, baseline) for m in n.modules() if type(m) is torch.nn.Linear)

    fp32 = next(row for row in result["weight_bytes"] if row["format"] == "fp32")
    touched = sum(
        4 * (20 if name == "lm_head" else float((x != 0).sum()) / x.shape[1]) * linears[name].weight.numel() / 20
        for name, x in inputs.items()
    )
    assert fp32["event_driven"] == pytest.approx(touched) and fp32["event_driven"] < fp32["dense"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("inputs, outputs, group", [(7, 5, 4), (130, 9, 128)])
def test_bytes_are_those_of_stored_weights(format, inputs, outputs, group):
    weight = torch.randn(outputs, inputs)
    assert sum(stored_bytes(Rows, format, inputs, outputs, group)) == pack_rows(weight, format, group).nbytes
    if group % 2 == 0:
        assert sum(stored_bytes(Table, format, inputs, outputs, group)) == pack_table(weight, format, group).nbytes


@torch.no_grad()
def test_padding_is_left_out(make_pair):
    model, _ = make_pair(num_hidden_layers=1, mixers="gla", ffns="moe", moe_experts=2)
    ids, mask = torch.randint(97, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0

    def run(passes):
        with (
            ProductCounts(model) as counts,
            SpikeStatistics(model, True) as spikes,
            watched_channels(model) as channels,
        ):
            for inputs in passes:
                model(**inputs)
        shown = {path: channel.row(dict(model.named_modules())[path]) for path, channel in channels.items()}
        return counts.tokens, linear_rows(counts, spikes), spikes.by_position(), shown

    padded = run([{"input_ids": ids, "attention_mask": mask}])
    plain = run([{"input_ids": ids[:1, 5:]}, {"input_ids": ids[1:]}])
    assert padded[0] == plain[0] == 19
    for one, other in zip([*padded[1], *padded[2]], [*plain[1], *plain[2]], strict=True):
        for key, value in one.items():
            assert value == (pytest.approx(other[key]) if isinstance(value, (float, dict)) else other[key])
    assert padded[3] == plain[3]


def test_experts_count_for_the_tokens_that_they_get(tokenizer, prose):
    model = small_model(num_hidden_layers=1, ffns="moe", moe_experts=3, moe_top_k=2, spike_sites=SITES)
    result = measured(model, tokenizer, prose)
    shares = [row["tokens_share"] for row in result["sites"] if ".experts." in row["path"] and row["site"] == "down"]
    assert sum(shares) == pytest.approx(2)
    spike_fed = next(row for row in result["operations"] if row["kind"] == "spike_fed")
    assert result["totals"]["synops_per_token"]["bitwise"] == pytest.approx(spike_fed["acs"]["bitwise"])
    assert not any(".experts." in row["path"] for row in result["positions"])


@pytest.mark.parametrize("name", ["lif", "dsn", "egru-stack", "hgrn", "rwkv7", "window_linear", "no-sites", "prepared"])
def test_every_kind_of_model_is_measured(name, tokenizer, prose):
    changes = PATTERNS.get(name, {"mixers": "swa"})
    changes = changes | {"num_hidden_layers": 1, "spike_sites": [] if name == "no-sites" else EVERY_SITE}
    changes.pop("egru_form", None)
    model = small_model(torch.float32, **changes)
    if name == "prepared":
        model = prepare_for_inference(model, "int8", "always")
    result = measured(model, tokenizer, prose)
    page = "\n".join(spike_detail.page(result))
    assert "MACs" in page and "nan" not in page and "None" not in page
    assert spike_detail.summary(result)["int8 weights, event-driven (MB per token)"] > 0
    assert all(row["macs"] <= row["dense_macs"] for row in result["operations"])
    fields = ("sites", "positions", "histograms_by_site")
    assert all(bool(result[field]) == (name != "no-sites") for field in fields)
    if name == "no-sites":
        assert result["totals"]["silent_share"] is None and spike_detail.figures(result) == {}
    if name == "egru-stack":
        assert {row["kind"] for row in result["sites"]} == {"events", "code"}


def test_pages_and_pictures_are_written(make_pair, tokenizer, prose, tmp_path):
    model, baseline = make_pair(torch.float32, num_hidden_layers=2)
    settings = {"spikes": {"tokens": 40, "window": 20}}
    parts = ["spikes", "energy"]
    report = evaluate(model, baseline, tokenizer, [prose], parts=parts, settings=settings, out=tmp_path, progress=False)
    assert [part["status"] for part in report["parts"]] == ["finished", "finished"]
    text = (tmp_path / "report.md").read_text()
    for name in ("spike_layers.png", "spike_positions.png", "spike_counts.png", "energy.png"):
        assert f"({name})" in text and matplotlib.image.imread(tmp_path / name).std() > 0.05


def test_it_needs_text_enough(make_pair, tokenizer):
    model, _ = make_pair(num_hidden_layers=1)
    with pytest.raises(ValueError, match="too short"):
        measured(model, tokenizer, Text("short", "It fires.", "here"))
