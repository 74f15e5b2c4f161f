"""Our counts in the definitions of NeuroBench 2.3 (Yik et al. 2025, arXiv 2304.04640), and a model that it can run.

    ParameterCount, Footprint    parameters; bytes of parameters and buffers
    ConnectionSparsity           zeros of all weights of linears
    ActivationSparsity           zeros of what the spike sites hand on; mean over samples
    SynapticOperations           nonzero inputs times nonzero weights of linears, biases left out, per sample

A linear's operations are ACs only if *all* its inputs of a pass are -1, 0 or 1, else MACs. Counts times a threshold are
MACs by this rule, so a model on counts has no ACs; on trains, each slot a time step of its own, products behind sites
are ACs, and `Dense` grows with the slots. Attention, recurrent states and matrices outside of linears are not counted.
A sample is a row of a batch: a whole window of tokens, with whatever padding it has.

    counts(model, windows)                       needs no NeuroBench
    with benchmarked(model) as wrapped:          needs it: pip install --no-deps neurobench snntorch
        Benchmark(wrapped, loader, [], [], [static, workload]).run()

(Without its other dependencies: the torchaudio that they bring does not load beside a torch for CPUs, and then
transformers does not either.)
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.kernels.runtime import expect
from spikelm.kernels.spike_train import bit_spikes, expand, slot_weights, slots_needed
from spikelm.spiking.site import Site, SpikeGroup, spike_groups


@torch.no_grad()
def counts(model: nn.Module, windows: Sequence[Tensor], trains: bool = False) -> dict[str, Any]:
    """NeuroBench's metrics of a model, without NeuroBench.

    Args:
        model: a spikelm model, with or without spike sites, perhaps prepared for inference.
        windows: token ids `[tokens]`, or `[samples, tokens]`; each is one pass.
        trains: whether counts run as trains of the model's code, each with the slots that its pass needs.

    Returns:
        Metric -> value, named as NeuroBench names them.

    Raises:
        ValueError: no windows, or trains of a model without spike sites that have any.
    """
    if not windows:
        raise ValueError("There is nothing to count on; give at least one window of token ids.")
    groups = _groups(model, trains)
    device = next(model.parameters()).device
    counter = _Counter(model, groups)
    with counter.watching():
        for window in windows:
            model(input_ids=window.reshape(-1, window.shape[-1]).to(device), use_cache=False)
            counter.end_of_pass(window.numel() // window.shape[-1])
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    stored = [*model.parameters(), *model.buffers()]
    return {
        "ParameterCount": sum(parameter.numel() for parameter in model.parameters()),
        "Footprint": sum(tensor.numel() * tensor.element_size() for tensor in stored),
        "ConnectionSparsity": zeros / total,
        "ActivationSparsity": counter.sparsity / counter.samples,
        "SynapticOperations": {name: value / counter.samples for name, value in counter.operations.items()},
    }


@contextmanager
def benchmarked(model: nn.Module, trains: bool = False) -> Iterator[Any]:
    """Within this context: a `TorchModel` of NeuroBench around `model`, with its sites as activation modules.

    Args:
        model: a spikelm model; it is set to eval mode.
        trains: whether the linears behind sites are called once for every slot, with nothing but -1, 0 and 1.

    Raises:
        ImportError: NeuroBench is not installed.
        ValueError: a prepared model, whose weights NeuroBench cannot copy; trains of a model without spike sites.
    """
    try:
        from neurobench.models import TorchModel
    except ImportError as error:
        raise ImportError(
            f"NeuroBench is not installed ({error}); pip install --no-deps neurobench snntorch."
        ) from error
    prepared = getattr(model, "prepared", None)
    remedy = "Call restore_dense first, or use spikelm.eval.neurobench.counts."
    expect(prepared is None, "benchmarked", "the model", "not prepared for inference", prepared, remedy)
    with ExitStack() as stack:
        for group in _groups(model, trains):
            stack.enter_context(_slot_by_slot(model, group))
        wrapped = TorchModel(model)
        wrapped.add_activation_module(Site)
        yield wrapped


def _groups(model: nn.Module, trains: bool) -> list[SpikeGroup]:
    """The groups that run on trains."""
    groups = [group for group in spike_groups(model) if not group.site.graded and group.readers] if trains else []
    if trains and not groups:
        raise ValueError("The model has no spike sites with linears behind them, so there are no trains to run on.")
    return groups


class _Counter:
    """Sums over the passes of a model; see `counts`."""

    def __init__(self, model: nn.Module, groups: list[SpikeGroup]):
        self.model = model
        self.samples, self.sparsity = 0, 0.0
        self.operations = {"Effective_MACs": 0, "Effective_ACs": 0, "Dense": 0}
        self._on_trains = {id(linear): group for group in groups for linear in group.readers.values()}
        self._code: str = model.config.spike_code if groups else ""
        self._latest: dict[Site, Tensor] = {}
        self._zeros = self._inputs = 0
        self._used: dict[nn.Linear, Tensor] = {}  # nonzero weights of every input

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count within."""
        with ExitStack() as stack:
            for group in {id(g.site): g for g in self._on_trains.values()}.values():
                group.site.observers.append(self._keep)
                stack.callback(group.site.observers.remove, self._keep)
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_pre_hook(self._read).remove)
                elif isinstance(module, Site):
                    stack.callback(module.register_forward_hook(self._handed_on).remove)
            yield

    def end_of_pass(self, samples: int) -> None:
        """A pass over so many samples is over."""
        self.sparsity += samples * (self._zeros / self._inputs if self._inputs else 0.0)
        self.samples += samples
        self._zeros = self._inputs = 0

    def _keep(self, site: Site, counts: Tensor, threshold: Tensor, context: Any) -> None:
        self._latest[site] = counts

    def _handed_on(self, site: nn.Module, args: tuple, output: Tensor) -> None:
        self._zeros += output.numel() - int(output.count_nonzero())
        self._inputs += output.numel()

    def _read(self, linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if linear not in self._used:
            self._used[linear] = (linear.weight != 0).sum(0)
        slots, group = 1, self._on_trains.get(id(linear))
        if group is not None:
            whole = self._latest[group.site]
            slots = slots_needed(whole, self._code)
            spikes = bit_spikes(whole, self._code, slots)
        else:
            spikes = x != 0
        small = group is not None or bool(((x == 0) | (x.abs() == 1)).all())
        effective = (spikes.flatten(0, -2).sum(0) * self._used[linear]).sum()
        self.operations["Effective_ACs" if small else "Effective_MACs"] += int(effective)
        self.operations["Dense"] += slots * x.numel() * linear.out_features


@contextmanager
def _slot_by_slot(model: nn.Module, group: SpikeGroup) -> Iterator[None]:
    """Put a `_SlotLinear` in the place of every linear of a group."""
    latest: dict[str, Tensor] = {}
    config: Any = model.config
    code = config.spike_code

    def capture(site: Site, counts: Tensor, threshold: Tensor, context: Any) -> None:
        latest["trains"], latest["threshold"] = expand(counts, code, slots_needed(counts, code)), threshold

    paths = {id(module): path for path, module in model.named_modules()}
    group.site.observers.append(capture)
    replaced = {paths[id(linear)]: linear for linear in group.readers.values()}
    for path, linear in replaced.items():
        model.set_submodule(path, _SlotLinear(linear, latest.__getitem__, code))
    try:
        yield
    finally:
        group.site.observers.remove(capture)
        for path, linear in replaced.items():
            model.set_submodule(path, linear)


class _SlotLinear(nn.Module):
    """A linear behind a site, called once for every slot of the train; NeuroBench's hooks see each call.

    The inner linear shares the weight and has no bias: that is added once.
    """

    def __init__(self, linear: nn.Linear, latest: Any, code: str):
        super().__init__()
        self.linear = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        self.linear.weight, self.bias = linear.weight, linear.bias
        self._latest, self._code = latest, code

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        trains, threshold = self._latest("trains"), self._latest("threshold")
        factors = slot_weights(self._code, len(trains)).tolist()
        total = sum(factor * self.linear(train.to(x.dtype)) for factor, train in zip(factors, trains))
        y = threshold * total
        return (y if self.bias is None else y + self.bias).to(x.dtype)
