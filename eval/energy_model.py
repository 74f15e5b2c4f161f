"""What a token costs in energy, by an analytic model: an estimate, never a measurement.

    E = operations E_op + bytes of weights E_w + bytes of activations E_a + bytes of state E_s + coding

for five columns, of one network with the same weights and products behind its spike sites (N = inputs times outputs):

    column           operations of a site      weight bytes   activation bytes     coding of an input
    fp16_dense       N fp16 MACs               2 N            2 per input          none
    int8_dense       N int8 MACs               N              1 per input          compare, multiply, add
    int_k_dense      N MACs of 8 by k bits     N              k / 8 per input      compare, multiply, add
    spiking          N r int8 additions        N a            events               by kind of site
    spiking_reread   the same                  N r            events               the same

with r spikes per input, a the share of active inputs, k = ceil(log2(levels of the site)). In the last column a row of
weights is read again for every spike, in the one before once for all spikes of its input. A multiplier grows with the
bits of both factors: 8 by k bits cost k / 8 of 8 by 8. Weights are int8 in all columns but the first, with one
float32 scale per output and group of 128 inputs, read by every token. Graded events cost fp16 MACs instead of
additions, and 8 bits where bits are asked for. All that is not behind a site (head, linears of real values, attention,
recurrent states, norms) is the same in every column: fp16, recurrent states and norms fp32.

Three accountings: "arithmetic" (no bytes at all), "weights_in_sram", "weights_in_dram".
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Any

import yaml

from spikelm.kernels.weight_rows import GROUP

CONSTANTS = Path(__file__).with_name("energy.yaml")
NAMES = (
    "fp32_multiply", "fp32_add", "fp16_multiply", "fp16_add", "int8_multiply", "int8_add", "weight_byte_sram",
    "weight_byte_dram", "activation_byte", "state_byte",
)  # fmt: skip
COLUMNS = ("fp16_dense", "int8_dense", "int_k_dense", "spiking", "spiking_reread")
ACCOUNTINGS = ("arithmetic", "weights_in_sram", "weights_in_dram")
PARTS = (
    "products",
    "coding",
    "weights",
    "activations",
    "membranes",
    "shared_products",
    "shared_weights",
    "shared_states",
)
_GRADED_BITS = 8
_MOST = 1e9  # times the spikes of now: what breaks even beyond never does


@dataclass(frozen=True)
class Constants:
    """Energies in picojoules.

    Attributes:
        name: how the report calls them. rows: name, pj, node and source of each. address_bits: of an event.
        pj: name -> picojoules.
    """

    name: str
    rows: list[dict[str, Any]]
    address_bits: int
    pj: dict[str, float]

    def __getitem__(self, name: str) -> float:
        return self.pj[name]


def read_constants(path: str | Path | None = None) -> Constants:
    """The constants of a YAML file like `eval/energy.yaml`; None: those of the project.

    Raises:
        ValueError: no such file, no YAML, or a constant that is missing, unknown or no energy.
    """
    path = CONSTANTS if path is None else Path(path)
    where = f"Energy constants {str(path)!r}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror or error}; give the path of a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where}: not a YAML file ({' '.join(str(error).split())}); take {CONSTANTS.name} as a model."
        ) from None
    expected = {"name": str, "constants": dict, "address_bits": int}
    if not isinstance(content, dict) or content.keys() != expected.keys():
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{where}: expected the keys {', '.join(expected)}; got {found}.")
    for key, kind in expected.items():
        if not isinstance(content[key], kind) or isinstance(content[key], bool):
            raise ValueError(f"{where}: {key} must be a {kind.__name__}; got {content[key]!r}.")
    if content["address_bits"] < 0:
        raise ValueError(f"{where}: address_bits must not be negative; got {content['address_bits']}.")
    constants = content["constants"]
    for name in sorted({*NAMES} ^ constants.keys(), key=str):
        what = "is missing" if name in NAMES else f"is unknown; expected {', '.join(NAMES)}"
        raise ValueError(f"{where}: the constant {name} {what}.")
    return Constants(
        content["name"],
        [_constant(where, name, constants[name]) for name in NAMES],
        content["address_bits"],
        {name: float(constants[name]["pj"]) for name in NAMES},
    )


def _constant(where: str, name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or given.keys() != {"pj", "node", "source"}:
        raise ValueError(
            f"{where}: {name} must be written as {{pj: 1.0, node: 45 nm, source: a paper}}; got {given!r}."
        )
    pj = given["pj"]
    if not isinstance(pj, (int, float)) or isinstance(pj, bool) or not isfinite(pj) or pj < 0:
        raise ValueError(f"{where}: pj of {name} must be a number of picojoules, 0 or more; got {pj!r}.")
    for key in ("node", "source"):
        if not isinstance(given[key], str) or not given[key].strip():
            raise ValueError(f"{where}: {key} of {name} must be a text; got {given[key]!r}.")
    return {"name": name, "pj": float(pj), "node": given["node"], "source": given["source"]}


@dataclass(frozen=True)
class Site:
    """A spike site and its product, of one token.

    Attributes:
        inputs, outputs: sizes of the product. share: tokens that the site sees, of all; below 1 for experts.
        active, rate: active inputs and spikes per input; None without spikes.
        bits: that hold as many levels; None for graded events, or without spikes.
        kind: "code", "neuron", "neuron_code", "events"; None without spikes.
    """

    inputs: int
    outputs: int
    share: float = 1.0
    active: float | None = None
    rate: float | None = None
    bits: int | None = None
    kind: str | None = None

    @property
    def macs(self) -> float:
        """Of the dense product."""
        return self.share * self.inputs * self.outputs


@dataclass(frozen=True)
class Shared:
    """What a token costs in every column alike, and what its sites keep.

    Attributes:
        fp16_macs, fp32_macs: of head, linears of values and attention; of recurrent states and norms.
        weights: of head and linears of values. keys_values, states: numbers of each. membranes: of spike sites.
        inputs: of head and linears of values. outputs: of all products.
    """

    fp16_macs: float = 0.0
    fp32_macs: float = 0.0
    weights: float = 0.0
    keys_values: float = 0.0
    states: float = 0.0
    membranes: float = 0.0
    inputs: float = 0.0
    outputs: float = 0.0


@dataclass(frozen=True)
class Network:
    """One token of a network: its spike sites, and all the rest."""

    sites: tuple[Site, ...]
    shared: Shared = Shared()

    def energy(self, column: str, accounting: str, constants: Constants, scale: float = 1.0) -> dict[str, float]:
        """Picojoules of a token by part (`PARTS`): an estimate.

        Args:
            column: of `COLUMNS`. accounting: of `ACCOUNTINGS`. constants: of operations and bytes.
            scale: as many times the spikes and, up to all inputs, the active inputs of every site; of spiking columns.
        """
        memory = accounting != "arithmetic"
        weight_byte = constants["weight_byte_dram" if accounting == "weights_in_dram" else "weight_byte_sram"]
        total = dict.fromkeys(PARTS, 0.0)
        for site in self.sites:
            one = _site(site, column, constants, scale)
            total["products"] += one[0]
            total["coding"] += one[1]
            if memory:
                total["weights"] += one[2] * weight_byte
                total["activations"] += one[3] * constants["activation_byte"]
        shared = self.shared
        fp16 = constants["fp16_multiply"] + constants["fp16_add"]
        total["shared_products"] = shared.fp16_macs * fp16
        total["shared_products"] += shared.fp32_macs * (constants["fp32_multiply"] + constants["fp32_add"])
        if memory:
            total["shared_weights"] = 2 * shared.weights * weight_byte
            # Keys and values are read; a state is read and written.
            total["shared_states"] = (2 * shared.keys_values + 8 * shared.states) * constants["state_byte"]
            total["activations"] += 2 * (shared.inputs + shared.outputs) * constants["activation_byte"]
            if column.startswith("spiking"):
                total["membranes"] = 8 * shared.membranes * constants["state_byte"]
        return total

    @property
    def rate(self) -> float:
        """Spikes per input, every input weighted by the weights that it reads; 0 if spikes are read by nothing."""
        return self._mean(lambda site: site.rate or 0.0)

    def active(self, scale: float = 1.0) -> float:
        """Share of active inputs, weighted alike."""
        return self._mean(lambda site: min(1.0, scale * (site.active or 0.0)))

    def _mean(self, value: Callable[[Site], float]) -> float:
        macs = sum(site.macs for site in self.sites)
        return sum(site.macs * value(site) for site in self.sites) / macs if macs else 0.0

    def break_even(self, column: str, against: str, accounting: str, constants: Constants) -> float | None:
        """The `scale` of the spikes at which a spiking column costs as much as a dense one.

        None: it costs more even without a spike. Infinity: it costs less at any rate, or there are no spikes to scale.
        """
        target = sum(self.energy(against, accounting, constants).values())

        def excess(scale: float) -> float:
            return sum(self.energy(column, accounting, constants, scale).values()) - target

        return _root(excess)


def _site(site: Site, column: str, pj: Constants, scale: float) -> tuple[float, float, float, float]:
    """Picojoules of product and coding; bytes of weights and activations; of one token."""
    inputs, outputs, macs = site.share * site.inputs, site.share * site.outputs, site.macs
    if column == "fp16_dense":
        return macs * (pj["fp16_multiply"] + pj["fp16_add"]), 0.0, 2 * macs, 2 * inputs
    groups = ceil(site.inputs / GROUP)
    scales = 4 * groups * outputs
    scaling = groups * outputs * (pj["fp32_multiply"] + pj["fp32_add"])
    bits = 8 if column == "int8_dense" else site.bits or _GRADED_BITS
    if column in ("int8_dense", "int_k_dense"):
        quantising = inputs * (2 * pj["fp32_add"] + pj["fp32_multiply"])
        product = macs * (pj["int8_multiply"] * bits / 8 + pj["int8_add"])
        return product, quantising + scaling, macs + scales, inputs * bits / 8
    rate, active = scale * (site.rate or 0.0), min(1.0, scale * (site.active or 0.0))
    graded = site.kind == "events"
    operation = pj["fp16_multiply"] + pj["fp16_add"] if graded else pj["int8_add"]
    reads = active if column == "spiking" else rate
    events = inputs * active * (pj.address_bits + (16 if graded else bits)) / 8
    return macs * rate * operation, inputs * _coding(site.kind, pj) + scaling, macs * reads + scales, events


def _coding(kind: str | None, pj: Constants) -> float:
    """Picojoules that finding the spikes of one input takes.

    A code adds to the mean, divides by the threshold and compares with the dead zone; a neuron decays, adds and
    compares; an event is one comparison.
    """
    code, neuron = pj["fp32_add"] + pj["fp32_multiply"] + pj["fp32_add"], pj["fp32_multiply"] + 2 * pj["fp32_add"]
    return {"code": code, "neuron": neuron, "neuron_code": code + neuron, "events": pj["fp32_add"]}[kind or "code"]


def _root(excess: Callable[[float], float]) -> float | None:
    """Where a function that never falls becomes 0: None if it is above from the beginning, infinity if never."""
    if excess(0.0) > 0:
        return None
    low, high = 0.0, 1.0
    while excess(high) < 0:
        low, high = high, 2 * high
        if high > _MOST:
            return inf
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return high


def network_of(spikes: dict[str, Any], form: str) -> Network:
    """One token of the model, out of the result of the part `spikes`.

    Args:
        spikes: the result. form: "unary" or "bitwise", how counts become spikes.

    Without spike sites all linears but the head stand in their place, so that dense columns can be compared.
    """
    operations = {row["kind"]: row for row in spikes["operations"] if row["network"] == "model"}
    sites = {row["path"]: row for row in spikes["sites"]}
    lines, behind = spikes["linears"], []
    if sites:
        behind = [line for line in lines if line["path"] in sites]
        rest = [line for line in lines if line["fed_by"] == "values"]
    else:  # the head stands last
        behind, rest = lines[:-1], lines[-1:]
    fed = {line["path"]: line for line in behind}
    products = [_product(fed.get(path), row, form) for path, row in sites.items()] if sites else [
        Site(line["inputs"], line["outputs"], line["tokens_share"]) for line in behind
    ]  # fmt: skip
    macs = {kind: (row["dense_macs"] or 0.0) for kind, row in operations.items()}
    states = spikes["states"]
    shared = Shared(
        fp16_macs=sum(line["dense_macs"] for line in rest) + macs["attention"],
        fp32_macs=macs["linear_attention"] + macs["norms"],
        weights=sum(line["dense_macs"] for line in rest),
        keys_values=states["keys_values"],
        states=states["recurrent"],
        membranes=states["membranes"],
        inputs=sum(line["tokens_share"] * line["inputs"] for line in rest),
        outputs=sum(line["tokens_share"] * line["outputs"] for line in lines),
    )
    return Network(tuple(products), shared)


def _product(line: dict[str, Any] | None, row: dict[str, Any], form: str) -> Site:
    """A site; at the output of a block nothing reads it, and it only codes."""
    active = 1 - row["silent_share"]
    rate = active if row["kind"] == "events" else row["firing_rate"][form]
    outputs = 0 if line is None else line["outputs"]
    return Site(row["width"], outputs, row["tokens_share"], active, rate, row["bits"], row["kind"])
