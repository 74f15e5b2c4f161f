import pytest
import torch
from matplotlib import rcParams

from spikelm.eval import plots
from spikelm.spiking import spike_groups


def test_a_raster_shows_the_trains_of_the_prompt(make_pair, tokenizer):
    model, _ = make_pair(num_hidden_layers=1, hidden_size=32)
    seen = {}
    group = next(g for g in spike_groups(model) if g.name == "qkv")
    group.site.observers.append(lambda site, counts, threshold, context: seen.update(counts=counts))
    before = dict(rcParams)
    figure = plots.raster(model, tokenizer, "silent $ neuron $")
    assert dict(rcParams) == before and len(group.site.observers) == 1
    panel = next(ax for ax in figure.axes if "qkv" in ax.get_title())
    image = panel.images[0].get_array()
    counts = seen["counts"][0].clamp(-15, 15)  # [tokens, channels]
    assert image.shape == (32, 4 * 17)
    weights = torch.tensor([8, 4, 2, 1])
    decoded = (torch.from_numpy(image.data).view(32, 17, 4) * weights).sum(-1)
    assert torch.equal(decoded.T.double(), counts)
    bottom = figure.axes[-1]
    assert [label.get_text() for label in bottom.get_xticklabels()][:3] == ["s", "i", "l"]


def test_a_raster_needs_sites_and_tokens(make_pair, tokenizer):
    model, baseline = make_pair(num_hidden_layers=1)
    for network, prompt in ((baseline, "a"), (model, "")):
        with pytest.raises(ValueError, match="needs a model with spike sites and a prompt"):
            plots.raster(network, tokenizer, prompt)


@pytest.mark.parametrize("code", ["binary", "ternary", "twos_complement"])
def test_a_raster_draws_every_code(make_pair, tokenizer, code):
    model, _ = make_pair(num_hidden_layers=1, spike_code=code)
    image = plots.raster(model, tokenizer, "silent").axes[0].images[0].get_array()
    assert image.any() and (image.min() >= 0) == (code != "ternary")


def point(family, target, share, ratio):
    return {"family": family, "target_silent_share": target, "silent_share_reads": share, "perplexity_ratio": ratio,
            "perplexity_ratio_error": 0.01, "tokens": 2048}  # fmt: skip


def test_a_curve_draws_every_family_that_was_measured():
    points = [
        point("calibrated", 0.3, 0.31, 1.05),
        point("calibrated", 0.2, 0.2, 1.02),
        point("teal", 0.3, 0.3, None),
        point("int_k", None, 0.1, 0.99),
    ]
    (ax,) = plots.curve({"curve": points}).axes
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in ax.containers}
    assert lines == {"calibrated allocation": [[0.2, 1.02], [0.31, 1.05]], "int-k ANN, as many levels": [[0.1, 0.99]]}
    low, high = ax.get_ylim()
    assert low < 0.99 and high > 1.05


def test_labels_show_white_space_and_are_cut():
    assert plots._shown(" a\n") == "\u00b7a\\n"
    assert len(plots._shown("x" * 50)) == 14
