"""Imported SpikeGPT and RWKV-4 checkpoints against the published forward pass, in float64, and their way back."""

import json
import re

import pytest
import torch

from small_tokenizer import letters
from spikelm import SpikeCache, SpikeLMConfig, SpikeLMForCausalLM, presets
from spikelm.cli import main
from spikelm.conversion.convert import blank_model
from spikelm.conversion.importing import export_checkpoint, import_checkpoint
from spikelm.conversion.published import KINDS
from spikelm.loading import load_model
from spikelm.spiking.site import spike_groups
from tests.conversion.spikegpt import INNER, LAYERS, VOCABULARY, WIDTH, lif, published_forward, published_tensors, wkv
from tests.conversion.test_sources import Trap

LENGTH = 32


def written(place, tensors, name="model.pth"):
    torch.save(tensors, place / name)
    return place / name


def imported(place, tensors, kind="spikegpt", **choices):
    import_checkpoint(kind, written(place, tensors), place / "ours", progress=False, **choices)
    return place / "ours"


def load(folder):
    model, info = SpikeLMForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def tokens(count, seed=1):
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


class Watch:
    """The spikes of every neuron of a model, over all its passes: `[T, C]` each."""

    def __init__(self, model):
        self.parts = []
        for group in spike_groups(model):
            self.parts.append([])
            group.site.observers.append(lambda site, s, *_, part=self.parts[-1]: part.append(s[0]))

    def take(self):
        spikes = [torch.cat(part) for part in self.parts]
        for part in self.parts:
            part.clear()
        return spikes


def same(ours, theirs):
    """Logits to 1e-9 and exact spikes."""
    (logits, spikes), (expected, fired) = ours, theirs
    assert expected.std() > 0.3, "the logits say too little"
    assert (logits[0] - expected).abs().max() < 1e-9
    assert len(spikes) == len(fired) and all(torch.equal(s, f) for s, f in zip(spikes, fired, strict=True))


