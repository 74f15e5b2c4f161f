import pytest
import torch

from spikelm.conversion.convert import convert
from spikelm.conversion.rotation import orthogonal, rotate
from tests.conversion.tiny import VOCAB, gemma2, llama, olmo2, qwen2, qwen3

IDS = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))


def biased(**changes):
    return llama(attention_bias=True, mlp_bias=True, **changes)


@pytest.mark.parametrize(
    ("make", "mixers"),
    [
        (biased, "keep"),
        (qwen2, "keep"),
        (qwen3, "keep"),
        (biased, "gla+swa"),
        (biased, "window_linear"),
        (qwen3, "delta"),
    ],
)
def test_a_rotated_model_computes_what_it_did(make, mixers):
    plain = convert(make().double(), mixers=mixers, sites="none", progress=False)
    turned = convert(make().double(), mixers=mixers, sites="none", rotate=True, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(turned(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-9)
    ours, theirs = (model.model.layers[1].ffn.gate_proj.weight for model in (turned, plain))
    assert not torch.allclose(ours, theirs, atol=0.01)
    values = [f"values.{i}" for i in range(4)] if mixers == "keep" else []
    assert turned.conversion["rotated"] == ["residual", *values]


def test_the_head_is_untied_only_for_the_gains_of_the_final_norm(tmp_path):
    source = llama(tie_word_embeddings=True).double()
    plain = convert(source, sites="none", progress=False)
    turned = convert(source, tmp_path / "turned", sites="none", rotate=True, progress=False)
    assert plain.config.tie_word_embeddings and not turned.config.tie_word_embeddings
    assert turned.conversion["result"]["parameters"] == sum(p.numel() for p in turned.parameters())
    assert "residual stream is rotated" in (tmp_path / "turned" / "README.md").read_text()
    again = type(turned).from_pretrained(tmp_path / "turned", dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-9)
        source.model.norm.weight.fill_(1.0)
    plain, same = (convert(source, sites="none", rotate=turn, progress=False) for turn in (False, True))
    assert same.config.tie_word_embeddings and same.lm_head.weight is same.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(same(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("width", [1, 9, 48, 64, 576])
def test_orthogonal_matrices_spread_every_row(width):
    turn = orthogonal(width, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn @ turn.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    power = width & -width
    assert float(turn.abs().max()) <= power**-0.5 + 1e-12


def test_small_counts_hold_outliers_after_a_rotation():
    """Two channels of the residual stream are a hundred times larger than all others and of little use."""
    source = llama().double()
    with torch.no_grad():
        source.model.embed_tokens.weight[:, [3, 17]] = 100 * source.model.embed_tokens.weight.std()
    exact = convert(source, sites="none", progress=False)
    errors = {}
    for turned in (False, True):
        model = convert(source, k=3, sites=["qkv", "gate_up"], max_count=7, rotate=turned, progress=False)
        assert model.config.spike_max_count == 7
        with torch.no_grad():
            errors[turned] = float((model(IDS).logits - exact(IDS).logits).square().mean())
    assert errors[True] < 0.25 * errors[False]


@pytest.mark.parametrize("make", [gemma2, olmo2])
def test_other_norms_are_refused(make):
    with pytest.raises(ValueError, match="A rotation needs pre_norm"):
        convert(make(), sites="none", rotate=True, progress=False)


def test_other_layers_are_refused():
    model = convert(llama(), sites="none", progress=False)
    model.config.ffns = ["rwkv"] * 4
    with pytest.raises(ValueError, match=r"layer 0 \(attention, rwkv\)"):
        rotate(model)


def test_rotation_excludes_silence():
    with pytest.raises(ValueError, match="Give rotate or silent_share, not both"):
        convert(llama(), silent_share=0.3, rotate=True, progress=False)
    with pytest.raises(ValueError, match="max_count must be a whole number"):
        convert(llama(), max_count=0, progress=False)
