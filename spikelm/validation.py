"""What a configuration must satisfy beyond the types of its fields: names, ranges, sizes against each other.

A mixer or ffn that asks something of its own fields has a function in `CHECKS`, called only for layers that use it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig

NORMS = ("rmsnorm", "rmsnorm_1p", "layernorm", "identity")
ROPES = ("global", "local", "none")
READ_SITES = ("qkv", "o", "gate_up", "down")  # in front of linears
SITES = (*READ_SITES, "mixer_out", "ffn_out")  # and at the outputs of blocks
CODES = ("binary", "ternary", "bitwise", "twos_complement")
THRESHOLDS = ("token", "calibrated", "learned")
NEURONS = ("none", "lif", "plif", "astrocyte", "dsn")
FEATURE_MAPS = ("relu", "sigmoid", "softplus")
LEARNED_MAPS = ("hedgehog", "relu")
PARALLEL_NORMS = ("both", "linear")
GATES = ("low_rank", "dense", "tied")
FFNS = ("gated", "moe", "rwkv", "rwkv7", "none")
# These mix heads between shared q, k, v, o projections.
HEAD_MIXERS = ("attention", "swa", "gla", "retention", "window_linear", "delta")
MIXERS = (*HEAD_MIXERS, "rwkv4", "rwkv7", "hgrn", "mingru", "egru", "egru_stack")
ROTATED = frozenset({"attention", "swa", "retention", "window_linear"})
EGRU_FORMS = ("evnn", "paper")
PACKED_WEIGHTS = ("fp32", "bf16", "int8", "int4")

# Fields that may be a list with one value for each layer.
PER_LAYER = (
    "intermediate_size", "mixers", "ffns", "pre_norm", "post_norm", "residual", "attention_rope", "attention_window",
    "attention_sinks", "attention_bias", "attention_output_bias", "attention_qk_norm", "parallel_shared_projections",
    "parallel_norms", "ffn_bias", "gla_feature_map", "gla_gate", "gla_gate_rank", "gla_gate_bias", "spike_k",
    "spike_dead_zone", "spike_neuron", "event_threshold", "window_linear_feature_map", "egru_form", "egru_heads",
    "egru_size", "egru_zoneout", "egru_threshold_mean",
)  # fmt: skip


def choice(field: str, value: Any, allowed: tuple[str, ...], where: str = "") -> None:
    """Raise unless value is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{field}{where} must be one of {', '.join(allowed)}; got {value!r}.")


def positive(field: str, value: Any, where: str = "") -> None:
    """Raise unless value is a positive number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{field}{where} must be a positive number; got {value!r}.")


def share(field: str, value: Any, where: str = "") -> None:
    """Raise unless value lies in [0, 1)."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{field}{where} must be at least 0 and below 1; got {value!r}.")


def validate(config: "SpikeLMConfig") -> None:
    """Raise ValueError, saying what was expected, if the fields do not make a decoder."""
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
        positive(field, getattr(config, field))
    positive("num_key_value_heads", config.num_key_value_heads)
    heads, shared, _ = config.head_shape
    if heads % shared:
        raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({shared}).")
    for field in PER_LAYER:
        value = getattr(config, field)
        if isinstance(value, list) and len(value) != config.num_hidden_layers:
            raise ValueError(
                f"{field} has {len(value)} entries for {config.num_hidden_layers} layers; give one value or one per "
                "layer."
            )
    choice("final_norm", config.final_norm, NORMS)
    choice("embedding_norm", config.embedding_norm, NORMS)
    share("residual_dropout", config.residual_dropout)
    if config.weight_group_size is not None:
        positive("weight_group_size", config.weight_group_size)
    if config.packed_weights is not None:
        choice("packed_weights", config.packed_weights, PACKED_WEIGHTS)
    for i in range(config.num_hidden_layers):
        _layer(config, i, f" of layer {i}")
    _spikes(config)