def test_the_restatement_gives_the_known_values():
    """One channel each; the values were computed apart from this code and from spikelm."""
    keys = [torch.tensor([k], dtype=torch.float64) for k in (0, 1, -1, 2, 0.5)]
    values = [torch.tensor([v], dtype=torch.float64) for v in (1, -1, 2, 0.5, -0.25)]
    decay, first = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    averages = [wkv(keys[:t], values[:t], decay, first).item() for t in range(1, 6)]
    assert averages == pytest.approx([1, -0.635149, -0.202394, 0.363793, 0.212859], abs=1e-6)
    membrane, spikes = torch.zeros(1), []
    for current in (1, 2, 3, 0.5, 2.5, 1.9):
        fired, membrane = lif(membrane, torch.tensor([current]))
        spikes.append(fired.item())
    assert spikes == [0, 1, 1, 0, 1, 0] and membrane.item() == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("kind", "choices"),
    [("spikegpt", {}), ("spikegpt", {"binary_embedding": False}), ("rwkv4", {})],
    ids=["spikegpt", "spikegpt-raw-embedding", "rwkv4"],
)
@torch.no_grad()
def test_forward_is_the_published_one(kind, choices, tmp_path):
    """Read at once, in two parts, and token by token."""
    tensors, ids, spiking = published_tensors(), tokens(LENGTH), kind == "spikegpt"
    model = load(imported(tmp_path, tensors, kind, **choices))
    binary = spiking and choices.get("binary_embedding", True)
    expected = published_forward(tensors, [ids], spiking, binary)
    assert len(expected[1]) == (2 * LAYERS if spiking else 0)
    for spikes in expected[1]:
        assert 0.05 < spikes.mean() < 0.8
    watch = Watch(model)
    for prefill in (1, 7, LENGTH):
        out = model(ids[None, :prefill], use_cache=True)
        logits = [out.logits]
        for t in range(prefill, LENGTH):
            out = model(ids[None, t : t + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
        same((torch.cat(logits, 1), watch.take()), expected)


@torch.no_grad()
def test_windows_begin_from_zero_states_unless_a_cache_is_carried(tmp_path):
    """The published code resets all states at every window; so do packed documents and fresh caches, not one cache."""
    tensors, first, second = published_tensors(), tokens(13), tokens(17, seed=2)
    whole = torch.cat([first, second])[None]
    reset = published_forward(tensors, [first, second])
    carried = published_forward(tensors, [first, second], carried=True)
    assert torch.equal(reset[0][:13], carried[0][:13])
    assert (reset[0] - carried[0])[13:].abs().amax(1).min() > 1e-2
    assert any(not torch.equal(r, c) for r, c in zip(reset[1], carried[1], strict=True))
    model = load(imported(tmp_path, tensors))
    watch = Watch(model)

    packed = model(whole, cu_seqlens=torch.tensor([0, 13, 30])).logits
    same((packed, watch.take()), reset)
    apart = [model(window[None], cache=SpikeCache(model.config)).logits for window in (first, second)]
    same((torch.cat(apart, 1), watch.take()), reset)
    cache = SpikeCache(model.config)
    one_cache = [model(window[None], cache=cache).logits for window in (first, second)]
    same((torch.cat(one_cache, 1), watch.take()), carried)
    same((model(whole).logits, watch.take()), carried)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["spikegpt", "rwkv4"])
def test_export_gives_back_every_bit(kind, dtype, tmp_path):
    tensors = published_tensors(dtype)
    ours = imported(tmp_path, tensors, kind)
    export_checkpoint(kind, ours, tmp_path / "back", progress=False)
    assert [path.name for path in (tmp_path / "back").iterdir()] == [f"{kind}.pth"]
    back = torch.load(tmp_path / "back" / f"{kind}.pth", weights_only=True)
    assert type(back) is dict and set(back) == set(tensors) and len(back) == 18 * LAYERS + 6
    for name, tensor in tensors.items():
        again, bits = back[name], {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        assert again.dtype is dtype and again.shape == tensor.shape and again.is_contiguous()
        assert torch.equal(again.view(bits), tensor.view(bits)), name
        assert again.untyped_storage().nbytes() == again.nbytes
    import_checkpoint(kind, tmp_path / "back", tmp_path / "twice", progress=False)
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_any_age_and_shared_memory_are_read(zipped, tmp_path):
    tensors = published_tensors()
    tensors["head.weight"] = tensors["emb.weight"]
    tensors["ln_out.weight"] = torch.rand(2, WIDTH).T[:, 0]
    torch.save(tensors, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    import_checkpoint("spikegpt", tmp_path / "model.pth", tmp_path / "ours", progress=False)
    export_checkpoint("spikegpt", tmp_path / "ours", tmp_path / "back", progress=False)
    back = torch.load(tmp_path / "back" / "spikegpt.pth", weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("binary", [True, False])
def test_what_was_chosen_stays_chosen(binary, tmp_path):
    ours = imported(tmp_path, published_tensors(), binary_embedding=binary)
    assert load(ours).config.binary_embedding is binary
    record = json.loads((ours / "conversion.json").read_text())
    assert record["source"]["choices"] == {"binary_embedding": binary}
    assert (
        f"binary_embedding is {binary}: " in record["notes"][0]
        and record["notes"][0] in (ours / "README.md").read_text()
    )
    export_checkpoint("spikegpt", ours, tmp_path / "back", progress=False)


def test_sizes_come_from_the_shapes_and_the_rest_is_the_preset():
    blank = blank_model(presets.get("spikegpt-216m"))
    state = blank.state_dict()
    for kind in ("spikegpt", "rwkv4"):
        shapes = {}
        for rule in KINDS[kind].rules(blank.config):
            shapes |= zip(
                rule.published, (t.shape for t in rule.write(*(state[name] for name in rule.ours))), strict=True
            )
        config = SpikeLMConfig(**KINDS[kind].fields({}, shapes))
        assert len(shapes) == 330 and config.eos_token_id is None
        if kind == "spikegpt":
            assert config.to_dict() == blank.config.to_dict()
        else:
            assert not (config.is_spiking or config.binary_embedding or config.residual_dropout)


def test_a_tokenizer_beside_the_weights_makes_a_model_that_writes(tmp_path):
    """tokenizer.json alone is enough. Capital letters have ids below the 61 rows of the embedding."""
    letters().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    ours = imported(tmp_path, published_tensors())
    model, tokenizer = load_model(ours, progress=False)
    assert model.generate(**tokenizer("THE", return_tensors="pt"), max_new_tokens=3).shape[1] == 6


def test_training_settings_and_token_ids_do_not_hinder_an_export(tmp_path):
    ours = imported(tmp_path, published_tensors())
    config = SpikeLMConfig.from_pretrained(ours)
    config.update(
        {"eos_token_id": 0, "residual_dropout": 0.0, "neuron_detach_reset": True, "neuron_surrogate": "sigmoid"}
    )
    config.save_pretrained(ours)
    export_checkpoint("spikegpt", ours, tmp_path / "back", progress=False)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"neuron_threshold": 0.5}, "spikegpt", "neuron_threshold (0.5, the format has 1.0)"),
        ({"spike_neuron": "plif"}, "spikegpt", "spike_neuron ('plif', the format has 'lif')"),
        ({"logit_softcap": 30.0}, "spikegpt", "logit_softcap (30.0"),
        ({}, "rwkv4", "binary_embedding (True, the format has False)"),
    ],
)
def test_models_that_the_format_cannot_express(change, kind, said, tmp_path):
    ours = imported(tmp_path, published_tensors())
    config = SpikeLMConfig.from_pretrained(ours)
    config.update(change)
    config.save_pretrained(ours)
    with pytest.raises(ValueError, match=re.escape(said)):
        export_checkpoint(kind, ours, tmp_path / "back", progress=False)
    assert not (tmp_path / "back").exists()


