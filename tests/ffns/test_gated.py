"""The gated ffn against its formula, with both activations."""

import pytest
import torch
import torch.nn.functional as F

from small_models import small_config
from spikelm.ffns.gated import GatedFFN


@pytest.mark.parametrize(
    ("name", "act"), [("silu", F.silu), ("gelu_pytorch_tanh", lambda x: F.gelu(x, approximate="tanh"))]
)
@pytest.mark.parametrize("bias", [False, True])
def test_formula(name, act, bias):
    ffn = GatedFFN(small_config(hidden_act=name, ffn_bias=bias), 0).double()
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    expected = ffn.down_proj(act(ffn.gate_proj(x)) * ffn.up_proj(x))
    assert torch.allclose(ffn(x, None), expected, atol=1e-12)
    assert (ffn.down_proj.bias is not None) == bias
