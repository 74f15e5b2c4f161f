"""Mixers side by side, norms of q and k, and which linears read which site."""

import pytest
import torch

from small_models import SITES, small_config, small_model
from spikelm import SpikeLMForCausalLM
from spikelm.spiking import spike_groups


@torch.no_grad()
def test_shared_branches_add_their_normed_heads():
    model = small_model(mixers="gla+swa")
    mixer = model.model.layers[0].mixer
    seen = {}
    mixer.gla.register_forward_hook(lambda m, a, out: seen.update(gla=out[0]))
    mixer.swa.register_forward_hook(lambda m, a, out: seen.update(swa=out[0]))
    mixer.o_proj.register_forward_hook(lambda m, a, out: seen.update(o=a[0]))
    model(torch.randint(0, 97, (1, 9)))
    heads = seen["swa"]
    normed = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-6) * mixer.branch_norms["swa"].weight
    assert (seen["o"] - (seen["gla"] + normed).flatten(2)).abs().max() < 1e-12


@torch.no_grad()
def test_a_linear_branch_can_start_from_nothing_beside_a_window_without_a_norm():
    model = small_model(mixers="gla+swa", parallel_norms="linear")
    mixer = model.model.layers[0].mixer
    assert not mixer.branch_norms
    assert (
        SpikeLMForCausalLM(small_config(mixers="gla+swa", parallel_norms="linear"))
        .model.layers[0]
        .mixer.gla.norm.weight.abs()
        .max()
        == 0
    )
    seen = {}
    mixer.gla.register_forward_hook(lambda m, a, out: seen.update(gla=out[0]))
    mixer.swa.register_forward_hook(lambda m, a, out: seen.update(swa=out[0]))
    mixer.o_proj.register_forward_hook(lambda m, a, out: seen.update(o=a[0]))
    model(torch.randint(0, 97, (1, 9)))
    assert torch.equal(seen["o"], (seen["gla"] + seen["swa"]).flatten(2))


def test_branches_share_projections_unless_the_flag_separates_them():
    shared = small_model(mixers="gla+swa").model.layers[0].mixer
    apart = small_model(mixers="gla+swa", parallel_shared_projections=False).model.layers[0].mixer
    q = [name for name, _ in shared.named_parameters() if "q_proj" in name]
    assert q == ["q_proj.weight"]
    q = [name for name, _ in apart.named_parameters() if "q_proj" in name]
    assert q == ["branches.gla.q_proj.weight", "branches.swa.q_proj.weight"]


@pytest.mark.parametrize("apart", [False, True])
def test_every_linear_behind_a_site_reads_it(apart):
    """What a site hands on is what its declared readers, and they alone, are given."""
    model = small_model(mixers=["gla", "swa", "gla+swa"], spike_sites=SITES, parallel_shared_projections=not apart)
    groups = {group.path: group for group in spike_groups(model)}
    read = {path: [] for path in groups}
    for path, group in groups.items():
        group.site.substitute = lambda x, path=path: x * 0 + len(path)
        for linear in group.readers.values():
            linear.register_forward_hook(lambda module, args, output, path=path: read[path].append(args[0]))
    with torch.no_grad():
        model(torch.randint(0, 97, (1, 5)))
    for path, inputs in read.items():
        assert len(inputs) == len(groups[path].readers)
        assert all((x == len(path)).all() for x in inputs)
    coded = sum(len(group.readers) for group in groups.values())
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert coded == len(linears) - 1 - sum("gate.1" in name for name in linears)  # all but the head and gate.1


def test_an_activation_is_coded_once_for_all_its_readers():
    model = small_model(mixers="gla+swa", spike_sites=SITES, parallel_shared_projections=False, num_hidden_layers=1)
    sites = [group.path.removeprefix("model.layers.0.") for group in spike_groups(model)]
    assert sites == [
        "mixer.qkv_site",
        "mixer.branches.gla.o_site",
        "mixer.branches.swa.o_site",
        "ffn.gate_up_site",
        "ffn.down_site",
    ]
    readers = next(iter(spike_groups(model))).readers
    assert len(readers) == 7  # q, k, v of both branches and the gate


def test_qk_norms_per_head_and_across_heads():
    for kind, width in (("head", 8), ("full", 32)):
        mixer = small_model(attention_qk_norm=kind).model.layers[0].mixer
        assert mixer.q_norm.weight.shape == (width,)
        assert mixer.k_norm.weight.shape == (8 if kind == "head" else 16,)
