"""The shape of a model as data: one frozen description for dense and pruned models alike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, TypedDict

from pydantic import ConfigDict, Field

from intraslice_jax.errors import InputError
from intraslice_jax.reading import Count, Index, Positive, check

_Parameter = bool | Count | Positive | tuple[Positive, ...]


@dataclass(frozen=True)
class LayerShape:
    """How wide one decoder layer is.

    Attributes:
        query_to_kv: for every query head the index of its KV head, non-decreasing. Its length is the number
            of query heads; groups may have different sizes (ragged) after pruning.
        qk_head_dim: channels of a query or key head.
        rotary_dim: how many of these, from the first, are rotated; half of them are one RoPE pair's first
            member, the other half its partner. 0 means no rotation.
        v_head_dim: channels of a value head, and of a query head's slice of the o-projection's input.
        intermediate_size: channels of the MLP.
        sliding_window: how many positions a query sees, itself included; None means all earlier ones.
    """

    query_to_kv: tuple[Index, ...]
    qk_head_dim: Count
    rotary_dim: Index
    v_head_dim: Count
    intermediate_size: Count
    sliding_window: Count | None = None

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        heads = self.query_to_kv
        if not heads or heads[0] != 0 or any(after - head not in (0, 1) for head, after in pairwise(heads)):
            raise InputError(f"query_to_kv must count up from 0 without gaps, found {heads!s:.100}")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.qk_head_dim:
            raise InputError(f"rotary_dim {self.rotary_dim} is not an even number up to {self.qk_head_dim}")
        if min(self.qk_head_dim, self.v_head_dim, self.intermediate_size) < 1:
            raise InputError(f"a layer cannot have a width below 1: {self}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise InputError(f"sliding_window must be at least 1, found {self.sliding_window}")

    @property
    def num_attention_heads(self) -> int:
        """Number of query heads."""
        return len(self.query_to_kv)

    @property
    def num_key_value_heads(self) -> int:
        """Number of key/value heads."""
        return self.query_to_kv[-1] + 1

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Query heads per KV head."""
        return tuple(self.query_to_kv.count(j) for j in range(self.num_key_value_heads))

    @property
    def num_key_value_groups(self) -> int | None:
        """Query heads per KV head where all KV heads have equally many, else None."""
        sizes = set(self.group_sizes)
        return sizes.pop() if len(sizes) == 1 else None


