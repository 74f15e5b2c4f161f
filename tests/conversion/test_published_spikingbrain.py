"""Imported SpikingBrain checkpoints against the published forward pass, in float64, and their way back."""

import json

import pytest
import torch
from safetensors import safe_open

from spikelm import SpikeLMForCausalLM, presets
from spikelm.conversion.importing import export_checkpoint, import_checkpoint
from spikelm.conversion.published import KINDS
from spikelm.grid import codes_of
from spikelm.spiking.site import spike_groups
from tests.conversion.spikingbrain import (
    GROUP,
    SIZES,
    published_config,
    published_forward,
    published_tensors,
    write_published,
)

LENGTH = 24
KIND = {False: "spikingbrain-7b", True: "spikingbrain-w8aspike"}


def imported(tmp_path, tensors, w8, config=None):
    source = write_published(tmp_path / "published", tensors, config)
    import_checkpoint(KIND[w8], source, tmp_path / "ours", progress=False)
    return tmp_path / "ours"


def load(folder, dtype=torch.float64):
    model, info = SpikeLMForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def stored(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("w8", [False, True], ids=["float", "w8aspike"])
@pytest.mark.parametrize("prefill", [1, 4, 7, 17, LENGTH])
@torch.no_grad()
def test_forward_is_the_published_one(w8, prefill, tmp_path):
    """Read at once and token by token, inside the window of 6, at its edge and beyond."""
    tensors = published_tensors(w8, on_grid=False)
    model = load(imported(tmp_path, tensors, w8))
    ids = torch.randint(0, SIZES["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(1))
    counts = []
    for group in spike_groups(model):
        group.site.observers.append(lambda site, s, *_: counts.append(s[0]))
    out = model(ids[None, :prefill], use_cache=True)
    logits, parts = [out.logits], [counts[:]]
    for t in range(prefill, LENGTH):
        counts.clear()
        out = model(ids[None, t : t + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
        parts.append(counts[:])
    expected, expected_counts = published_forward(tensors, ids, prefill, w8)
    assert expected.std() > 0.3, "the logits say too little"
    assert (torch.cat(logits, 1)[0] - expected).abs().max() < 1e-9
    assert len(expected_counts) == (12 if w8 else 0)
    for index, theirs in enumerate(expected_counts):
        assert torch.equal(torch.cat([part[index] for part in parts]), theirs)


@torch.no_grad()
def test_the_window_that_is_one_too_wide_matters():
    tensors = published_tensors()
    ids = torch.arange(LENGTH)
    wide, _ = published_forward(tensors, ids, LENGTH)
    exact, _ = published_forward(tensors, ids, 0)
    assert torch.equal(wide[:6], exact[:6]) and (wide - exact)[6:].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("pickled", "files"), [(True, 3), (False, 1), (False, 4)])
def test_export_gives_back_every_bit(pickled, files, dtype, tmp_path):
    tensors = published_tensors(dtype=dtype)
    source = write_published(tmp_path / "published", tensors, files=files, pickled=pickled)
    record = import_checkpoint("spikingbrain-7b", source, tmp_path / "ours", progress=False)
    export_checkpoint("spikingbrain-7b", tmp_path / "ours", tmp_path / "back", progress=False)
    back = stored(tmp_path / "back")
    assert set(back) == set(tensors) and record["keys"] == {"source_tensors": 59, "filled": 59, "new": 0}
    assert all(back[name].dtype is dtype and torch.equal(bits(back[name]), bits(tensors[name])) for name in tensors)


def test_export_of_w8aspike_gives_back_every_bit_on_the_grid(tmp_path):
    tensors = published_tensors(w8=True)
    ours = imported(tmp_path, tensors, w8=True)
    export_checkpoint("spikingbrain-w8aspike", ours, tmp_path / "back", progress=False)
    back = stored(tmp_path / "back")
    assert set(back) == set(tensors) and len(tensors) == 87
    assert all(torch.equal(bits(back[name]), bits(tensors[name])) for name in tensors)
    note = json.loads((ours / "conversion.json").read_text())["notes"][0]
    assert "(0 of " in note and "grid" in note


def test_weights_off_the_grid_are_moved_once_and_that_is_said(tmp_path):
    tensors = published_tensors(w8=True, on_grid=False)
    ours = imported(tmp_path, tensors, w8=True)
    export_checkpoint("spikingbrain-w8aspike", ours, tmp_path / "back", progress=False)
    back = stored(tmp_path / "back")
    moved = {name for name in tensors if not torch.equal(bits(back[name]), bits(tensors[name]))}
    rounded = {name for name in tensors if f"{name}_quantizer.scales" in tensors and "down_proj" not in name}
    assert moved == rounded
    for name in rounded:
        scales = tensors[f"{name}_quantizer.scales"]
        theirs, again = (t[name].view(len(scales), -1, GROUP) / scales for t in (tensors, back))
        assert torch.equal(theirs.round(), again.round()) and theirs.abs().max() > 128
    record = json.loads((ours / "conversion.json").read_text())
    count = sum(int((back[name] != tensors[name]).sum()) for name in rounded)
    assert f"({count} of " in record["notes"][0] and record["notes"][0] in (ours / "README.md").read_text()
    import_checkpoint("spikingbrain-w8aspike", tmp_path / "back", tmp_path / "twice", progress=False)
    first, second = stored(ours), stored(tmp_path / "twice")
    assert all(torch.equal(bits(second[name]), bits(first[name])) for name in first)


@torch.no_grad()
def test_products_behind_sites_are_integer_sums(tmp_path):
    """y = V sum_g scale_g sum s c + b, with the integers and scales that the imported model holds."""
    model = load(imported(tmp_path, published_tensors(w8=True), w8=True))
    results = {}
    for group in spike_groups(model):
        group.site.observers.append(lambda site, s, v, _, path=group.path: results.update({path: (s, v)}))
        for name, linear in group.readers.items():
            linear.register_forward_hook(lambda m, x, y, key=(group.path, name): results.update({key: y}))
    model(torch.arange(10)[None])
    checked = 0
    for group in spike_groups(model):
        counts, threshold = results[group.path]
        for name, linear in group.readers.items():
            codes, scales = codes_of(linear), linear.grid.scales
            assert codes.dtype is torch.int16 and scales.dtype is torch.float32
            groups = codes.long().view(len(codes), -1, GROUP)
            sums = torch.einsum("btgi,ogi->btog", counts.long().unflatten(-1, (-1, GROUP)), groups)
            y = threshold * (scales.double() * sums).sum(-1) + (0 if linear.bias is None else linear.bias)
            # The float weight is a float32 product: one rounding of 2^-24 away from scale times code.
            torch.testing.assert_close(results[group.path, name], y, rtol=0, atol=1e-5)
            checked += 1
    assert checked == 4 * 6 + 2


def test_scales_and_thresholds_stay_float32_in_a_bfloat16_model(tmp_path):
    ours = imported(tmp_path, published_tensors(w8=True), w8=True)
    model = load(ours, torch.bfloat16)
    layer = model.model.layers[0]
    assert layer.ffn.gate_proj.weight.dtype is torch.bfloat16
    assert torch.equal(layer.ffn.gate_proj.grid.scales, stored(ours)["model.layers.0.ffn.gate_proj.grid.scales"])
    assert layer.mixer.qkv_site.k.dtype is torch.float32
    with pytest.raises(ValueError, match="Load the model in float32"):
        codes_of(layer.ffn.gate_proj)


@pytest.mark.parametrize("w8", [False, True], ids=["float", "w8aspike"])
def test_configuration_goes_there_and_back(w8, tmp_path):
    stated = published_config(attn_layers=[0, 3], attention_dropout=0.1, norm_eps=1e-5)
    fields = KINDS[KIND[w8]].fields(stated, {})
    assert fields["mixers"] == ["swa", "gla", "gla", "swa"] and fields["attention_window"] == SIZES["sliding_window"]
    back = KINDS[KIND[w8]].config(SpikeLMForCausalLM.config_class(**fields))
    assert {k: back[k] for k in stated if k in back} == {k: stated[k] for k in stated if k in back}
    assert set(stated) - set(back) == {"auto_map", "attn_mode"}, "code of the release, and its choice of kernels"


@pytest.mark.parametrize(("kind", "preset"), [("spikingbrain-7b", ""), ("spikingbrain-w8aspike", "-w8aspike")])
def test_defaults_of_the_release_are_the_preset(kind, preset):
    config = presets.get(f"spikingbrain-7b{preset}")
    assert type(config)(**KINDS[kind].fields({"model_type": "gla_swa"}, {})).to_dict() == config.to_dict()
