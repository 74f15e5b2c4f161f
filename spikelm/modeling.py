"""One decoder for every block: embeddings, layers of (mixer, ffn), a final norm, a head.

    x = x + out(post(mixer(pre(x))));  x = x + out(post(ffn(pre(x))))

Which mixer, which ffn (or none), which norms, residual or not, spikes at the output or not: the configuration says so
for each layer.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from spikelm.cache import CACHE_NAME, SpikeCache, Stateful
from spikelm.configuration import SpikeLMConfig
from spikelm.context import ForwardContext, check_padding
from spikelm.ffns import FFNS
from spikelm.grid import add_grids
from spikelm.inference.decoder import LayerRun
from spikelm.initial import fill
from spikelm.mixers import make_mixer
from spikelm.mixers.attention import SoftmaxCore
from spikelm.norms import make_norm
from spikelm.precision import KeepsDtype
from spikelm.rotary import RotaryEmbedding, make_rotaries
from spikelm.spiking.neurons import fire
from spikelm.spiking.site import NoSite, make_site


class SpikeLMDecoderLayer(GradientCheckpointingLayer):
    """One mixer and one ffn, each between its norms: `[B, T, hidden]` -> `[B, T, hidden]`.

    Sites `mixer_out` and `ffn_out` code what mixer and ffn add to the residual stream (SpikeGPT's placement).
    """

    site_readers = {"mixer_out_site": (), "ffn_out_site": ()}

    def __init__(self, config: SpikeLMConfig, layer_idx: int):
        super().__init__()

        def norm(field: str) -> nn.Module:
            return make_norm(config.at(field, layer_idx), config.hidden_size, config.norm_eps)

        self.residual = config.at("residual", layer_idx)
        self.dropout = config.residual_dropout
        self.mixer_norm, self.mixer_post_norm = norm("pre_norm"), norm("post_norm")
        self.mixer = make_mixer(config, layer_idx)
        self.mixer_out_site = make_site(config, layer_idx, "mixer_out", config.hidden_size)
        self.ffn: nn.Module | None = None
        if config.ffns[layer_idx] != "none":
            self.ffn_norm, self.ffn_post_norm = norm("pre_norm"), norm("post_norm")
            self.ffn = FFNS[config.ffns[layer_idx]](config, layer_idx)
        self.ffn_out_site = make_site(config, layer_idx, "ffn_out", config.hidden_size) if self.ffn else NoSite()
        if config.weight_group_size is not None:
            add_grids(self, config.weight_group_size)
        for name, module in self.named_modules():
            if isinstance(module, Stateful):
                module.state_path = name

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Mix tokens, then channels."""
        mixed = self.mixer_post_norm(self.mixer(self.mixer_norm(hidden_states), context))
        mixed = self.mixer_out_site(mixed, context)
        x = hidden_states + mixed if self.residual else mixed
        if self.ffn is None:
            return self._dropped(x)
        fed = self.ffn_post_norm(self.ffn(self.ffn_norm(x), context))
        fed = self.ffn_out_site(fed, context)
        return self._dropped(x + fed if self.residual else fed)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class SpikeLMPreTrainedModel(PreTrainedModel):
    """What all spikelm models share: initial values, what may be split, what stays in float32."""

    config: SpikeLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpikeLMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True
    _can_record_outputs = {
        "hidden_states": SpikeLMDecoderLayer,
        "attentions": OutputRecorder(SoftmaxCore, index=1),
    }
    prepared: Any = None  # how `spikelm.prepare_for_inference` stored the weights

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a folder of packed weights becomes a prepared model, with `events` as an option."""
        from spikelm.inference.packed import is_packed, load_packed  # builds on this file

        if not is_packed(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config = kwargs.get("config") or SpikeLMConfig.from_pretrained(pretrained_model_name_or_path)
        options = {name: kwargs[name] for name in ("events", "dtype") if name in kwargs}
        return load_packed(cls, config, pretrained_model_name_or_path, **options)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; a prepared model is written as packed weights, see `spikelm.inference.packed`."""
        self.config.packed_weights = None if self.prepared is None else self.prepared.weights
        if self.prepared is None:
            super().save_pretrained(save_directory, *args, **kwargs)
        else:
            from spikelm.inference.packed import save_packed  # builds on this file

            save_packed(self, save_directory)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; embedding and head of a prepared model share their table already."""
        if self.prepared is None:
            super().tie_weights(*args, **kwargs)

    def post_init(self) -> None:
        """Called at the end of every constructor: what holds its own precision is loaded in it."""
        keeping = (path for path, module in self.named_modules() if isinstance(module, KeepsDtype))
        self._keep_in_fp32_modules_strict = {path.rpartition(".")[2] for path in keeping}
        super().post_init()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        # Re-entrant checkpointing runs layers without gradients first: values that cross layers would be constants.
        function = kwargs.get("gradient_checkpointing_func", args[0] if args else None)
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
        if enable and reentrant and any(getattr(m, "reads_earlier_layers", False) for m in self.modules()):
            raise ValueError(
                "use_reentrant=True would lose gradients of values that cross layers, as those of RWKV-7's first layer "
                "do. Leave it out, or give use_reentrant=False."
            )
        super()._set_gradient_checkpointing(enable, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # `init` leaves tensors alone that a checkpoint has filled; writing in place would not.
        if isinstance(module, RotaryEmbedding):
            compute = module.compute_default_rope_parameters
            if module.rope_type != "default":
                super()._init_weights(module)
                return
            frequencies, _ = compute(module.config)
            init.copy_(module.inv_freq, frequencies)
            init.copy_(module.original_inv_freq, frequencies)
        else:
            super()._init_weights(module)
            fill(module)


class SpikeLMModel(SpikeLMPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embedding_norm = make_norm(config.embedding_norm, config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleList(SpikeLMDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config.final_norm, config.hidden_size, config.norm_eps)
        self.rotary = nn.ModuleDict(make_rotaries(config))
        self.gradient_checkpointing = False
        self.runs: list[Any] | None = None  # in a prepared model: the layers, plain ones in runs
        self.post_init()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        for run in self.runs or ():
            if isinstance(run, LayerRun):
                run.forget()
        return super()._apply(*args, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SpikeCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: SpikeCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: `[B, T]` int64; or `inputs_embeds` `[B, T, hidden]`.
            attention_mask: `[B, T]` or `[B, past + T]`, 0 for padding (left, right or in between).
            position_ids: `[B, T]` int64; a position that does not grow starts a new document.
            cache: a `SpikeCache` with the states of the text so far.
            use_cache: whether to return a cache.
            cu_seqlens: `[N + 1]` int, starts of the documents packed into a batch of one row, and its end.
            past_key_values: the name of `cache` in transformers before 5.24.

        Raises:
            ValueError: not exactly one kind of input, a foreign cache, a mask or boundaries that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.shape[1] == 0:
            raise ValueError(f"There is no token in a batch of {x.shape[0]} x 0; give at least one.")
        if self.config.embedding_scale != 1.0:
            # Rounded to the dtype of the embeddings first, as the sources do.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device=x.device)
        if use_cache and self.gradient_checkpointing and self.training:
            use_cache = False
        if self.config.binary_embedding:
            x = fire(x)
        x = self.embedding_norm(x)
        check_padding(attention_mask, x.shape[0], x.shape[1])
        cache = _checked_cache(cache, past_key_values)
        if cache is None and use_cache:
            cache = SpikeCache(self.config)

        if cu_seqlens is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        simple = cu_seqlens is None and attention_mask is None and position_ids is None
        if simple and cache is not None and _goes_on(x, cache):
            context, position_ids = ForwardContext.next_token(cache)
        else:
            restarts = None if cu_seqlens is None else _restarts(cu_seqlens, x)
            if position_ids is None:
                position_ids = _positions(x, attention_mask, cache, restarts)
            position_ids = position_ids.expand(x.shape[0], -1)
            context = ForwardContext.build(position_ids, attention_mask, cache, restarts)
        context.rope = {name: rotary(x, position_ids) for name, rotary in self.rotary.items()}
        for layer in self.layers if self.runs is None else self.runs:
            x = layer(x, context=context)
        context.finish(position_ids)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE_NAME: cache if use_cache else None})


class SpikeLMForCausalLM(SpikeLMPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.model = SpikeLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SpikeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: SpikeCache | None = None,
        head_loss: Callable[[Tensor, nn.Linear], Any] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T, vocab]`, and the loss if `labels` `[B, T]` (-100: ignored) are given.

        See `SpikeLMModel.forward` for the other arguments.

        Args:
            logits_to_keep: only for the last n tokens, or for the given indices.
            head_loss: called with the last hidden states `[B, T, hidden]` and the head, instead of the head; what it
                returns is the loss, and there are no logits. In here, a model whose parameters are sharded holds the
                whole weight of the head.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_checked_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if head_loss is not None:
            loss = head_loss(out.last_hidden_state, self.lm_head)
            return CausalLMOutputWithPast(loss=loss, hidden_states=out.hidden_states, attentions=out.attentions)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **{CACHE_NAME: out.get(CACHE_NAME)},
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        # transformers' own caches hold keys and values only, or forget recurrent states without an error.
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not available for spikelm "
                "models: their states live in a SpikeCache. Leave cache_implementation unset."
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = SpikeCache(self.config)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # `generate` takes embeddings only where this name is in the signature
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What one step of `generate` feeds the model."""
        cache, rope = kwargs.get(CACHE_NAME), self.config.rope_parameters
        if rope and self.config.uses_long_rope and isinstance(cache, SpikeCache):
            # A text that outgrows the short form of LongRoPE is rotated anew as a whole: cached keys are void.
            limit = rope["original_max_position_embeddings"]
            slots = cache.get_seq_length()
            if attention_mask is None:  # what began as embeddings is longer than its input_ids
                tokens = max(input_ids.shape[1], slots + (next_sequence_length or 0))
            else:
                tokens = int(attention_mask.sum(1).max())
            seen = cache.shared.states.get("tokens")
            if seen is not None and int(seen.max()) <= limit < tokens:
                if input_ids.shape[1] <= slots:
                    raise ValueError(
                        f"The text outgrows {limit} tokens, where LongRoPE rotates all of it anew, but its beginning "
                        "is not in input_ids: start from tokens instead of embeddings."
                    )
                cache.reset()
                next_sequence_length = None
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class SpikeLMForSequenceClassification(GenericForSequenceClassification, SpikeLMPreTrainedModel):
    """The decoder with a classification head on the last real token."""


class SpikeLMForTokenClassification(GenericForTokenClassification, SpikeLMPreTrainedModel):
    """The decoder with a classification head on every token."""


def _checked_cache(cache: Any, past_key_values: Any = None) -> SpikeCache | None:
    """The one of the two names that was given, if it is a cache of ours."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them.")
    cache = past_key_values if cache is None else cache
    if cache is None or isinstance(cache, SpikeCache):
        return cache
    raise ValueError(
        f"cache must be a SpikeCache, got {type(cache).__name__}: a spikelm model carries recurrent states too. Use "
        "the cache that the model returned, or SpikeCache(model.config)."
    )


def _goes_on(x: Tensor, cache: SpikeCache) -> bool:
    """Whether `x` `[B, 1, hidden]` is the next token of texts without padding or document boundaries so far."""
    return (
        cache.plain
        and x.shape[1] == 1
        and "position" in cache.shared.states
        and cache.shared.states["position"].shape[0] == x.shape[0]
        and not torch.compiler.is_compiling()
    )


def _restarts(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    """`[1, T]` bool, True at the first token of every packed document but the first of the row."""
    if x.shape[0] != 1 or int(cu_seqlens[-1]) != x.shape[1]:
        raise ValueError(
            f"cu_seqlens packs documents into one row: expected a batch of 1 with {int(cu_seqlens[-1])} tokens, got "
            f"{tuple(x.shape[:2])}."
        )
    restarts = torch.zeros(1, x.shape[1] + 1, dtype=torch.bool, device=x.device)
    restarts[0, cu_seqlens.long()] = True
    restarts[0, 0] = False
    return restarts[:, :-1]


def _positions(x: Tensor, attention_mask: Tensor | None, cache: SpikeCache | None, restarts: Tensor | None) -> Tensor:
    """`[B, T]`: positions in the document, going on where the cache stopped; padding takes none."""
    batch, length = x.shape[:2]
    real = torch.ones(batch, length, dtype=torch.int64, device=x.device)
    if attention_mask is not None:
        real = attention_mask[:, -length:].long()
    positions = real.cumsum(1) - 1
    if restarts is not None:
        positions = positions - torch.where(restarts, positions, 0).cummax(1).values
    elif cache is not None and "position" in cache.shared.states:
        positions = positions + cache.shared.states["position"][:, None] + 1
    return positions.clamp_min(0)