def uniform_query_to_kv(num_attention_heads: int, num_key_value_heads: int) -> tuple[int, ...]:
    """The usual grouping: consecutive query heads share a KV head."""
    if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
        raise InputError(
            f"num_attention_heads ({num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({num_key_value_heads})"
        )
    group = num_attention_heads // num_key_value_heads
    return tuple(h // group for h in range(num_attention_heads))


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: how inverse frequencies follow from the base and the scaling type.

    `parameters` holds what the rope type needs beyond the base, as sorted (name, value) pairs with the names
    that Hugging Face configurations use (`factor`, `low_freq_factor`, `short_factor`, ...).
    """

    theta: Positive = 10000.0
    rope_type: str = "default"
    parameters: tuple[tuple[str, _Parameter], ...] = ()

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of one scaling parameter."""
        return dict(self.parameters).get(name, default)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model, dense or pruned.

    Attributes:
        model_type: the Hugging Face name of the family (`llama`, `phi3`, ...).
        head_dim: the *original* width of a query/key head: the softmax scale stays head_dim ** -0.5.
        layers: one shape per decoder layer.
        rotary_dim: rotated channels of a head in the original model; the frequency table has half as many
            entries and every layer's `rope_pairs` index into it.
        norm: `rms` or `layer` (LayerNorm with bias).
        parallel_block: attention and MLP read the same normalised input (Phi-1/1.5/2).
        gated_mlp: gate and up projections, else one plain projection `up_proj` before the activation.
        attention_bias, attention_output_bias, mlp_bias, lm_head_bias: which linear maps carry a bias.
        source: the original model's configuration file as JSON text (for stock exports), or "".
    """

    model_type: str
    vocab_size: Count
    hidden_size: Count
    head_dim: Count
    rotary_dim: Index
    layers: Annotated[tuple[LayerShape, ...], Field(min_length=1)]
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_position_embeddings: Count = 2048
    hidden_act: str = "silu"
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: Positive = 1e-6
    parallel_block: bool = False
    gated_mlp: bool = True
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    bos_token_id: Index | None = None
    eos_token_id: tuple[Index, ...] = ()
    pad_token_id: Index | None = None
    source: str = ""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def with_layers(self, layers: tuple[LayerShape, ...]) -> ModelConfig:
        """The same model with other layer shapes."""
        return dataclasses.replace(self, layers=layers)

    def attention_parameters(self, shape: LayerShape) -> int:
        """Weights and biases of one layer's attention."""
        n_q, n_kv = shape.num_attention_heads, shape.num_key_value_heads
        qkv = n_q * shape.qk_head_dim + n_kv * (shape.qk_head_dim + shape.v_head_dim)
        biases = qkv * self.attention_bias + self.hidden_size * self.attention_output_bias
        return self.hidden_size * (qkv + n_q * shape.v_head_dim) + biases

    def mlp_parameters(self, shape: LayerShape) -> int:
        """Weights and biases of one layer's MLP."""
        inner = (2 if self.gated_mlp else 1) * shape.intermediate_size
        biases = (inner + self.hidden_size) * self.mlp_bias
        return self.hidden_size * (inner + shape.intermediate_size) + biases

    def block_parameters(self) -> int:
        """Attention and MLP parameters of all decoder layers: what pruning ratios are fractions of."""
        return sum(self.attention_parameters(s) + self.mlp_parameters(s) for s in self.layers)

    def total_parameters(self) -> int:
        """All parameters: blocks, norms, embedding and (if not tied) head."""
        norm = self.hidden_size * (2 if self.norm == "layer" else 1)
        norms = norm * (self.num_layers * (1 if self.parallel_block else 2) + 1)
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.block_parameters() + norms + tables + self.vocab_size * self.lm_head_bias

    def distinct_shapes(self) -> int:
        """How many different layer shapes there are: the number of compilations of a block."""
        return len(set(self.layers))

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary; `from_json` is its inverse."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads what `to_json` wrote.

        Raises:
            InputError: a field is missing, unknown or malformed.
        """
        return check(data, ModelConfig, "not a model configuration of this program")


USUAL_LENGTH = 2048
"""Tokens per window where neither the user nor a shorter context says otherwise."""


def window_length(given: int | None, context: int) -> int:
    """Tokens per window.

    Args:
        given: what the user asked for, None for the usual length.
        context: the most that the model takes.

    Raises:
        InputError: the user asked for more than the context.
    """
    if given is None:
        return min(USUAL_LENGTH, context)
    if given > context:
        raise InputError(
            f"sequence_length {given} is longer than the context of the model, {context} tokens; leave "
            f"`sequence_length` out, or give {context} or less"
        )
    return given


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text the statistics are taken on.

    Attributes:
        calibration: text files, or one `datasets` name (`NAME`, `NAME:CONFIG`, `NAME@FOLDER`), read as one stream.
        split: which split of the data set.
        column: which column of the data set, or field of a file, holds the text.
        samples: number of windows.
        sequence_length: tokens per window; 2,048, or the model's context where that is shorter, if not given.
        sampling: `documents` lets every second window begin where a document begins, with BOS if the tokenizer puts
            one before a text, and cuts the others out anywhere; `random` cuts out all anywhere, as the pruning
            literature does.
        seed: seed of the windows' positions.
    """

    calibration: tuple[str, ...] = ()
    split: str = "train"
    column: str = "text"
    samples: int = 128
    sequence_length: int | None = None
    sampling: Literal["documents", "random"] = "documents"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampling not in ("documents", "random"):
            raise InputError(f"sampling must be documents or random, found {self.sampling!r}")


ALIGNMENTS = {"cpu": 8, "gpu": 64, "tpu": 128}
"""What YAML and the command line may write for `align`: tiles of the matrix units."""

HEAD_ALIGNMENTS = {"cpu": 16, "gpu": 64, "tpu": 128}
"""The same for `head_align`: widths that kernels of attention do not fill up."""


USUAL_SPARSITY = 0.3


@dataclass(frozen=True)
class PruneConfig:
    """How a model is pruned.

    Attributes:
        sparsity: fraction of the attention and MLP parameters of the decoder layers to remove, in [0, 1); 0.3 if not
            given, or what a file of ratios removes. `target_sparsity` is the number.
        method: the pruning method, a name of `intraslice_jax.prune.methods`.
        ratios: what spreads it over layers and modules: `uniform`, `fisher`, `fisher_pca`, `fisher_components`, `kl`,
            or a JSON or YAML file with the lists `attention` and `mlp` and perhaps `heads` (then the file says how much
            is removed, too, and must not contradict `sparsity`).
        max_ratio: the most that a layer's attention or MLP may lose.
        kind_bias: the ratio of all attentions divided by the ratio of all MLPs.
        gradient_group: calibration sequences whose gradients are summed before they are squared.
        grouping: `ragged` drops query heads one by one, `uniform` leaves all KV heads of a layer equally many
            (stock loaders and tensor parallelism need that).
        layout: `ragged` lets every layer have its own heads and widths; `uniform` gives all layers the same numbers of
            heads, RoPE pairs and widths, so that the export is a smaller stock model.
        align: MLP widths are multiples of this: a number, or `cpu` (8), `gpu` (64) or `tpu` (128).
        head_align: widths of heads are multiples of this, or the full width: an even number, `cpu` (16), `gpu` (64) or
            `tpu` (128). The paper's is 2; in time a head costs what the next multiple of these costs.
        damping: added to the diagonal of a Gram matrix, times its mean diagonal.
        iterative: learned mixtures of MLP channels: `never`, `always`, or `auto` for MLPs that keep few channels.
        selection: how MLP channels are chosen: `energy` (the paper's) by their own share of the output, `obs` one by
            one, each time the one that the others replace best.
        selection_noise: with selection `obs`, the fraction of each channel's second moment that counts as noise of its
            own, which no other channel can replace: 0 trusts the correlations of the calibration text, a very large
            number gives the choice of `energy`.
        value_basis: directions of the value heads that stay: of the greatest variance (`activations`, the paper's) or
            of the greatest effect on the module's output (`outputs`).
        pair_selection: how RoPE pairs are chosen: `products` (the paper's) by the mean |q k| of one position, `logits`
            by their joint effect on the attention logits, kept pairs making up for dropped ones.
        loss_weight: how much more tokens count in the second moments when the dense model's loss gradient is larger at
            them: 0 not at all, 1 in proportion to its squared norm.
        dense_targets: how far each module may go beyond its own unpruned output on the pruned model's stream, towards
            the stream of the dense model: the largest strength, 1 for all the way that held-out windows call for.
        refine: passes over the calibration text in which the pruned model is learned further towards the dense model's
            predictions, 0 for none.
        output_biases: give the o- and down-projections biases where the family has none, for methods that fill
            them (intraslice, flap, obs).
        batch_size: calibration windows per step, 0 to choose it from `memory_budget`.
        memory_budget: bytes that one step's activations may take when `batch_size` is 0, and again those of a
            module that are kept to not compute them twice.
    """

    sparsity: float | None = None
    method: str = "intraslice"
    ratios: str = "uniform"
    max_ratio: float = 0.9
    kind_bias: float = 1.0
    gradient_group: int = 8
    grouping: Literal["ragged", "uniform"] = "ragged"
    layout: Literal["ragged", "uniform"] = "ragged"
    align: int = field(default=8, metadata={"names": ALIGNMENTS})
    head_align: int = field(default=2, metadata={"names": HEAD_ALIGNMENTS})
    damping: float = 0.01
    iterative: Literal["never", "auto", "always"] = "auto"
    selection: Literal["energy", "obs"] = "energy"
    selection_noise: float = 0.0
    value_basis: Literal["activations", "outputs"] = "activations"
    pair_selection: Literal["products", "logits"] = "products"
    loss_weight: float = 0.0
    dense_targets: float = 0.0
    refine: int = 0
    output_biases: bool = False
    batch_size: int = 0
    memory_budget: int = 512 * 2**20

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity must be in [0, 1), found {self.sparsity}; 0.3 removes 30 %")
        if not 0 <= self.damping < float("inf"):
            raise InputError(f"damping must be 0 or more, found {self.damping}; 0.01 is the paper's")
        if self.align < 1:
            raise InputError(f"align must be at least 1, found {self.align}")
        if self.head_align < 2 or self.head_align % 2:
            raise InputError(f"head_align must be even and at least 2, found {self.head_align}")
        if not 0 < self.max_ratio <= 1:
            raise InputError(f"max_ratio must be above 0 and at most 1, found {self.max_ratio}")
        if not 0 <= self.kind_bias < float("inf"):
            raise InputError(f"kind_bias must be 0 or more, found {self.kind_bias}; 1.0 treats both kinds alike")
        if self.gradient_group < 1:
            raise InputError(f"gradient_group must be at least 1, found {self.gradient_group}")
        if self.grouping not in ("ragged", "uniform"):
            raise InputError(f"grouping must be ragged or uniform, found {self.grouping!r}")
        if self.layout not in ("ragged", "uniform"):
            raise InputError(f"layout must be ragged or uniform, found {self.layout!r}")
        if self.selection not in ("energy", "obs"):
            raise InputError(f"selection must be energy or obs, found {self.selection!r}")
        if not 0 <= self.selection_noise < float("inf"):
            raise InputError(f"selection_noise must be 0 or more, found {self.selection_noise}; 1 is a fair amount")
        if self.value_basis not in ("activations", "outputs"):
            raise InputError(f"value_basis must be activations or outputs, found {self.value_basis!r}")
        if self.pair_selection not in ("products", "logits"):
            raise InputError(f"pair_selection must be products or logits, found {self.pair_selection!r}")
        if not 0 <= self.loss_weight <= 1:
            raise InputError(f"loss_weight must be in [0, 1], found {self.loss_weight}; 0 counts all tokens alike")
        if not 0 <= self.dense_targets <= 1:
            raise InputError(f"dense_targets must be in [0, 1], found {self.dense_targets}; 0 is without")
        if self.refine < 0:
            raise InputError(f"refine must be 0 (not at all) or more passes, found {self.refine}")
        if self.batch_size < 0:
            raise InputError(f"batch_size must be 0 (automatic) or more, found {self.batch_size}")
        if self.memory_budget < 1:
            raise InputError(f"memory_budget must be at least 1 byte, found {self.memory_budget}")

    @property
    def target_sparsity(self) -> float:
        """The fraction to remove where no file of ratios says it."""
        return USUAL_SPARSITY if self.sparsity is None else self.sparsity


class PruneSettings(TypedDict, total=False):
    """The fields of `PruneConfig` besides the sparsity: what `intraslice_jax.prune` takes by name."""

    method: str
    ratios: str
    max_ratio: float
    kind_bias: float
    gradient_group: int
    grouping: Literal["ragged", "uniform"]
    layout: Literal["ragged", "uniform"]
    align: int
    head_align: int
    damping: float
    iterative: Literal["never", "auto", "always"]
    selection: Literal["energy", "obs"]
    selection_noise: float
    value_basis: Literal["activations", "outputs"]
    pair_selection: Literal["products", "logits"]
    loss_weight: float
    dense_targets: float
    refine: int
    output_biases: bool
    batch_size: int
    memory_budget: int


PRESETS = {
    "fast": PruneConfig(),
    "paper": PruneConfig(ratios="fisher_pca"),
    "quality": PruneConfig(
        ratios="kl",
        max_ratio=0.75,
        damping=0.001,
        selection="obs",
        selection_noise=1.0,
        value_basis="outputs",
        pair_selection="logits",
        refine=2,
    ),
}
"""Named settings: what is done least, the paper's method, and the best that is known (docs/quality.md)."""

DEFAULT_PRESET = "quality"


def default_preset(method: str) -> str:
    """The preset where none is named: what goes beyond the paper is no part of a baseline."""
    return DEFAULT_PRESET if method == PruneConfig.method else "fast"


def preset(name: str) -> PruneConfig:
    """The settings of that name.

    Raises:
        InputError: there are none.
    """
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]