def _layer(config: "SpikeLMConfig", i: int, where: str) -> None:
    mixers = config.mixers[i].split("+")
    for name in mixers:
        choice("mixers", name, MIXERS, where)
    if len(mixers) > 2 or len(set(mixers)) != len(mixers):
        raise ValueError(f"mixers{where} must name one mixer or two different ones; got {config.mixers[i]!r}.")
    choice("parallel_norms", config.at("parallel_norms", i), PARALLEL_NORMS, where)
    if set(mixers) == {"attention", "swa"}:
        raise ValueError(f"mixers{where}: {config.mixers[i]!r} cannot stand side by side; use e.g. 'gla+swa'.")
    choice("ffns", config.ffns[i], FFNS, where)
    choice("pre_norm", config.at("pre_norm", i), NORMS, where)
    choice("post_norm", config.at("post_norm", i), NORMS, where)
    choice("attention_qk_norm", config.at("attention_qk_norm", i), ("none", "head", "full"), where)
    if config.ffns[i] != "none":
        positive("intermediate_size", config.at("intermediate_size", i), where)
    if ROTATED & set(mixers):
        rope = config.at("attention_rope", i)
        choice("attention_rope", rope, ROPES, where)
        if rope == "local" and not config.local_rope_parameters:
            raise ValueError(f"attention_rope{where} is 'local', but local_rope_parameters is not given.")
    for name in (*mixers, config.ffns[i]):
        if name in CHECKS:
            CHECKS[name](config, i, where)


def _window(config: "SpikeLMConfig", i: int, where: str, mixer: str) -> None:
    window = config.at("attention_window", i)
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"attention_window{where} must be at least 1 for {mixer!r}; got {window!r}.")


def _swa(config: "SpikeLMConfig", i: int, where: str) -> None:
    _window(config, i, where, "swa")
    if config.at("attention_sinks", i) < 0:
        raise ValueError(f"attention_sinks{where} must not be negative.")


def _gla(config: "SpikeLMConfig", i: int, where: str) -> None:
    choice("gla_feature_map", config.at("gla_feature_map", i), FEATURE_MAPS, where)
    choice("gla_gate", config.at("gla_gate", i), GATES, where)
    positive("gla_gate_normalizer", config.gla_gate_normalizer)
    if config.gla_longest_memory is not None:
        positive("gla_longest_memory", config.gla_longest_memory)
    if config.at("gla_gate", i) == "tied" and config.at("gla_feature_map", i) != "sigmoid":
        raise ValueError(
            f"gla_gate{where} is 'tied' (decay 1 - k), which needs k in (0, 1): set gla_feature_map to "
            f"'sigmoid'; got {config.at('gla_feature_map', i)!r}."
        )


def _delta(config: "SpikeLMConfig", i: int, where: str) -> None:
    if config.delta_longest_memory is not None:
        positive("delta_longest_memory", config.delta_longest_memory)


def _rwkv7(config: "SpikeLMConfig", i: int, where: str) -> None:
    heads, _, width = config.head_shape
    if heads * width != config.hidden_size:
        raise ValueError(
            f"mixers{where}: 'rwkv7' has num_attention_heads x head_dim = hidden_size; got {heads} x {width} and "
            f"{config.hidden_size}."
        )
    for name in ("decay", "rate", "value", "gate"):
        if (rank := getattr(config, f"rwkv_{name}_rank")) is not None:
            positive(f"rwkv_{name}_rank", rank)


def _moe(config: "SpikeLMConfig", i: int, where: str) -> None:
    positive("moe_experts", config.moe_experts)
    if not 1 <= config.moe_top_k <= config.moe_experts:
        raise ValueError(
            f"moe_top_k must lie between 1 and moe_experts ({config.moe_experts}) for the ffn{where}; got "
            f"{config.moe_top_k}."
        )
    inner = sorted({"gate_up", "down"} & set(config.sites_at(i)))
    if inner and config.at("spike_neuron", i) != "none":
        raise ValueError(
            f"spike_sites{where}: {' and '.join(inner)} lie inside the experts of 'moe', which see some tokens only: "
            f"the membrane of {config.at('spike_neuron', i)!r} has no time there. Leave them out, or set spike_neuron "
            "of the layer to 'none'."
        )


def _window_linear(config: "SpikeLMConfig", i: int, where: str) -> None:
    _window(config, i, where, "window_linear")
    choice("window_linear_feature_map", config.at("window_linear_feature_map", i), LEARNED_MAPS, where)
    if config.attention_softcap is not None:
        raise ValueError(
            f"attention_softcap is {config.attention_softcap!r}, but 'window_linear'{where} has scores without a cap: "
            "set it to None, or choose another mixer."
        )