def without(*names):
    return lambda t: [t.pop(name) for name in names]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda t: t.update({"blocks.1.att.ghost": torch.zeros(1)}),
            r"1 tensors that a SpikeGPT .*: blocks.1.att.ghost\.",
        ),
        (
            lambda t: t.update({"blocks.7.ghost": torch.zeros(1)}),
            r"blocks\.7\.ghost; and lacks 18 of its 78: blocks\.3\.",
        ),
        (without("blocks.2.att.time_first"), r"lacks 1 of its 60: blocks\.2\.att\.time_first\."),
        (without("blocks.0.ln0.bias", "head.weight"), r"lacks 2 of its 60: blocks\.0\.ln0\.bias, head\.weight\."),
        (without("emb.weight"), r"not a SpikeGPT one: it lacks emb\.weight"),
        (lambda t: t.update({"emb.weight": torch.zeros(WIDTH)}), r"emb\.weight has shape \[32\]; expected two dim"),
        (lambda t: t.update({"head.weight": torch.zeros(VOCABULARY, 8)}), r"head\.weight .* \[61, 8\]; .* \[61, 32\]"),
        (
            lambda t: t.update({"blocks.1.ffn.time_mix_k": torch.zeros(WIDTH)}),
            r"blocks\.1\.ffn\.time_mix_k .* has shape \[32\]; .* expect \[1, 1, 32\]",
        ),
        (lambda t: t.update({"blocks.1.ffn.key.weight": torch.zeros(9, WIDTH)}), rf"\[9, 32\]; .* \[{INNER}, 32\]"),
        (lambda t: t["blocks.1.att.time_decay"].fill_(torch.inf), r"time_decay of .* not finite"),
        (lambda t: t.update({"head.weight": Trap()}), "Only plain tensors are accepted from pickles"),
        (lambda t: t.update({"epoch": 3}), "does not hold a dictionary of tensors"),
    ],
)
def test_a_checkpoint_that_is_none_is_one_line_and_exit_code_two(damage, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tensors = published_tensors()
    damage(tensors)
    source = written(tmp_path, tensors)
    assert main(["import", "spikegpt", str(source), str(tmp_path / "ours")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("spikelm: error: ") and re.search(said, lines[0])
    assert list(tmp_path.iterdir()) == [source]


def test_of_several_files_one_must_be_named(tmp_path):
    written(tmp_path, published_tensors(), "rwkv-10.pth")
    written(tmp_path, published_tensors(), "rwkv-20.pth")
    with pytest.raises(ValueError, match=r"holds 2 checkpoints: rwkv-10\.pth, rwkv-20\.pth\. Name one"):
        import_checkpoint("rwkv4", tmp_path, tmp_path / "ours", progress=False)


def test_a_kind_leaves_only_its_own_choices(tmp_path):
    with pytest.raises(ValueError, match=r"rwkv4 leaves no choice of binary_embedding, nor of anything else"):
        imported(tmp_path, published_tensors(), "rwkv4", binary_embedding=True)
    with pytest.raises(ValueError, match=r"spikegpt leaves no choice of vocab_size, only of binary_embedding"):
        imported(tmp_path, published_tensors(), vocab_size=5)


def test_a_full_disk_is_one_line(tmp_path, capsys):
    """No file may grow beyond 20 kB while it is written."""
    resource = pytest.importorskip("resource")
    ours = imported(tmp_path, published_tensors())
    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    for command in (["import", "spikegpt", tmp_path / "model.pth"], ["export", "spikegpt", ours]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            code = main([*map(str, command), str(tmp_path / "out")])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2 and len(lines) == 1 and "Is the disk full?" in lines[0]
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("moment", ["write_checkpoint", "write_pickle"])
def test_a_failure_while_writing_leaves_nothing(moment, tmp_path, monkeypatch):
    from spikelm.conversion import importing

    ours, whole = imported(tmp_path, published_tensors()), getattr(importing, moment)
    before = sorted(tmp_path.iterdir())

    def half(*args):
        whole(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, moment, half)
    with pytest.raises(KeyboardInterrupt):
        if moment == "write_pickle":
            export_checkpoint("spikegpt", ours, tmp_path / "back", progress=False)
        else:
            import_checkpoint("spikegpt", tmp_path / "model.pth", tmp_path / "twice", progress=False)
    assert sorted(tmp_path.iterdir()) == before
