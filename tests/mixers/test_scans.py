"""HGRN and minGRU against straight re-statements; their outputs are events."""

import pytest
import torch
import torch.nn.functional as F

from small_models import small_model


def run(name):
    model, seen = small_model(mixers=name, event_threshold=0.1), {}
    mixer = model.model.layers[2].mixer
    mixer.register_forward_hook(lambda module, args, output: seen.update(x=args[0][0], y=output[0]))
    mixer.o_site.register_forward_hook(lambda module, args, output: seen.update(events=output[0]))
    with torch.no_grad():
        model(torch.randint(0, 97, (1, 13)))
    return mixer, seen


def events(h, mixer):
    return torch.where(h >= mixer.events.thresholds, h, 0.0)


def test_hgrn():
    mixer, seen = run("hgrn")
    x, h = seen["x"], torch.zeros(32, dtype=torch.float64)
    for t in range(13):
        forget = 2 / 3 + (1 - 2 / 3) * torch.sigmoid(mixer.f_proj.weight @ x[t])
        h = forget * h + (1 - forget) * F.silu(mixer.i_proj.weight @ x[t])
        y = events(h, mixer)
        y = y * torch.rsqrt(y.pow(2).mean() + 1e-6) * mixer.norm.weight * F.silu(mixer.g_proj.weight @ x[t])
        assert (mixer.o_proj.weight @ y - seen["y"][t]).abs().max() < 1e-9


def test_mingru():
    mixer, seen = run("mingru")
    x, h = seen["x"], torch.zeros(32, dtype=torch.float64)
    for t in range(13):
        update = torch.sigmoid(mixer.u_proj.weight @ x[t])
        h = (1 - update) * h + update * (mixer.z_proj.weight @ x[t])
        assert (mixer.o_proj.weight @ events(h, mixer) - seen["y"][t]).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["hgrn", "mingru"])
def test_silence_reaches_the_output_projection(name):
    _, seen = run(name)
    silent = (seen["events"] == 0).double().mean()
    assert 0.2 < silent < 0.95
