import pytest
import torch

from spikelm.conversion.convert import convert
from spikelm.conversion.families import FAMILIES
from spikelm.conversion.keys import map_tensors, new_parameters, targets_of
from spikelm.conversion.plan import TARGETS, ConversionPlan
from spikelm.modeling import SpikeLMForCausalLM
from tests.conversion.tiny import llama, phi3


def parts(source, **choices):
    family = FAMILIES[source.config.model_type]
    config = ConversionPlan.of(**choices).apply(family.fields(source.config))
    with torch.device("meta"):
        expected = {k: t.shape for k, t in SpikeLMForCausalLM(config).state_dict().items()}
    return family, dict(source.state_dict()), expected, config


@pytest.mark.parametrize("threshold", ["token", "calibrated", "learned"])
@pytest.mark.parametrize("mixers", ["keep", *TARGETS, "gla+swa", "gla+attention", "swa+delta", "uniform:2"])
def test_declared_new_parameters_are_those_of_the_model(mixers, threshold):
    source = llama()
    family, tensors, expected, config = parts(source, mixers=mixers, threshold=threshold)
    ours = {target for key in tensors for target in targets_of(family, key)}
    assert set(expected) - ours == new_parameters(config)


def test_stranger_is_named():
    family, tensors, expected, _ = parts(llama(), sites="none")
    tensors["model.layers.0.self_attn.lora_A.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"self_attn\.lora_A\.weight"):
        map_tensors(family, tensors, expected, set(), torch.float32)


def test_bias_without_a_place_is_named():
    family, tensors, expected, _ = parts(llama(), sites="none")
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(48)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.bias"):
        map_tensors(family, tensors, expected, set(), torch.float32)


def test_missing_tensor_is_named_as_in_the_source():
    family, tensors, expected, _ = parts(phi3(), sites="none")
    del tensors["model.layers.2.self_attn.qkv_proj.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 .*: model\.layers\.2\.self_attn\.qkv_proj\.weight\."):
        map_tensors(family, tensors, expected, set(), torch.float32)


@pytest.mark.parametrize("shape", [(3, 48), (97, 3), (97,)])
def test_wrong_shape_is_named(shape):
    family, tensors, expected, _ = parts(llama(), sites="none")
    tensors["lm_head.weight"] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"lm_head\.weight .* shape"):
        map_tensors(family, tensors, expected, set(), torch.float32)


def test_undeclared_parameter_is_refused():
    family, tensors, expected, config = parts(llama(), sites="all")
    with pytest.raises(ValueError, match="lacks"):
        map_tensors(family, dict(tensors), expected, set(), torch.float32)
    with pytest.raises(ValueError, match="declared new parameters"):
        map_tensors(family, tensors, expected, new_parameters(config) | {"model.ghost"}, torch.float32)


def test_tensors_are_passed_on_not_copied():
    family, tensors, expected, _ = parts(llama(), sites="none")
    address = tensors["model.norm.weight"].data_ptr()
    mapped = map_tensors(family, tensors, expected, set(), torch.float32)
    assert mapped["model.norm.weight"].data_ptr() == address
    assert not tensors


def test_head_that_differs_from_tied_embeddings_is_kept():
    source = llama()
    source.config.tie_word_embeddings = True  # what some published configurations say of untied weights
    model = convert(source, sites="none", progress=False)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(ids).logits, source(ids).logits, atol=1e-5, rtol=0)
    assert not model.config.tie_word_embeddings