def with_layout(named: PruneConfig, layout: str | None) -> PruneConfig:
    """The settings of a preset for a layout: `uniform` needs ratios that are uniform, unless others are asked for."""
    return dataclasses.replace(named, ratios="uniform") if layout == "uniform" else named


def check_refine(refine: int, residency: str) -> None:
    """Raises InputError where the layers that a refinement learns all at once would not be on the devices.

    Args:
        refine: passes.
        residency: `device`, `host` or `disk`.
    """
    if refine and residency != "device":
        raise InputError(
            f"refine learns all layers at once, which must be on the devices; give `refine=0` with "
            f"`residency={residency}`"
        )


@dataclass(frozen=True)
class ParallelConfig:
    """Which devices work together, in one process or several.

    Attributes:
        mesh: `data=D,model=M`: calibration sequences and evaluation windows are split over D parts, heads and MLP
            channels over M; weights are stored in D x M parts. All devices on `data` if not given.
        distributed: this is one of several processes that a TPU pod slice, Slurm or Open MPI started.
        coordinator: `HOST:PORT` of process 0, where none of these did.
        num_processes: how many processes there are.
        process_id: the number of this one, from 0.
        startup_timeout: seconds that a process waits for the others at the start.
        peer_timeout: seconds without a sign of life after which another process counts as lost.
    """

    mesh: str | None = None
    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    startup_timeout: int = 300
    peer_timeout: int = 100

    def __post_init__(self) -> None:
        if min(self.startup_timeout, self.peer_timeout) < 1:
            raise InputError(
                f"startup_timeout and peer_timeout must be at least 1 second, found {self.startup_timeout} and "
                f"{self.peer_timeout}"
            )
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise InputError(f"coordinator must be HOST:PORT, found {self.coordinator!r}")
