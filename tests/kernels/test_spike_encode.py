"""The adaptive-threshold spike code: the same bits in every path, its edge cases, its gradients."""

import pytest
import torch

from spikelm.kernels import spike_encode as module
from spikelm.kernels.runtime import INTERPRETED
from spikelm.kernels.spike_encode import rms_norm, rms_norm_spike_encode, spike_encode, spike_quantize

TIERS = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cpu", id="interpreted", marks=pytest.mark.interpret),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "zone": {"dead_zone": 0.3},
    "zones_clip": {"dead_zone": "per channel", "max_count": 3},
    "stored": {"magnitude": 0.8},
    "stored_clip": {"magnitude": 0.8, "max_count": 4, "dead_zone": 0.1},
}
tiers = pytest.mark.parametrize("device", TIERS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
options = pytest.mark.parametrize("option", OPTIONS)


def make(option: str, channels: int, device: str = "cpu") -> dict:
    kwargs = dict(OPTIONS[option])
    if kwargs.get("dead_zone") == "per channel":
        kwargs["dead_zone"] = torch.rand(channels, generator=torch.Generator().manual_seed(3)).to(device)
    return kwargs


def rows(channels: int, dtype: torch.dtype, device: str = "cpu", count: int = 5) -> torch.Tensor:
    """Gaussian rows; the second is silent, the third has one huge outlier."""
    x = torch.randn(count, channels, generator=torch.Generator().manual_seed(channels)) * 3.0
    x[1] = 0.0
    x[2, channels // 2] = 3e4
    return x.to(device=device, dtype=dtype)


def definition(x, k, *, dead_zone=None, magnitude=None, max_count=None):
    """Equations of the module on the CPU, with a correctly rounded float64 sum in place of the fixed tree."""
    v = x.double() if x.dtype is torch.float64 else x.float()
    m = torch.tensor(magnitude, dtype=v.dtype) if magnitude is not None else v.abs().mean(-1, keepdim=True)
    threshold = (m / k).clamp_min(torch.finfo(v.dtype).tiny).expand(*x.shape[:-1], 1)
    counts = torch.round(v / threshold)
    if dead_zone is not None:
        counts = torch.where(v.abs() < dead_zone * m, 0.0, counts)
    if max_count is not None:
        counts = counts.clamp(-max_count, max_count)
    return counts, threshold


@pytest.mark.usefixtures("poisoned")
@tiers
@dtypes
@options
@pytest.mark.parametrize("channels", [1, 7, 40, 1300])
def test_every_path_takes_the_same_decisions(device, dtype, option, channels):
    x, kwargs = rows(channels, dtype), make(option, channels)
    k, zone, magnitude = module._check(x, 3.0, kwargs.get("dead_zone"), kwargs.get("magnitude"), None)
    expected = module.spike_encode_reference(x, k, zone, magnitude, kwargs.get("max_count"))
    counts, threshold = spike_encode(x.to(device), 3.0, **make(option, channels, device))
    assert counts.dtype is torch.float32 and threshold.shape == (5, 1)
    assert torch.equal(counts.cpu(), expected[0]) and torch.equal(threshold.cpu(), expected[1])
    hat = spike_quantize(x.to(device), 3.0, **make(option, channels, device))
    assert hat.dtype is dtype and torch.isfinite(hat).all()
    limit = torch.finfo(dtype).max
    assert torch.equal(hat.cpu(), (expected[0] * expected[1]).clamp(-limit, limit).to(dtype))


@pytest.mark.usefixtures("poisoned")
@tiers
@dtypes
@pytest.mark.parametrize("norm", ["none", "weight", "one_plus"])
@pytest.mark.parametrize("channels", [1, 40, 1300])
def test_fused_norm_decides_like_norm_then_code(device, dtype, norm, channels):
    x = rows(channels, dtype)
    weight = None if norm == "none" else torch.linspace(0.5, 1.5, channels)
    kwargs = {"eps": 1e-6, "one_plus": norm == "one_plus"}
    k, zone, _ = module._check(x, 3.0, 0.2, None, 5)
    y = rms_norm(x, weight, **kwargs)
    expected = module.spike_encode_reference(y, k, zone, None, 5)
    weight = None if weight is None else weight.to(device)
    got = rms_norm_spike_encode(x.to(device), weight, 3.0, dead_zone=0.2, max_count=5, **kwargs)
    assert torch.equal(got[0].cpu(), expected[0]) and torch.equal(got[1].cpu(), expected[1])


@options
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equations(option, dtype):
    """Away from ties the order of a sum changes no count."""
    x, kwargs = rows(40, dtype), make(option, 40)
    counts, threshold = spike_encode(x, 3.0, **kwargs)
    expected = definition(x, 3.0, **kwargs)
    assert counts.dtype is dtype and torch.equal(counts, expected[0])
    torch.testing.assert_close(threshold, expected[1], rtol=1e-6 if dtype is torch.float32 else 1e-14, atol=0.0)


@tiers
def test_ties_go_to_the_even_count(device):
    x = torch.tensor(
        [[0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 3.5, -3.5], [4.5, 5.5, 0.25, 1.0, 2**22 + 0.5, 2**23 + 1, 0, 0]]
    )
    counts, threshold = spike_encode(x.to(device), 1.0, magnitude=1.0)
    expected = [[0, 0, 2, -2, 2, -2, 4, -4], [4, 6, 0, 1, 2**22, 2**23 + 1, 0, 0]]
    assert counts.tolist() == expected and threshold.tolist() == [[1.0], [1.0]]


@tiers
def test_mean_based_ties(device):
    """mean |x| is 3, so k = 3 makes the threshold exactly 1 and the row holds two ties."""
    x = torch.tensor([[2.5, -1.5, 0.0, 8.0]])
    counts, threshold = spike_encode(x.to(device), 3.0)
    assert counts.tolist() == [[2.0, -2.0, 0.0, 8.0]] and threshold.item() == 1.0


@tiers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_rows_give_numbers(device, dtype):
    tiny = torch.finfo(torch.float32).smallest_normal
    x = torch.tensor([[0.0] * 4, [tiny / 8] * 4, [tiny, -tiny, 0.0, 0.0], [3e38] * 4, [1e30, 1e-30, 0.0, 0.0]])
    x = x.to(device=device, dtype=dtype)
    counts, threshold = spike_encode(x, 3.0)
    hat = spike_quantize(x, 3.0)
    assert torch.isfinite(counts).all() and torch.isfinite(threshold).all() and torch.isfinite(hat).all()
    assert (counts[0] == 0).all() and threshold[0] > 0 and (hat[0] == 0).all()
    assert counts[4].tolist() == [12.0, 0.0, 0.0, 0.0]


def test_a_nan_stays_visible_and_in_its_row():
    x = torch.ones(2, 3)
    x[0, 1] = torch.nan
    counts, _ = spike_encode(x, 3.0)
    assert counts[0].isnan().all() and counts[1].tolist() == [3.0, 3.0, 3.0]


@tiers
def test_a_row_does_not_depend_on_the_batch(device):
    """Prefill and token-by-token decoding code a token alike."""
    x = torch.randn(3, 17, 333, device=device)
    counts, threshold = spike_encode(x, 3.0, dead_zone=0.1)
    for row in (0, 7, 16):
        alone = spike_encode(x[1, row], 3.0, dead_zone=0.1)
        assert torch.equal(alone[0], counts[1, row]) and torch.equal(alone[1], threshold[1, row])
    strided = x.transpose(0, 1)
    assert torch.equal(spike_encode(strided, 3.0, dead_zone=0.1)[0], counts.transpose(0, 1))
    wide = torch.randn(4, 666, device=device)
    assert torch.equal(spike_encode(wide[:, ::2], 3.0)[0], spike_encode(wide[:, ::2].contiguous(), 3.0)[0])


@tiers
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows(device, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    counts, threshold = spike_encode(x, 3.0)
    assert counts.shape == x.shape and threshold.shape == (*shape[:-1], 1)
    spike_quantize(x, 3.0, max_count=2).sum().backward()
    assert x.grad.shape == x.shape


def test_dead_zone_is_a_half_open_interval():
    x = torch.tensor([[0.5, -0.5, 0.499, 2.0]])
    counts, _ = spike_encode(x, 4.0, magnitude=1.0, dead_zone=0.5)
    assert counts.tolist() == [[2.0, -2.0, 0.0, 8.0]]


@pytest.mark.usefixtures("poisoned")
@tiers
@dtypes
def test_straight_through_gradient(device, dtype):
    x = rows(40, dtype, device).requires_grad_()
    dy = torch.randn(5, 1, device=device).to(dtype).expand(5, 40)
    y = spike_quantize(x, 3.0, dead_zone=0.3)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy)
    counts, _ = spike_encode(x, 3.0)
    y = spike_quantize(x, 3.0, max_count=2)
    kept = counts.abs() <= 2
    assert not kept.all() and torch.equal(torch.autograd.grad(y, x, dy)[0], torch.where(kept, dy, 0.0))


@pytest.mark.usefixtures("poisoned")
@tiers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_magnitude_gradient(device, dtype):
    """Against autograd through counts written as x / V + constant."""
    if INTERPRETED and dtype is torch.float64:
        pytest.skip("float64 never takes the kernels")
    x = rows(40, dtype, device).requires_grad_()
    magnitude = torch.tensor([0.9], device=device, requires_grad=True)
    dy = torch.randn(5, 40, device=device).to(dtype)
    zone = torch.rand(40, device=device)
    y = spike_quantize(x, 3.0, dead_zone=zone, magnitude=magnitude, max_count=3)
    got = torch.autograd.grad(y, (x, magnitude), dy)

    wide = torch.float64 if dtype is torch.float64 else torch.float32
    v = x.detach().to(wide).requires_grad_()
    threshold = magnitude.to(wide) / 3.0
    ratio = v / threshold
    rounded = torch.where(v.abs() < zone * magnitude, 0.0, ratio.round()).detach()
    soft = torch.where(rounded.abs() > 3, rounded.clamp(-3, 3), ratio + (rounded - ratio).detach())
    expected = torch.autograd.grad(soft * threshold, (v, magnitude), dy.to(wide))
    torch.testing.assert_close(got[0].to(wide), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)


def test_nothing_else_gets_a_gradient():
    k, zone = torch.tensor([3.0], requires_grad=True), torch.tensor([0.1], requires_grad=True)
    x = torch.randn(2, 8, requires_grad=True)
    counts, threshold = spike_encode(x, k, dead_zone=zone)
    assert not counts.requires_grad and not threshold.requires_grad
    spike_quantize(x, k, dead_zone=zone).sum().backward()
    assert k.grad is None and zone.grad is None and x.grad is not None


def test_rms_norm_gradient():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for one_plus in (False, True):
        assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, eps=1e-6, one_plus=one_plus), (x, weight))  # noqa: B023
    expected = torch.nn.functional.rms_norm(x, (6,), weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-6), expected)


