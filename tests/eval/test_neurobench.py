"""Counts in NeuroBench's definitions: by hand, and against NeuroBench itself where it is installed."""

import pytest
import torch

from small_models import SITES, small_model
from spikelm.eval.neurobench import benchmarked, counts
from spikelm.spiking import spike_groups

MODELS = {
    "attention": {"mixers": "attention", "spike_sites": SITES},
    "ternary": {"mixers": "gla", "spike_sites": SITES, "spike_code": "ternary"},
    "two": {"mixers": ["gla", "swa"], "num_hidden_layers": 2, "spike_sites": ["qkv", "down"]},
    "lif": {"mixers": "swa", "spike_sites": SITES, "spike_neuron": "lif", "spike_code": "ternary"},
    "moe": {"mixers": "swa", "ffns": "moe", "moe_experts": 3, "moe_top_k": 2, "spike_sites": SITES},
    "no-sites": {"mixers": "swa"},
}


def pruned(**changes):
    """A small model some of whose weights are zero."""
    torch.manual_seed(0)
    model = small_model(num_hidden_layers=changes.pop("num_hidden_layers", 1), **changes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[module.weight.abs() < 0.05] = 0
    return model


@torch.no_grad()
def test_synaptic_operations_by_hand():
    model = pruned(**MODELS["attention"])
    ids = torch.randint(97, (2, 9))
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    effective = sum(((x != 0).double() @ (m.weight != 0).double().T).sum() for m, x in seen) / 2
    dense = sum(9 * m.weight.numel() for m, _ in seen)
    found = counts(model, [ids])
    assert found["SynapticOperations"] == {"Effective_MACs": float(effective), "Effective_ACs": 0, "Dense": dense}

    groups = list(spike_groups(model))
    recorded = []
    for group in groups:
        group.site.observers.append(lambda site, c, v, context, g=group: recorded.append((g, c)))
    model(ids)
    acs = 0
    for group, whole in recorded:
        for linear in group.readers.values():
            bits = whole.int().abs().flatten(0, 1)
            ones = torch.tensor([[bin(value).count("1") for value in row] for row in bits.tolist()])
            acs += int((ones.sum(0) * (linear.weight != 0).sum(0)).sum())
    for group in groups:
        group.site.observers.clear()
    assert counts(model, [ids], trains=True)["SynapticOperations"]["Effective_ACs"] == acs / 2


# Without sites there are no spikes, and no trains.
RUNS = [(name, trains) for name in MODELS for trains in (False, True) if (name, trains) != ("no-sites", True)]


@pytest.mark.parametrize(("name", "trains"), RUNS)
def test_neurobench_finds_the_same(name, trains):
    pytest.importorskip("neurobench")
    from neurobench.benchmarks import Benchmark
    from neurobench.metrics.static import ConnectionSparsity, Footprint, ParameterCount
    from neurobench.metrics.workload import ActivationSparsity, SynapticOperations

    model = pruned(**MODELS[name])
    windows = torch.randint(97, (3, 8))
    with torch.no_grad():
        expected = model(windows).logits
        ours = counts(model, list(windows), trains)
        with benchmarked(model, trains) as wrapped:
            assert torch.allclose(wrapped(windows).logits, expected, atol=1e-9)
            loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(windows, windows))
            static, workload = [ParameterCount, Footprint, ConnectionSparsity], [ActivationSparsity, SynapticOperations]
            theirs = Benchmark(wrapped, loader, [], [], [static, workload]).run(quiet=True)
    print(name, "trains" if trains else "counts", theirs)
    assert theirs["ParameterCount"] == ours["ParameterCount"] and theirs["Footprint"] == ours["Footprint"]
    assert theirs["ConnectionSparsity"] == pytest.approx(ours["ConnectionSparsity"], abs=5.1e-5)  # it rounds
    assert theirs["ActivationSparsity"] == pytest.approx(ours["ActivationSparsity"], abs=1e-12)
    assert theirs["SynapticOperations"] == pytest.approx(ours["SynapticOperations"], rel=1e-12)
    assert (theirs["SynapticOperations"]["Effective_ACs"] > 0) == (trains or name == "lif")


def test_wrong_arguments_are_refused():
    model = small_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="at least one window"):
        counts(model, [])
    with pytest.raises(ValueError, match="no spike sites"):
        counts(model, [torch.zeros(3, dtype=torch.long)], trains=True)


def test_the_wrapper_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "neurobench.models", None)
    with (
        pytest.raises(ImportError, match="pip install --no-deps neurobench"),
        benchmarked(small_model(num_hidden_layers=1)),
    ):
        pass
