"""The windowed linear layer against a straight re-statement of LoLCATs' equations."""

import pytest
import torch
import torch.nn.functional as F

from small_models import small_config, small_model
from spikelm import SpikeLMForCausalLM
from spikelm.cache import CACHE_NAME
from spikelm.mixers.attention import rotate


def hedgehog(x, weight):
    return torch.cat([F.softmax(x @ weight, -1), F.softmax(-(x @ weight), -1)], -1)


def relu(x, weight):
    return F.relu(x @ weight)


def published_layer(mixer, x, cos, sin, phi, window):
    """x `[T, hidden]` -> `[T, hidden]`, each token of each head by itself."""
    heads, shared, width, length = 4, 2, 8, x.shape[0]
    core = mixer.window_linear

    def split(projection, count):
        return (x @ projection.weight.T).view(1, length, count, width).transpose(1, 2)

    q, k = (rotate(split(p, n), cos, sin)[0] for p, n in ((mixer.q_proj, heads), (mixer.k_proj, shared)))
    v = split(mixer.v_proj, shared)[0]
    out = torch.zeros(length, heads, width, dtype=x.dtype)
    for h in range(heads):
        g = h // (heads // shared)
        fq, fk = phi(q[h], core.query_map[h]), phi(k[g], core.key_map[g])
        gamma = torch.sigmoid(core.factor.logit[h].double())
        for t in range(length):
            first = max(0, t - window + 1)
            scores = k[g, first : t + 1] @ q[h, t] / width**0.5
            weights = torch.cat([fk[:first] @ fq[t], gamma * torch.exp(scores - scores.max())])
            out[t, h] = weights @ v[g, : t + 1] / weights.sum()
    return out.flatten(1) @ mixer.o_proj.weight.T


@pytest.mark.parametrize("phi", [hedgehog, relu])
@pytest.mark.parametrize("window", [1, 4])
@torch.no_grad()
def test_layer_follows_the_published_equations(phi, window):
    model, seen = (
        small_model(mixers="window_linear", window_linear_feature_map=phi.__name__, attention_window=window),
        {},
    )
    mixer = model.model.layers[1].mixer
    mixer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], rope=args[1].rope, y=output))
    model(torch.randint(0, 97, (1, 19)))
    expected = published_layer(mixer, seen["x"][0], *seen["rope"]["global"], phi, window)
    assert (expected - seen["y"][0]).abs().max() < 1e-9


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_attention():
    ids = torch.randint(0, 97, (2, 19))
    model = small_model(mixers="window_linear", attention_window=19)
    plain = small_model(mixers="attention")
    tensors = {name.replace("window_linear.", ""): t for name, t in model.state_dict().items()}
    info = plain.load_state_dict(tensors, strict=False)
    assert not info.missing_keys and {name.rpartition(".")[2] for name in info.unexpected_keys} == {
        "query_map", "key_map", "logit"
    }  # fmt: skip
    assert (plain(ids).logits - model(ids).logits).abs().max() < 1e-9


def test_maps_start_at_the_identity_and_the_window_at_a_tenth():
    kinds = ["hedgehog", "relu", "hedgehog"]
    model = SpikeLMForCausalLM(small_config(mixers="window_linear", window_linear_feature_map=kinds))
    for layer, kind in zip(model.model.layers, kinds):
        core, mapped = layer.mixer.window_linear, {"hedgehog": 4, "relu": 8}[kind]
        for weight, heads in ((core.query_map, 4), (core.key_map, 2)):
            assert torch.equal(weight, torch.eye(8, mapped).expand(heads, -1, -1))
        assert torch.allclose(torch.sigmoid(core.factor.logit), torch.full((4,), 0.1))


@torch.no_grad()
def test_weight_of_the_window_stays_float32_in_a_bfloat16_model(tmp_path):
    model = small_model(dtype=torch.float32, mixers="window_linear")
    logits = model.model.layers[0].mixer.window_linear.factor.logit.clone()
    model.save_pretrained(tmp_path)
    for narrow in (
        model.to(torch.bfloat16),
        SpikeLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
    ):
        core = narrow.model.layers[0].mixer.window_linear
        assert torch.equal(core.factor.logit, logits)
        assert core.query_map.dtype == torch.bfloat16


@torch.no_grad()
def test_states_are_those_it_declares():
    model = small_model(dtype=torch.bfloat16, mixers="window_linear")
    core, cache = model.model.layers[0].mixer.window_linear, None
    for length in (3, 1, 9):
        cache = model(torch.randint(0, 97, (2, length)), cache=cache, use_cache=True)[CACHE_NAME]
        states = cache.layers[0].states
        for name, spec in core.state_specs().items():
            state = states[f"mixer.window_linear.{name}"]
            assert state.shape == (2, *spec.shape) and state.dtype == (spec.dtype or torch.bfloat16), name
    assert states["mixer.window_linear.length"].tolist() == [13, 13]


def test_work_is_counted_in_multiply_adds():
    """Maps of 8 x 4, features of 8; sums of 8 x 8 and a norm of 8: once for 4 query heads, once for 2 key heads."""
    core = SpikeLMForCausalLM(small_config(mixers="window_linear")).model.layers[0].mixer.window_linear
    assert core.state_macs == (4 + 2) * (8 * 4 + 8 * 8 + 8)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"attention_window": None}, "attention_window of layer 0 must be at least 1 for 'window_linear'"),
        ({"window_linear_feature_map": "elu"}, "window_linear_feature_map of layer 0 must be one of hedgehog, relu"),
        ({"attention_softcap": 20.0}, "scores without a cap"),
    ],
)
def test_wrong_values_are_refused_with_a_reason(wrong, message):
    with pytest.raises(Exception, match=message):
        small_config(mixers="window_linear", **wrong)