@tiers
@options
def test_opcheck(device, option):
    x = torch.randn(4, 12, device=device, requires_grad=True)
    kwargs = make(option, 12, device)
    k, zone, magnitude = module._check(x, 3.0, kwargs.get("dead_zone"), kwargs.get("magnitude"), None)
    limit = kwargs.get("max_count")
    if magnitude is not None:
        magnitude = magnitude.requires_grad_()
    torch.library.opcheck(module._spike_quantize, (x, k, zone, magnitude, limit))
    plain = (x.detach(), k, zone, None if magnitude is None else magnitude.detach(), limit)
    torch.library.opcheck(module._spike_encode, plain)
    torch.library.opcheck(module._spike_quantize_backward, (torch.randn_like(plain[0]), *plain))
    weight = torch.rand(12, device=device)
    torch.library.opcheck(module._rms_norm_spike_encode, (plain[0], weight, *plain[1:], 1e-6, False))


def test_torch_compile_without_a_graph_break():
    x = torch.randn(3, 5, 24, requires_grad=True)
    magnitude = torch.tensor([0.7], requires_grad=True)
    weight = torch.rand(24)

    def use(x, magnitude):
        y = spike_quantize(torch.tanh(x), 3.0, dead_zone=0.1, magnitude=magnitude, max_count=6)
        counts, threshold = spike_encode(x, 3.0)
        fused, _ = rms_norm_spike_encode(x, weight, 3.0, eps=1e-6)
        return y * 2.0 + counts * threshold, fused

    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    expected, got = use(x, magnitude), compiled(x, magnitude)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    for a, b in zip(
        torch.autograd.grad(got[0].sum(), (x, magnitude)), torch.autograd.grad(expected[0].sum(), (x, magnitude))
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.ones(3, dtype=torch.long)}, "x: expected a floating tensor"),
        ({"x": torch.ones(())}, "x: expected a floating tensor"),
        ({"k": 0.0}, "k: expected a finite number > 0"),
        ({"k": torch.ones(2)}, r"k: expected a float or a tensor \[1\]"),
        ({"dead_zone": -0.1}, "dead_zone: expected a finite number >= 0"),
        ({"dead_zone": torch.ones(3)}, r"dead_zone: expected a float or a tensor \[1\] or \[8\]"),
        ({"magnitude": torch.ones(8)}, "magnitude: expected"),
        ({"max_count": 0}, "max_count: expected an integer >= 1"),
    ],
)
def test_errors_name_the_argument(kwargs, message):
    kwargs = {"x": torch.ones(2, 8), "k": 3.0, **kwargs}
    for function in (spike_encode, spike_quantize):
        with pytest.raises(ValueError, match=message):
            function(kwargs["x"], kwargs["k"], **{n: v for n, v in kwargs.items() if n not in ("x", "k")})


def test_published_example():
    """Gaussian rows with k = 3: one input in ten is silent and nearly all counts are at most 7."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    counts, _ = spike_encode(x, 3.0)
    assert (counts == 0).float().mean().item() == pytest.approx(0.106, abs=0.002)
    assert (counts.abs() <= 7).float().mean().item() == pytest.approx(0.954, abs=0.002)
