"""The configuration: derived fields, per-layer values, clear refusals, round trips."""

import pytest

from small_models import small_config
from spikelm import SpikeLMConfig
from spikelm.validation import PER_LAYER


def test_layer_types_follow_the_mixers():
    config = small_config(mixers=["gla", "swa", "gla+swa"])
    assert config.layer_types == ["linear_attention", "sliding_attention", "hybrid_sliding"]
    assert config.ffns == ["gated"] * 3
    config = small_config(mixers=["delta", "window_linear", "window_linear+attention"])
    assert config.layer_types == ["linear_attention", "hybrid_sliding", "hybrid"]


def test_heads_default_as_in_llama():
    config = SpikeLMConfig(hidden_size=64, num_attention_heads=8, num_hidden_layers=1)
    assert (config.num_key_value_heads, config.head_dim) == (8, 8)


def test_a_field_is_one_value_or_one_per_layer():
    config = small_config(spike_k=[2, 3, 4], spike_sites=[["qkv"], [], ["o", "down"]])
    assert [config.at("spike_k", i) for i in range(3)] == [2, 3, 4]
    assert config.at("attention_window", 2) == 4
    assert [config.sites_at(i) for i in range(3)] == [("qkv",), (), ("o", "down")]
    assert config.is_spiking and not small_config().is_spiking


def test_a_list_that_is_one_value_for_all_layers_comes_back_whole():
    config = small_config(mixers="egru_stack", egru_stack_sizes=[8, 16, 32])
    assert [config.at("egru_stack_sizes", i) for i in range(3)] == [[8, 16, 32]] * 3


@pytest.mark.parametrize("field", PER_LAYER)
def test_lists_must_cover_all_layers(field):
    value = getattr(small_config(), field)
    value = value[0] if isinstance(value, list) else value
    with pytest.raises(Exception, match=f"{field} has 2 entries for 3 layers"):
        small_config(**{field: [value] * 2})


LIF = {"spike_neuron": "lif", "spike_code": "binary"}
PLIF = {"spike_sites": ["o"], "spike_neuron": "plif", "spike_code": "binary"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"mixers": "mamba"},
            "mixers of layer 0 must be one of attention, swa, gla, retention, .*, egru_stack; got 'mamba'",
        ),
        ({"mixers": "gla+gla"}, "two different ones"),
        ({"mixers": "attention+swa"}, "side by side"),
        ({"mixers": "swa", "attention_window": None}, "attention_window of layer 0 must be at least 1"),
        ({"ffns": "mlp"}, "ffns of layer 0 must be one of gated, moe, rwkv"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"pre_norm": "batchnorm"}, "pre_norm of layer 0 must be one of"),
        ({"attention_rope": "local"}, "local_rope_parameters is not given"),
        ({"mixers": "gla", "gla_gate": "tied"}, "set gla_feature_map to 'sigmoid'"),
        (
            {"spike_sites": ["qkv", "v"]},
            "spike_sites of layer 0 must be one of qkv, o, gate_up, down, mixer_out, ffn_out; got 'v'",
        ),
        ({"spike_sites": [["qkv"], ["o"]]}, "one list per layer"),
        ({"spike_sites": ["qkv"], "spike_k": 0}, "spike_k of layer 0 must be a positive number"),
        ({"spike_code": "morse"}, "spike_code must be one of binary, ternary, bitwise, twos_complement"),
        ({"spike_threshold": "fixed"}, "spike_threshold must be one of token, calibrated, learned"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"residual_dropout": 1.0}, "residual_dropout must be at least 0 and below 1"),
        ({"spike_sites": ["o"], "spike_neuron": "izhikevich"}, "spike_neuron of layer 0 must be one of none, lif"),
        ({"spike_sites": ["o"], "spike_neuron": "lif"}, "set spike_code to 'binary' or 'ternary'"),
        ({"mixers": "egru", "egru_form": "lstm"}, "egru_form of layer 0 must be one of evnn, paper"),
        ({"mixers": "egru", "egru_heads": 5}, r"egru_heads of layer 0 \(5\) must divide the 32 cells"),
        ({"mixers": "egru", "egru_size": 0}, "egru_size of layer 0 must be a positive number"),
        ({"mixers": "egru", "egru_zoneout": 1.0}, "egru_zoneout of layer 0 must be at least 0 and below 1"),
        ({"mixers": "egru", "egru_support": 0}, "egru_support must be a positive number"),
        ({"mixers": "egru", "egru_threshold_mean": 0.0}, "egru_threshold_mean of layer 0 must be a positive number"),
        ({"mixers": "egru", "egru_threshold_mean": 1.0}, "egru_threshold_mean of layer 0 must be at least 0 and below"),
        ({"mixers": "egru_stack"}, r"the last hidden_size \(32\); got None"),
        ({"mixers": "egru_stack", "egru_stack_sizes": [32, 24]}, r"the last hidden_size \(32\); got \[32, 24\]"),
        ({**PLIF, "neuron_decay": 0.0}, "for a learned decay above 0"),
        ({**PLIF, "neuron_temporal_grad": "truncated"}, "neuron_grad_window must be given"),
        (
            {**PLIF, "neuron_temporal_grad": "truncated", "neuron_grad_window": 0},
            "neuron_grad_window must be a positive",
        ),
        ({**PLIF, "ffns": "moe", "spike_sites": ["qkv", "down"]}, "down lie inside the experts of 'moe'"),
        ({"hidden_size": 72, "num_attention_heads": 8, "head_dim": 9}, "even rotary dimension"),
    ],
)
def test_wrong_values_are_refused_with_a_reason(wrong, message):
    with pytest.raises(Exception, match=message):
        small_config(**wrong)


def test_fields_of_unused_blocks_are_not_checked():
    assert small_config(mixers="attention", gla_feature_map="relu", gla_gate="tied").mixers == ["attention"] * 3
    assert small_config(mixers="rwkv4", head_dim=9).head_dim == 9  # where nothing rotates
    assert small_config(ffns="moe", spike_sites=["qkv", "ffn_out"], **LIF).ffns == ["moe"] * 3  # outside the experts


def test_saving_and_loading_keeps_every_field(tmp_path):
    config = small_config(mixers=["gla", "swa", "gla+swa"], spike_sites=[["qkv"], [], ["o"]], spike_k=[2, 3.5, 4])
    config.save_pretrained(tmp_path)
    loaded = SpikeLMConfig.from_pretrained(tmp_path)
    ignored = {"_name_or_path", "transformers_version"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }
