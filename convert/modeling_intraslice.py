"""PyTorch model for checkpoints pruned with IntraSlice (https://arxiv.org/abs/2602.01975).

This file travels inside an exported folder and needs nothing but PyTorch and transformers 5.16 or newer:

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

One class serves every family (Llama, Mistral, Qwen2, Phi-3, Phi-1/1.5/2, ...). `config.per_layer_config` has each
layer's widths, `config.intraslice` what has no usual key: query heads may share key/value heads in groups of different
sizes, queries and keys may be wider or narrower than values, and every key/value head keeps its own choice of rotary
frequencies. The softmax scale stays that of the original head width.
"""

from dataclasses import field
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

try:
    from peft.utils import constants as peft_constants
except ImportError:
    peft_constants = None

# transformers 5.24 gave the argument and the output `past_key_values` the name `cache`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
# Attention functions that take values of another width than queries and keys.
TWO_WIDTHS = ("eager", "sdpa", "flex_attention")


@strict
class IntraSliceConfig(PreTrainedConfig):
    """Configuration of a pruned model.

    Head counts and widths at the top level are the original head width and the largest of the layers;
    `per_layer_config` has what differs in a layer. `intraslice` holds what transformers has no keys for: the width that
    sets the softmax scale, features of the family, and of each layer which key/value head its query heads read and how
    many channels rotate.
    """

    model_type = "intraslice"
    keys_to_ignore_at_inference: ClassVar = [CACHE]
    # The name that transformers looks for to see that keys and values may differ in width.
    attribute_map: ClassVar = {"qk_head_dim": "head_dim"}

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 0
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    v_head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict = field(default_factory=dict)
    sliding_window: int | None = None
    layer_types: list[str] = field(default_factory=list)
    intraslice: dict = field(default_factory=dict)

    def __getattribute__(self, key: str) -> Any:
        """The top level's value where layers differ; transformers raises, and a paged cache could not be made."""
        try:
            return super().__getattribute__(key)
        except RuntimeError:
            return self.__dict__[self.attribute_map.get(key, key)]

    def validate_architecture(self) -> None:
        """A pruned layer's heads need not divide the hidden size; its description must be complete."""
        layers = self.intraslice.get("layers", [])
        if len(layers) != self.num_hidden_layers:
            raise ValueError(f"`intraslice` describes {len(layers)} layers, expected {self.num_hidden_layers}")

    def validate_rope(self) -> None:
        """Left to the configuration that `IntraSliceRotaryEmbedding` makes, whose head width is the rotated one."""


class IntraSliceRMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


def build_norm(config: IntraSliceConfig) -> nn.Module:
    """The family's norm: RMSNorm, or LayerNorm with bias."""
    norm = nn.LayerNorm if config.intraslice["norm"] == "layer" else IntraSliceRMSNorm
    return norm(config.hidden_size, eps=config.intraslice["norm_eps"])


