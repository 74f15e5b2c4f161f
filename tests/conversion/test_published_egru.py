"""Imported EvNN language models against the published forward pass, in float64, and their way back."""

import pytest
import torch
from safetensors.torch import load_file

from spikelm import SpikeLMConfig, SpikeLMForCausalLM
from spikelm.cache import CACHE_NAME
from spikelm.cli import main
from spikelm.conversion.importing import export_checkpoint, import_checkpoint
from spikelm.spiking.site import spike_groups

KIND, VOCABULARY, WIDTH, SIZES = "evnn-egru-lm", 61, 24, [40, 32, 24]


def published_tensors(seed=0):
    """Name -> tensor of a random checkpoint in the published layout; embedding and decoder are one tensor."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {"embeddings.weight": normal(VOCABULARY, WIDTH)}
    for i, (inputs, size) in enumerate(zip([WIDTH, *SIZES], SIZES)):
        cell = {
            "kernel": normal(inputs, 3 * size) * (2 / inputs) ** 0.5,
            "recurrent_kernel": normal(size, 3 * size) * size**-0.5,
            "bias": 0.3 * normal(3 * size),
            "recurrent_bias": 0.3 * normal(3 * size),
            "dampening_factor": torch.tensor([3.6]),
            "pseudo_derivative_support": torch.tensor([3.6]),
            "thr": torch.rand(size, generator=generator) ** 4,
            "_max_norm": torch.tensor([0.1]),
        }
        tensors |= {f"rnns.{i}.{name}": tensor for name, tensor in cell.items()}
    tensors["decoder.decoder.weight"] = tensors["embeddings.weight"]
    tensors["decoder.decoder.bias"] = normal(VOCABULARY)
    return tensors


def published_forward(tensors, ids, windows):
    """Logits `[T, vocabulary]` and events per cell, float64; as in the benchmark, a window begins with c = 0."""
    P = {name: tensor.double() for name, tensor in tensors.items()}
    ys = [torch.zeros(size, dtype=torch.float64) for size in SIZES]
    logits, events = [], []
    for window in ids.split(windows):
        cs = [torch.zeros(size, dtype=torch.float64) for size in SIZES]
        for token in window:
            x = P["embeddings.weight"][token]
            for i in range(len(SIZES)):
                a = (x @ P[f"rnns.{i}.kernel"] + P[f"rnns.{i}.bias"]).chunk(3)
                q = (ys[i] @ P[f"rnns.{i}.recurrent_kernel"] + P[f"rnns.{i}.recurrent_bias"]).chunk(3)
                z, r = torch.sigmoid(a[0] + q[0]), torch.sigmoid(a[1] + q[1])
                full = z * cs[i] + (1 - z) * torch.tanh(a[2] + r * q[2])
                fires = (full > P[f"rnns.{i}.thr"]).double()
                ys[i], cs[i] = fires * full, full - fires * P[f"rnns.{i}.thr"]
                x = ys[i]
            logits.append(x @ P["decoder.decoder.weight"].T + P["decoder.decoder.bias"])
            events.append([y != 0 for y in ys])
    return torch.stack(logits), [torch.stack(cell) for cell in zip(*events)]


def written(place, tensors):
    """The one file of a release, in the folder it lies in."""
    file = place / "checkpoints" / "EGRU_best_model.cpt"
    file.parent.mkdir()
    torch.save(tensors, file)
    return file


def load(folder):
    model, info = SpikeLMForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(("windows", "drop"), [([24], False), ([9, 14, 1], True)], ids=["carried", "benchmark"])
@torch.no_grad()
def test_forward_is_the_published_one(windows, drop, tmp_path):
    """At once with both states; and in windows that begin without the internal state, as the benchmark evaluates."""
    tensors = published_tensors()
    import_checkpoint(KIND, written(tmp_path, tensors), tmp_path / "ours", progress=False, egru_drop_internal=drop)
    model = load(tmp_path / "ours")
    ids = torch.randint(0, VOCABULARY, (24,), generator=torch.Generator().manual_seed(1))
    groups, seen, cache, logits = list(spike_groups(model)), {}, None, []
    for group in groups:
        group.site.observers.append(lambda site, counts, *_: seen.setdefault(site, []).append(counts[0]))
    for window in ids.split(windows):
        out = model(window[None], cache=cache, use_cache=True)
        cache, logits = out[CACHE_NAME], [*logits, out.logits[0]]
    expected, events = published_forward(tensors, ids, windows)
    assert expected.std() > 0.3, "the logits say too little"
    assert (torch.cat(logits) - expected).abs().max() < 1e-9
    for group, theirs in zip(groups, events, strict=True):
        assert torch.equal(torch.cat(seen[group.site]).bool(), theirs) and 0.05 < theirs.double().mean() < 0.95


@torch.no_grad()
def test_dropping_the_internal_state_matters():
    ids = torch.arange(24)
    whole, windows = (published_forward(published_tensors(), ids, w)[0] for w in ([24], [9, 15]))
    assert torch.equal(whole[:9], windows[:9]) and (whole - windows)[9:].abs().max() > 1e-3


@pytest.mark.parametrize("drop", [False, True])
def test_export_gives_back_every_bit(drop, tmp_path):
    tensors = published_tensors()
    source = written(tmp_path, tensors)
    record = import_checkpoint(KIND, source, tmp_path / "ours", progress=False, egru_drop_internal=drop)
    assert record["keys"] == {"source_tensors": 27, "filled": 17, "new": 0}
    assert f"egru_drop_internal is {drop}: the checkpoint does not state it" in record["notes"][0]
    assert "(0 of " in record["notes"][1] and "lm_head.weight" not in load_file(tmp_path / "ours/model.safetensors")
    export_checkpoint(KIND, tmp_path / "ours", tmp_path / "back", progress=False)
    back = torch.load(tmp_path / "back" / source.name, weights_only=True)
    assert set(back) == set(tensors) and not (tmp_path / "back" / "config.json").exists()
    for name, tensor in tensors.items():
        assert back[name].dtype is tensor.dtype and torch.equal(back[name].view(torch.int32), tensor.view(torch.int32))
    import_checkpoint(KIND, tmp_path / "back", tmp_path / "again", progress=False)  # the folder will do, too


def test_training_numbers_of_another_recipe_are_replaced_and_that_is_said(tmp_path):
    tensors = published_tensors()
    tensors["rnns.1._max_norm"], tensors["rnns.2.dampening_factor"] = torch.tensor([2.0]), torch.tensor([0.7])
    record = import_checkpoint(KIND, written(tmp_path, tensors), tmp_path / "ours", progress=False)
    assert "(2 of " in record["notes"][1] and "training alone" in record["notes"][1]


def test_the_command_takes_the_choice(tmp_path):
    source = written(tmp_path, published_tensors())
    assert main(["import", KIND, str(source), str(tmp_path / "ours"), "--egru-drop-internal"]) == 0
    assert SpikeLMConfig.from_pretrained(tmp_path / "ours").egru_drop_internal


def test_a_model_of_another_architecture_is_not_written(tmp_path):
    import_checkpoint(KIND, written(tmp_path, published_tensors()), tmp_path / "ours", progress=False)
    config = SpikeLMConfig.from_pretrained(tmp_path / "ours")
    config.eos_token_id, config.egru_zoneout = 1, 0.1
    config.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"differs in egru_zoneout \(0.1, the format has 0.0\)"):
        export_checkpoint(KIND, tmp_path / "ours", tmp_path / "back", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.projection.weight": torch.ones(24, 24)}, "has a projection in front of its decoder"),
        ({"decoder.decoder.weight": torch.ones(61, 24)}, "differs from decoder.decoder.weight; expected one tied"),
        ({"rnns.0.thr": torch.full((40,), -3.7)}, r"rnns.0.thr .* lie in \[-3.7, -3.7\]; expected \[0, 1\]"),
        ({"rnns.2.thr": None, "rnns.2.thr_reparam": torch.ones(24)}, "does not: rnns.2.thr_reparam; and lacks 1"),
        ({"rnns.2.recurrent_kernel": None}, r"last hidden_size \(24\); got \[40, 32\]"),
        ({"rnns.0.recurrent_kernel": None}, "lacks rnns.0.recurrent_kernel"),
        ({"rnns.1.kernel": torch.ones(40, 95)}, r"rnns.1.kernel .* \[40, 95\]"),
        ({"rnns.1.kernel": torch.ones(40, 96, dtype=torch.float16)}, "rnns.1.kernel .* is float16; .* is float32"),
    ],
)
def test_what_is_no_published_checkpoint_is_refused(change, message, tmp_path):
    tensors = {name: tensor for name, tensor in (published_tensors() | change).items() if tensor is not None}
    source = written(tmp_path, tensors)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(KIND, source, tmp_path / "ours", progress=False)
    assert not (tmp_path / "ours").exists()