def _egru(config: "SpikeLMConfig", i: int, where: str) -> None:
    choice("egru_form", config.at("egru_form", i), EGRU_FORMS, where)
    heads, width = config.at("egru_heads", i), config.at("egru_size", i)
    width = config.hidden_size if width is None else width
    positive("egru_heads", heads, where)
    positive("egru_size", width, where)
    if width % heads:
        raise ValueError(f"egru_heads{where} ({heads}) must divide the {width} cells (egru_size, or hidden_size).")
    _egru_cell(config, i, where)


def _egru_stack(config: "SpikeLMConfig", i: int, where: str) -> None:
    sizes = config.egru_stack_sizes
    if not sizes or min(sizes) < 1 or sizes[-1] != config.hidden_size:
        raise ValueError(
            f"egru_stack_sizes must list how many cells each step of 'egru_stack' has, the last hidden_size "
            f"({config.hidden_size}); got {sizes!r}."
        )
    _egru_cell(config, i, where)


def _egru_cell(config: "SpikeLMConfig", i: int, where: str) -> None:
    share("egru_zoneout", config.at("egru_zoneout", i), where)
    positive("egru_dampening", config.egru_dampening)
    positive("egru_support", config.egru_support)
    mean = config.at("egru_threshold_mean", i)
    positive("egru_threshold_mean", mean, where)
    share("egru_threshold_mean", mean, where)


CHECKS: dict[str, Callable[["SpikeLMConfig", int, str], None]] = {
    "swa": _swa,
    "gla": _gla,
    "window_linear": _window_linear,
    "delta": _delta,
    "rwkv7": _rwkv7,
    "moe": _moe,
    "egru": _egru,
    "egru_stack": _egru_stack,
}


def _spikes(config: "SpikeLMConfig") -> None:
    sites = config.spike_sites or []
    nested = [isinstance(s, list) for s in sites]
    if any(nested) and (not all(nested) or len(sites) != config.num_hidden_layers):
        raise ValueError(
            "spike_sites must be one list of sites, or one list per layer "
            f"({config.num_hidden_layers} lists); got {len(sites)} entries."
        )
    for i in range(config.num_hidden_layers):
        where = f" of layer {i}"
        for site in config.sites_at(i):
            choice("spike_sites", site, SITES, where)
        positive("spike_k", config.at("spike_k", i), where)
        if config.at("spike_dead_zone", i) < 0:
            raise ValueError(f"spike_dead_zone{where} must not be negative.")
        choice("spike_neuron", config.at("spike_neuron", i), NEURONS, where)
        if config.sites_at(i) and config.at("spike_neuron", i) != "none":
            _neuron(config, config.at("spike_neuron", i), where)
    choice("spike_threshold", config.spike_threshold, THRESHOLDS)
    choice("spike_code", config.spike_code, CODES)
    positive("spike_magnitude", config.spike_magnitude)
    if config.spike_max_count is not None:
        positive("spike_max_count", config.spike_max_count)


def _neuron(config: "SpikeLMConfig", neuron: str, where: str) -> None:
    if neuron != "dsn" and config.spike_code not in ("binary", "ternary"):
        raise ValueError(
            f"spike_neuron{where}: {neuron!r} fires 0 and 1, or with OFF units -1, 0 and 1: set spike_code to 'binary' "
            f"or 'ternary', or use 'dsn'; got {config.spike_code!r}."
        )
    decay = config.neuron_decay
    if not 0 <= decay < 1 or (neuron in ("plif", "dsn") and decay == 0):
        raise ValueError(f"neuron_decay must lie in [0, 1), for a learned decay above 0; got {decay!r}.")
    positive("neuron_threshold", config.neuron_threshold)
    positive("neuron_width", config.neuron_width)
    choice("neuron_reset", config.neuron_reset, ("hard", "soft", "none"))
    choice("neuron_surrogate", config.neuron_surrogate, ("atan", "sigmoid", "triangle", "rectangle"))
    choice("neuron_gain", config.neuron_gain, ("euler", "additive"))
    choice("neuron_temporal_grad", config.neuron_temporal_grad, ("full", "truncated", "none"))
    if (config.neuron_temporal_grad == "truncated") != (config.neuron_grad_window is not None):
        raise ValueError(
            "neuron_grad_window must be given with neuron_temporal_grad 'truncated' and left out otherwise; got "
            f"{config.neuron_grad_window!r} with {config.neuron_temporal_grad!r}."
        )
    if config.neuron_grad_window is not None:
        positive("neuron_grad_window", config.neuron_grad_window)