class IntraSliceRotaryEmbedding(nn.Module):
    """Cosines and sines of all frequencies of the *original* head; each layer picks its own from them."""

    inv_freq: torch.Tensor

    def __init__(self, config: IntraSliceConfig) -> None:
        super().__init__()
        parameters = {k: v for k, v in config.rope_parameters.items() if k != "partial_rotary_factor"}
        # What transformers' rope functions read: a model whose heads are exactly the rotated channels.
        self.config = PreTrainedConfig.from_dict(
            {
                "head_dim": config.intraslice["rotary_dim"],
                "hidden_size": config.hidden_size,
                "num_attention_heads": 1,
                "max_position_embeddings": config.max_position_embeddings,
                "rope_parameters": parameters,
            }
        )
        self.rope_type = parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        initialise = self.compute_default_rope_parameters
        if self.rope_type != "default":
            initialise = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = initialise(self.config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: Any, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies [rotary_dim / 2] without scaling, and the factor 1 on cosines and sines."""
        width = config.head_dim
        exponents = torch.arange(0, width, 2, dtype=torch.float, device=device) / max(width, 1)
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [batch, positions, frequencies] in float32."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the channel pairs (p, p + pairs) of the first 2 x pairs channels, in float32; the rest pass through."""
    pairs = cos.shape[-1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    first, second = first.float(), second.float()
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([part.to(x.dtype) for part in rotated] + [rest], dim=-1)


def repeat_kv(hidden_states: torch.Tensor, repeats: int) -> torch.Tensor:
    """[batch, kv, seq, width] with every head repeated: [batch, kv x repeats, seq, width]."""
    return hidden_states if repeats == 1 else hidden_states.repeat_interleave(repeats, dim=1)


def fill(x: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """[batch, heads, positions, width] with zeros behind the last head and channel: they change no score or output."""
    return nn.functional.pad(x, (0, width - x.shape[-1], 0, 0, 0, heads - x.shape[1]))


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, softmax in float32."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class IntraSliceAttention(nn.Module):
    """Grouped-query attention of one layer's own widths."""

    rope_pairs: torch.Tensor
    query_to_kv: torch.Tensor
    query_to_slot: torch.Tensor
    slot_to_query: torch.Tensor

    def __init__(self, config: IntraSliceConfig, layer_idx: int) -> None:
        super().__init__()
        model, shape = config.intraslice, config.intraslice["layers"][layer_idx]
        widths, slides = config.per_layer_config[layer_idx], config.layer_types[layer_idx] == "sliding_attention"
        self.config = config
        self.layer_idx = layer_idx
        self.groups: list[int] = shape["query_to_kv"]
        heads, kv_heads = len(self.groups), self.groups[-1] + 1
        sizes = [self.groups.count(head) for head in range(kv_heads)]
        # Ragged groups: every query head gets its own copy of its key and value, after the cache. The queries of one
        # position take slots instead, as many for each key/value head as the widest group has: that copies no cache.
        self.ragged = len(set(sizes)) > 1
        self.num_key_value_groups = 1 if self.ragged else sizes[0]
        self.widest_group = max(sizes)
        self.head_dim = widths.head_dim
        self.v_head_dim = widths.v_head_dim
        # The shape of a paged cache (continuous batching), one for all layers.
        self.paged_heads, self.paged_width = config.num_key_value_heads, config.head_dim
        self.rotary_dim = shape["rotary_dim"]
        self.sliding_window = config.sliding_window if slides else None
        self.scaling = model["head_dim"] ** -0.5
        self.is_causal = True

        bias = model["attention_bias"]
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.v_head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.v_head_dim, config.hidden_size, bias=model["attention_output_bias"])
        # Which frequencies of the original head each key/value head kept: part of the checkpoint.
        pairs = torch.zeros(kv_heads, self.rotary_dim // 2, dtype=torch.int32)
        self.register_buffer("rope_pairs", pairs)
        slots = kv_heads * self.widest_group
        for name, size in (("query_to_kv", heads), ("query_to_slot", heads), ("slot_to_query", slots)):
            self.register_buffer(name, torch.zeros(size, dtype=torch.long), persistent=False)
        self.reset_indices()

    def reset_indices(self) -> None:
        """Fills all index buffers, `rope_pairs` with the original order unless a checkpoint filled it."""
        places = [kv * self.widest_group + i - self.groups.index(kv) for i, kv in enumerate(self.groups)]
        queries = [places.index(slot) if slot in places else 0 for slot in range(len(self.slot_to_query))]
        init.copy_(self.query_to_kv, torch.tensor(self.groups))
        init.copy_(self.query_to_slot, torch.tensor(places))
        init.copy_(self.slot_to_query, torch.tensor(queries))
        pairs = torch.arange(self.rotary_dim // 2, dtype=torch.int32)
        init.copy_(self.rope_pairs, pairs.expand(self.rope_pairs.shape))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache: Cache | None = kwargs.pop(CACHE, None)
        rows = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*rows, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*rows, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*rows, -1, self.v_head_dim).transpose(1, 2)
        if self.rotary_dim:
            # [rows, kv heads, positions, pairs] of this layer's own frequencies
            pairs = self.rope_pairs.long()
            cos, sin = (table[..., pairs].transpose(1, 2) for table in position_embeddings)
            key = rotate(key, cos, sin)
            if self.ragged:
                query = rotate(query, cos.index_select(1, self.query_to_kv), sin.index_select(1, self.query_to_kv))
            else:  # the queries of a group lie side by side and share the tables
                grouped = query.unflatten(1, (-1, self.num_key_value_groups))
                query = rotate(grouped, cos.unsqueeze(2), sin.unsqueeze(2)).flatten(1, 2)
        in_kernel = kwargs.get("block_table") is not None  # the kernel itself writes and reads the pages
        if isinstance(cache, Cache):
            key, value = cache.update(key, value, self.layer_idx)
        elif cache is not None:  # pages have one shape for all layers
            kv_heads = key.shape[1]
            key, value = (fill(x, self.paged_heads, self.paged_width) for x in (key, value))
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
            if not in_kernel:
                key, value = key[:, :kv_heads, :, : self.head_dim], value[:, :kv_heads, :, : self.v_head_dim]

        implementation = self.config._attn_implementation or "eager"
        one_mask = attention_mask is None or attention_mask.shape[1] == 1
        slotted = self.ragged and implementation == "sdpa" and rows[1] == 1 and one_mask
        if slotted:  # the queries of a key/value head stand where positions would
            query = query[:, :, 0].index_select(1, self.slot_to_query).unflatten(1, (-1, self.widest_group))
            kwargs["is_causal"] = False
        elif in_kernel:
            query = query.index_select(1, self.slot_to_query)
            query = fill(query, self.paged_heads * self.widest_group, self.paged_width)
        elif self.ragged:
            key, value = key.index_select(1, self.query_to_kv), value.index_select(1, self.query_to_kv)
        if query.shape[-1] != value.shape[-1] and implementation not in TWO_WIDTHS:
            width = max(query.shape[-1], value.shape[-1])
            query, key, value = (fill(x, x.shape[1], width) for x in (query, key, value))

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if slotted:
            output = output.transpose(1, 2)
        output = output.reshape(*rows, -1, value.shape[-1])
        if slotted or in_kernel:
            output = output.index_select(2, self.query_to_slot)
        return self.o_proj(output[..., : self.v_head_dim].flatten(-2)), weights


class IntraSliceMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` in families without a gate."""

    def __init__(self, config: IntraSliceConfig, layer_idx: int) -> None:
        super().__init__()
        model = config.intraslice
        inner, bias = config.per_layer_config[layer_idx].intermediate_size, model["mlp_bias"]
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=bias) if model["gated_mlp"] else None
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class IntraSliceDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, one after the other or (Phi-1/1.5/2) side by side behind one norm."""

    def __init__(self, config: IntraSliceConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config)
        self.self_attn = IntraSliceAttention(config, layer_idx)
        self.post_attention_layernorm = None if config.intraslice["parallel_block"] else build_norm(config)
        self.mlp = IntraSliceMLP(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, **kwargs)
        hidden_states = hidden_states + attended
        if self.post_attention_layernorm is not None:
            normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.mlp(normed)


class IntraSlicePreTrainedModel(PreTrainedModel):
    """What both models share."""

    config: IntraSliceConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["IntraSliceDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": IntraSliceDecoderLayer, "attentions": IntraSliceAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, IntraSliceAttention):
            module.reset_indices()


class IntraSliceModel(IntraSlicePreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: IntraSliceConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([IntraSliceDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = build_norm(config)
        self.rotary_emb = IntraSliceRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        hidden_states: torch.Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None] + seen

        layer_types = self.config.layer_types
        masks: Any = attention_mask
        if not isinstance(masks, dict):  # generate() may have made them
            makers: dict[str, Any] = {
                "full_attention": create_causal_mask,
                "sliding_attention": create_sliding_window_causal_mask,
            }
            masks = {
                kind: makers[kind](
                    config=self.config,
                    inputs_embeds=hidden_states,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    **{CACHE: cache},
                )
                for kind in sorted(set(layer_types))
            }

        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        # Fewer layers than the model has: assisted generation with `assistant_early_exit`.
        for layer, kind in zip(self.layers[: self.config.num_hidden_layers], layer_types, strict=False):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=masks[kind],
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        kept: dict[str, Any] = {CACHE: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **kept)


class IntraSliceForCausalLM(IntraSlicePreTrainedModel, GenerationMixin):
    """Token ids to next-token logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: IntraSliceConfig) -> None:
        super().__init__(config)
        self.model = IntraSliceModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.intraslice["lm_head_bias"])
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        hidden_states, keep = outputs.last_hidden_state, logits_to_keep
        if isinstance(keep, int):
            hidden_states = hidden_states[:, -keep:]
        elif keep.ndim == 1:
            hidden_states = hidden_states[:, keep]
        elif keep.dtype == torch.bool:
            hidden_states = hidden_states[keep]
        else:  # positions of each row
            hidden_states = hidden_states.take_along_dim(keep[..., None], dim=1)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        rest: dict[str, Any] = {name: getattr(outputs, name) for name in (CACHE, "hidden_states", "attentions")}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    def prepare_inputs_for_generation(  # pyright: ignore
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Starts the cache anew where `longrope` changes from the short to the long frequencies.

        Cached keys were rotated with the frequencies of their time; behind the original context they no longer fit.
        """
        rope, cache = self.config.rope_parameters, kwargs.get(CACHE)
        cached = cache.get_seq_length() if cache is not None else 0
        if rope["rope_type"] == "longrope" and cached:
            limit = rope["original_max_position_embeddings"]
            places = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
            length = places if attention_mask is None else int(attention_mask.sum(-1).max())
            if length - (places - cached) <= limit < length:
                kwargs |= {CACHE: None, "next_sequence_length": None}  # all tokens again, not the last one only
                if inputs_embeds is not None:
                    new = input_ids[:, inputs_embeds.shape[1] - places :]
                    inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(new)], dim=1)
                    kwargs["is_first_iteration"] = True
        return super().prepare_inputs_for_generation(  # pyright: ignore
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )


class IntraSliceForSequenceClassification(GenericForSequenceClassification, IntraSlicePreTrainedModel):
    """Token ids to one label."""


class IntraSliceForTokenClassification(GenericForTokenClassification, IntraSlicePreTrainedModel):
    """Token ids to a label for each."""


class IntraSliceForQuestionAnswering(GenericForQuestionAnswering, IntraSlicePreTrainedModel):
    """Token ids to the first and last token of an answer."""


# The classes above make their base model with `AutoModel`; saving it copies this file.
AutoModel.register(IntraSliceConfig, IntraSliceModel)
IntraSliceModel.register_for_auto_class("AutoModel")
# Modules have the names they have in Llama: adapters without `target_modules` choose the same ones.
for targets in vars(peft_constants).values() if peft_constants else ():
    if isinstance(targets, dict) and "llama" in targets:
        targets.setdefault(IntraSliceConfig.model_type, targets["llama"])

__all__ = [
    "IntraSliceConfig",
    "IntraSliceForCausalLM",
    "IntraSliceForQuestionAnswering",
    "IntraSliceForSequenceClassification",
    "IntraSliceForTokenClassification",
    "IntraSliceModel",
    "IntraSlicePreTrainedModel",
]
