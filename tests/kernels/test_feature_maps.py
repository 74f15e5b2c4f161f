"""Feature maps: what they are at the start, signs, sums, types, gradients, errors."""

import pytest
import torch

from spikelm.kernels.feature_maps import hedgehog, identity_map, relu


def test_identity_maps_start_from_x_itself():
    x = torch.randn(2, 3, 4, 6)
    weight = identity_map(4, 6, 6)
    assert torch.equal(relu(x, weight), x.relu())
    torch.testing.assert_close(hedgehog(x, weight), torch.cat([x.softmax(-1), (-x).softmax(-1)], -1))


def test_maps_may_be_narrower_than_the_head():
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(hedgehog(x, identity_map(4, 6, 3))[..., :3], x[..., :3].softmax(-1))


def test_every_head_has_its_own_map():
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    weight = torch.randn(2, 4, 3, dtype=torch.float64)
    for head in range(2):
        torch.testing.assert_close(relu(x, weight)[:, head], (x[:, head] @ weight[head]).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hedgehog_never_gives_zero(dtype):
    features = hedgehog(torch.tensor([[[200.0, -200.0]]], dtype=dtype), identity_map(1, 2, 2))
    assert features.dtype == dtype and (features > 0).all()
    assert features.min().item() == pytest.approx(1e-12, rel=1e-2)
    assert features[..., :2].sum().item() == pytest.approx(1.0)


def test_gradients():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for feature_map in (hedgehog, relu):
        assert torch.autograd.gradcheck(feature_map, (x, weight))


@pytest.mark.parametrize("feature_map", [hedgehog, relu])
def test_a_map_that_does_not_fit_is_named(feature_map):
    with pytest.raises(ValueError, match=rf"{feature_map.__name__}: weight must be \[H, D, M\] .* got \(3, 4, 5\)"):
        feature_map(torch.ones(2, 4, 4), torch.ones(3, 4, 5))
