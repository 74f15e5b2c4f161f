"""Published architectures: their sizes, counted on the meta device."""

import pytest
import torch

from spikelm import SpikeLMForCausalLM, presets

PARAMETERS = {
    "spikingbrain-7b": 7_616_542_976,  # published: Qwen2.5-7B's 7,615,616,512 and 14 gates and norms of 66,176
    "spikingbrain-7b-w8aspike": 7_641_315_584,  # each of the 14 gates 512 x 3584 instead of 16 x 3584 + 512 x 16
    "spikingbrain-76b": 76_055_286_272,  # the report says 76B; with projections shared by the branches, without sinks
    "spikingbrain-tiny": 729_408,
    "spikingbrain-tiny-w8aspike": 739_648,
    "spikegpt-216m": 215_399_424,  # published, and L (13 C^2 + 11 C) + 2 V C + 4 C
    "spikegpt-46m": 12 * (13 * 512**2 + 11 * 512) + 2 * 6064 * 512 + 4 * 512,  # 47.2M
    "spikegpt-tiny": 2 * (13 * 64**2 + 11 * 64) + 2 * 256 * 64 + 4 * 64,
    "astrosnn-small": 47_173_632 + 12 * 2 * 5 * 512,  # five values for each unit, at two sites of each layer
    "rwkv7-0.1b": 191_034_624,  # 191,084,544 in a file that holds the idle value mix of the first layer
    "rwkv7-tiny": 777_728,
    "egru-ptb": 31_699_150,  # published: 31.70 M, the tied embedding counted once
    "egru-wt2": 49_180_928,  # published: 49.18 M
}


def meta(name):
    with torch.device("meta"):
        return SpikeLMForCausalLM(presets.get(name))


@pytest.mark.parametrize("name", presets.names())
def test_parameters_are_as_many_as_published(name):
    assert sum(parameter.numel() for parameter in meta(name).parameters()) == PARAMETERS[name]


def test_dense_gates_are_all_that_w8aspike_adds():
    more = PARAMETERS["spikingbrain-7b-w8aspike"] - PARAMETERS["spikingbrain-7b"]
    assert more == 14 * (512 * 3584 - 16 * 3584 - 512 * 16)


@pytest.mark.parametrize(("name", "vocabulary"), [("egru-ptb", 10_000), ("egru-wt2", 33_278)])
def test_parameters_of_egru_by_part(name, vocabulary):
    """Published for Penn Treebank: 24.19 M without the embedding. A cell: 3H (inputs + H) + 6H + H."""
    parts = {path: tensor.numel() for path, tensor in meta(name).state_dict().items()}
    twice, embedding = sum(parts.values()), 750 * vocabulary
    cells = sum(3 * h * (inputs + h) + 7 * h for inputs, h in ((750, 1350), (1350, 1350), (1350, 750)))
    assert cells == sum(n for path, n in parts.items() if path.startswith("model.layers.")) == 24_189_150
    assert PARAMETERS[name] == cells + embedding + vocabulary and twice == PARAMETERS[name] + embedding
    assert parts["lm_head.bias"] == vocabulary and parts["lm_head.weight"] == embedding


def test_layers_of_spikingbrain_alternate():
    config = presets.get("spikingbrain-7b")
    assert config.mixers == ["gla", "swa"] * 14
    assert config.layer_types == ["linear_attention", "sliding_attention"] * 14
    assert not config.is_spiking and presets.get("spikingbrain-7b-w8aspike").is_spiking


def test_tiny_presets_run():
    for name in ("spikingbrain-tiny", "spikingbrain-tiny-w8aspike", "spikegpt-tiny", "rwkv7-tiny"):
        model = SpikeLMForCausalLM(presets.get(name)).eval()
        assert model(torch.arange(20)[None]).logits.isfinite().all()


def test_spikegpt_has_as_many_tensors_as_published():
    assert len(meta("spikegpt-216m").state_dict()) == 330 and len(meta("spikegpt-46m").state_dict()) == 12 * 18 + 6


@torch.no_grad()
def test_astrocytes_start_as_plain_neurons():
    """The same sizes as SpikeGPT's, and until its gains are trained the same function."""
    plain, modulated = presets.get("spikegpt-46m"), presets.get("astrosnn-small")
    differing = {k for k, v in plain.to_dict().items() if modulated.to_dict()[k] != v}
    assert differing == {"spike_neuron"}
    tiny = presets.get("spikegpt-tiny")
    model = SpikeLMForCausalLM(tiny).eval().double()
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    tiny.spike_neuron = "astrocyte"
    with_astrocytes = SpikeLMForCausalLM(tiny).eval().double()
    absent, foreign = with_astrocytes.load_state_dict(model.state_dict(), strict=False)
    assert len(absent) == 2 * 2 * 5 and not foreign
    ids = torch.randint(0, 256, (1, 40))
    assert torch.equal(model(ids).logits, with_astrocytes(ids).logits)


def test_a_preset_is_a_new_configuration_each_time():
    presets.get("spikingbrain-tiny").mixers[0] = "attention"
    assert presets.get("spikingbrain-tiny").mixers[0] == "gla"


def test_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'spikingbrain-8b' is not known.*spikingbrain-7b"):
        presets.get("spikingbrain-8b")
