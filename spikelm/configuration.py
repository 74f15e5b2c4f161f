"""SpikeLMConfig: one configuration for every decoder that is built from a list of token mixers and channel mixers.

Fields shared by all blocks are flat; a block's own fields carry its prefix (`attention_`, `ffn_`, `gla_`, `spike_`)
and are checked only where that block is used. Every field of a block is one value for all layers or a list with one
value per layer; `config.at("attention_window", 3)` reads it for a layer. What a block asks of its fields stands in
`spikelm.validation`.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from spikelm.validation import PER_LAYER, ROTATED, validate

# What transformers calls a layer that holds these mixers; its vocabulary is closed.
_LAYER_TYPES = {
    frozenset({"attention"}): "full_attention",
    frozenset({"swa"}): "sliding_attention",
}


def _layer_type(mixer: str) -> str:
    names = frozenset(mixer.split("+"))
    if names in _LAYER_TYPES:
        return _LAYER_TYPES[names]
    sliding = not names.isdisjoint({"swa", "window_linear"})
    return "hybrid" if "attention" in names else "hybrid_sliding" if sliding else "linear_attention"


# What transformers shows to somebody who loads a spikelm folder without `import spikelm`: it prints this text as the
# place of the code that the model needs, instead of advising to update transformers.
_WHERE_THE_CODE_IS = {"AutoConfig": "the package spikelm (run `import spikelm` first)--spikelm.SpikeLMConfig"}


@strict
class SpikeLMConfig(PreTrainedConfig):
    """Configuration of a spikelm decoder.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
            head_dim, hidden_act, max_position_embeddings, initializer_range, tie_word_embeddings: as in Llama.
            `num_key_value_heads` defaults to the query heads, `head_dim` to `hidden_size // num_attention_heads`.
        mixers: the token mixer of every layer: `attention` (full), `swa` (sliding window), `gla` (gated linear
            attention), `retention`, `window_linear` (softmax over a window, linear attention before it), `delta` (Gated
            DeltaNet), `rwkv4`, `rwkv7`, `hgrn`, `mingru`, `egru`, `egru_stack`, or two side by side as `gla+swa`. One
            name stands for all layers.
        ffns: the channel mixer of every layer: `gated` (SwiGLU, GeGLU: decided by `hidden_act`), `rwkv` and
            `rwkv7` (squared ReLU behind a token shift), `moe` (a routed mixture of gated ones), `none`.
        pre_norm, post_norm: norm before and after mixer and ffn (`rmsnorm`, `rmsnorm_1p` with weight 1 + w,
            `layernorm`, `identity`); per layer if a list. `final_norm`: before the head.
        norm_eps: epsilon of all norms. residual: whether a block adds to its input.
        residual_dropout: on the residual stream, behind every layer, in training.
        embedding_scale: factor on the token embeddings. embedding_norm: norm of the embeddings. binary_embedding:
            embeddings become 0 or 1 by their sign (SpikeGPT). logit_softcap: `c * tanh(logits / c)` if given.
        head_bias: whether the language-model head has a bias (zero at first), tied or not.
        rope_parameters: the "global" RoPE, in transformers' form; `local_rope_parameters`: a second one.
        attention_rope: which RoPE a layer that rotates q and k uses: `global`, `local`, `none`.
        attention_window: width w of `swa` and `window_linear`: a query sees w keys, itself included.
        attention_window_off_by_one: parity with SpikingBrain's release: passes over several tokens see w + 1 keys,
            single-token steps w.
        attention_sinks: the first tokens of a text that every window keeps seeing.
        attention_bias, attention_output_bias: biases of q, k, v and of o. attention_dropout: on attention weights.
        attention_qk_norm: `none`, `head` (one norm over each head), `full` (one norm across all heads).
        attention_scale: factor on q k^T, default `head_dim ** -0.5`. attention_softcap: cap on the scores.
        attention_query_spikes, attention_int8_keys_values: parity with SpikingBrain's W8ASpike: rotated queries are
            spike-coded with `spike_k`, keys and values rounded to int8 steps, all per token and head.
        parallel_shared_projections: whether `a+b` layers share one set of q, k, v, o projections.
        parallel_norms: which branches of `a+b` layers with shared projections have an output norm: `both`, as
            published, or `linear`: only the one that forgets. Its weight is then 0 at the start, so that the layer
            begins as its softmax branch.
        ffn_bias: biases of the gated ffn.
        moe_experts, moe_top_k: routed experts of `moe` beside the shared one, and how many of them a token takes.
        rwkv_decay_rank, rwkv_rate_rank, rwkv_value_rank, rwkv_gate_rank: ranks of RWKV-7's low-rank maps; None: as
            published for the width.
        rwkv_idle_value_mix: whether a first layer `rwkv7` carries the value mix that nothing reads there, as files of
            the published trainer do.
        event_threshold: initial threshold of the events of `hgrn` and `mingru`; learned per channel.
        egru_form: `evnn` or `paper`, the two published cells, see `spikelm.kernels.egru`. egru_size: cells H of `egru`,
            default hidden_size. egru_heads: blocks of its recurrent matrix; 1: a full matrix.
        egru_stack_sizes: cells of each step of `egru_stack`, e.g. [1350, 1350, 750], the last hidden_size; one list
            for all layers that use it.
        egru_zoneout: probability that a cell keeps its state at a token: drawn in training, the mean in evaluation.
        egru_dampening, egru_support: height and inverse half width of the surrogate gradient.
        egru_threshold_mean: mean of the initial thresholds, which are learned per cell in [0, 1].
        egru_drop_internal: parity with EvNN's benchmark: a pass takes over the last events, not the internal states.
        gla_feature_map: `relu`, `sigmoid` or `softplus` on q and k.
        gla_gate: `low_rank` or `dense` (learned, log-sigmoid of two linears or of one), or `tied` (decay 1 - k; needs
            the sigmoid map).
        gla_gate_rank, gla_gate_normalizer, gla_gate_bias: rank of the gate, divisor of its log-decay, initial bias
            of its logit (0 as published: a half-life of 16 tokens).
        gla_longest_memory: if given, the gates of a head begin with half-lives spread evenly in the logarithm, from
            that of `gla_gate_bias` to this many tokens.
        delta_longest_memory: if given, the heads of `delta` begin with half-lives spread evenly in the logarithm, from
            16 to this many tokens; None: as in Mamba-2.
        window_linear_feature_map: `hedgehog` or `relu`, of a learned map of each head of q and k.
        spike_sites: which activations are spike-coded: any of `qkv`, `o`, `gate_up`, `down` (in front of the linears
            that read them), `mixer_out`, `ffn_out` (what a block adds to the stream); one list for all layers or a
            list of lists.
        spike_k: counts per mean magnitude: threshold V = mean|x| / k (SpikingBrain, section 2.1: k = 3).
        spike_dead_zone: |x| below this share of the mean magnitude is silent.
        spike_dead_zone_per_channel: whether a site holds one dead zone for each channel or one for all.
        spike_threshold: `token` (mean|x| of each token), `calibrated` (a stored mean per layer and site),
            `learned` (the same, trained).
        spike_magnitude: initial mean magnitude for `calibrated` and `learned`, in units of the activation.
        spike_code: how counts become trains: `binary`, `ternary`, `bitwise`, `twos_complement`.
        spike_max_count: counts are clipped to this magnitude; None: never. 1 makes the code binary or ternary.
        spike_neuron: `none` (sites code each token by itself), or neurons with a membrane: `lif`, `plif`,
            `astrocyte`, `dsn`, see `spikelm.spiking.neurons`.
        neuron_decay, neuron_threshold, neuron_reset, neuron_detach_reset, neuron_surrogate, neuron_width, neuron_gain,
            neuron_temporal_grad, neuron_grad_window: as in `spikelm.kernels.lif.lif`; for `plif` and `dsn` the decay
            (and threshold of plif) is where learning starts. The defaults are SpikeGPT's unit.
        weight_group_size: every linear of a layer carries the scales of its integer weights, one for each row and group
            of so many input channels (see `spikelm.grid`); None: weights are plain floats.
        packed_weights: format of a checkpoint whose weights are laid out for inference, see `spikelm.inference`; None:
            the layout that trains.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field of another type or range, with what was expected.
    """

    model_type = "spikelm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    # Outputs are gathered after every projection: a spike site needs the mean over all channels of a token, and gated
    # linear attention whole heads. Splitting columns and rows in pairs, as in Llama, would silently change thresholds.
    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise_gather_output",
        "layers.*.mixer.k_proj": "colwise_gather_output",
        "layers.*.mixer.v_proj": "colwise_gather_output",
        "layers.*.mixer.o_proj": "colwise_gather_output",
        "layers.*.ffn.gate_proj": "colwise_gather_output",
        "layers.*.ffn.up_proj": "colwise_gather_output",
        "layers.*.ffn.down_proj": "colwise_gather_output",
    }

    vocab_size: int = 32000
    hidden_size: int = 576
    intermediate_size: int | list[int] = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 9
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float | int = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    mixers: str | list[str] = "attention"
    ffns: str | list[str] = "gated"
    layer_types: list[str] | None = None
    auto_map: dict | None = None
    pre_norm: str | list[str] = "rmsnorm"
    post_norm: str | list[str] = "identity"
    final_norm: str = "rmsnorm"
    norm_eps: float | int = 1e-6
    residual: bool | list[bool] = True
    residual_dropout: float | int = 0.0
    embedding_scale: float | int = 1.0
    embedding_norm: str = "identity"
    binary_embedding: bool = False
    logit_softcap: float | int | None = None
    head_bias: bool = False

    rope_parameters: dict | None = None
    local_rope_parameters: dict | None = None
    attention_rope: str | list[str] = "global"
    attention_window: int | list[int | None] | None = None
    attention_window_off_by_one: bool = False
    attention_sinks: int | list[int] = 0
    attention_bias: bool | list[bool] = False
    attention_output_bias: bool | list[bool] = False
    attention_dropout: float | int = 0.0
    attention_qk_norm: str | list[str] = "none"
    attention_scale: float | int | None = None
    attention_softcap: float | int | None = None
    attention_query_spikes: bool = False
    attention_int8_keys_values: bool = False
    parallel_shared_projections: bool | list[bool] = True
    parallel_norms: str | list[str] = "both"

    ffn_bias: bool | list[bool] = False
    moe_experts: int = 16
    moe_top_k: int = 1

    rwkv_decay_rank: int | None = None
    rwkv_rate_rank: int | None = None
    rwkv_value_rank: int | None = None
    rwkv_gate_rank: int | None = None
    rwkv_idle_value_mix: bool = False
    event_threshold: float | int | list[float | int] = 0.0

    egru_form: str | list[str] = "evnn"
    egru_heads: int | list[int] = 1
    egru_size: int | list[int | None] | None = None
    egru_stack_sizes: list[int] | None = None
    egru_zoneout: float | int | list[float | int] = 0.0
    egru_dampening: float | int = 0.7
    egru_support: float | int = 1.0
    egru_threshold_mean: float | int | list[float | int] = 0.3
    egru_drop_internal: bool = False

    gla_feature_map: str | list[str] = "relu"
    gla_gate: str | list[str] = "low_rank"
    gla_gate_rank: int | list[int] = 16
    gla_gate_normalizer: float | int = 16
    gla_gate_bias: float | int | list[float | int] = 0.0
    gla_longest_memory: float | int | None = None
    delta_longest_memory: float | int | None = None

    window_linear_feature_map: str | list[str] = "hedgehog"

    spike_sites: list[str] | list[list[str]] | None = None
    spike_k: float | int | list[float | int] = 3.0
    spike_dead_zone: float | int | list[float | int] = 0.0
    spike_dead_zone_per_channel: bool = False
    spike_threshold: str = "token"
    spike_magnitude: float | int = 1.0
    spike_code: str = "bitwise"
    spike_max_count: int | None = None
    spike_neuron: str | list[str] = "none"
    neuron_decay: float | int = 0.5
    neuron_threshold: float | int = 1.0
    neuron_reset: str = "hard"
    neuron_detach_reset: bool = False
    neuron_surrogate: str = "atan"
    neuron_width: float | int = 1.0
    neuron_gain: str = "euler"
    neuron_temporal_grad: str = "full"
    neuron_grad_window: int | None = None

    weight_group_size: int | None = None
    packed_weights: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if isinstance(self.mixers, str):
            self.mixers = [self.mixers] * self.num_hidden_layers
        if isinstance(self.ffns, str):
            self.ffns = [self.ffns] * self.num_hidden_layers
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
        self.auto_map = dict(_WHERE_THE_CODE_IS)
        self.layer_types = [_layer_type(mixer) for mixer in self.mixers]
        super().__post_init__(**kwargs)

    @property
    def head_shape(self) -> tuple[int, int, int]:
        """Query heads, key-value heads, channels of a head."""
        assert self.num_key_value_heads is not None and self.head_dim is not None  # filled when made
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    def at(self, field: str, layer_idx: int) -> Any:
        """The value of `field` in layer `layer_idx`: the field itself, or its entry if it is a list per layer.

        A list that is one value for all layers, such as `egru_stack_sizes`, comes back whole.
        """
        value = getattr(self, field)
        return value[layer_idx] if field in PER_LAYER and isinstance(value, list) else value

    def sites_at(self, layer_idx: int) -> tuple[str, ...]:
        """The spike sites of layer `layer_idx`."""
        sites = self.spike_sites or []
        if sites and isinstance(sites[0], list):
            return tuple(sites[layer_idx])
        return tuple(sites)

    @property
    def is_spiking(self) -> bool:
        """Whether any layer has a spike site."""
        return any(self.sites_at(i) for i in range(self.num_hidden_layers))

    @property
    def uses_long_rope(self) -> bool:
        """Whether the rotation of early tokens depends on how long the text has become (LongRoPE, Phi-3)."""
        assert self.rope_parameters is not None  # filled when made
        return self.rope_parameters.get("rope_type") == "longrope"

    def validate_rope(self) -> None:
        """Check the rotary fields where a mixer rotates."""
        if any(ROTATED & set(mixer.split("+")) for mixer in self.mixers):
            super().validate_rope()

    def validate_architecture(self) -> None:
        """Check what one field's type cannot: sizes against each other, names, lengths of per-layer lists."""
        validate(self)
