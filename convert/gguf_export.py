"""GGUF files for llama.cpp: zeros fill up what its graphs want equal, everything else keeps its own width.

llama.cpp's architecture `deci` has numbers of heads and MLP widths per layer, and one width for the heads of all
layers, all of whose channels rotate with frequencies that a tensor in the file divides. Heads are as wide as all
RoPE pairs that any KV head kept; channels that are not rotated stand at pairs of frequency 0. A model whose layers
are all alike is written as `llama`, which more programs read. Widths that llama.cpp's kernels are slow with are filled
up, too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from intraslice_jax.config import LayerShape, ModelConfig, RopeConfig
from intraslice_jax.convert.assemble import DTYPES
from intraslice_jax.convert.families import FAMILIES, find_family
from intraslice_jax.convert.gguf import ARCHITECTURES, permute
from intraslice_jax.convert.gguf_tokenizer import tokenizer_metadata
from intraslice_jax.convert.mapping import Tensor
from intraslice_jax.convert.modelcard import description
from intraslice_jax.convert.rotation import chosen_frequencies, query_scales
from intraslice_jax.convert.shards import converted
from intraslice_jax.convert.widen import WidenedArrays, whole_head_frame
from intraslice_jax.errors import InputError
from intraslice_jax.io.atomic import atomic_file
from intraslice_jax.model import LanguageModel, StoredModel

_KINDS = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
GGUF_DTYPES = tuple(_KINDS)
_BLOCK = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]
_STEP = 64
"""Numbers of a row that llama.cpp's float kernels take at a time (with AVX-512); they do the rest one by one."""
_FLOATS = {
    gguf.GGMLQuantizationType.F32: DTYPES["float32"],
    gguf.GGMLQuantizationType.F16: DTYPES["float16"],
    gguf.GGMLQuantizationType.BF16: DTYPES["bfloat16"],
}


def export_gguf(
    model: LanguageModel | StoredModel,
    arrays: Mapping[str, Any],
    path: Path,
    dtype: str,
    overwrite: bool = False,
) -> None:
    """Writes a model with its tokenizer as one file.

    Args:
        model: dense or pruned.
        arrays: its arrays by path; each is read once.
        path: the file, which appears under its name only when complete.
        dtype: of matrices: one of `GGUF_DTYPES`. Vectors are float32; matrices whose rows are no multiple of 32
            numbers are float16 beside `q8_0`.
        overwrite: replace a file that exists.

    Raises:
        InputError: llama.cpp's graphs cannot express the model or its tokenizer, or a number is too large.
    """
    form = gguf_form(model.config, arrays)
    if model.tokenizer is None:
        raise InputError(
            f"{model.name} has no tokenizer, without which llama.cpp reads no file; put it beside the model"
        )
    kind, file_type = _KINDS[dtype]
    metadata = {
        "general.name": Path(model.name).name,
        "general.description": description(model),
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **form.metadata(),
        **tokenizer_metadata(model.tokenizer, model.config),
    }
    tensors = FAMILIES["LlamaForCausalLM"].tensors(form.config)
    kinds = [_kind(tensor.shape, kind) for tensor in tensors]
    with atomic_file(path, overwrite) as work:
        writer = gguf.GGUFWriter(work, form.architecture)
        try:
            for key, value in metadata.items():
                _add(writer, key, value)
            for name, table in form.tables.items():
                writer.add_tensor_info(name, table.shape, table.dtype, table.nbytes)
            for tensor, stored in zip(tensors, kinds, strict=True):
                block, size = gguf.GGML_QUANT_SIZES[stored]
                count = int(np.prod(tensor.shape))
                name = form.name(tensor)
                writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), count // block * size, stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for table in form.tables.values():
                writer.write_tensor_data(table)
            for (name, array), stored in zip(form.tensors(tensors), kinds, strict=True):
                writer.write_tensor_data(_encode(name, array, stored))
        finally:
            writer.close()


class GgufForm(NamedTuple):
    """A model in the shape that llama.cpp wants.

    Attributes:
        architecture: `llama` or `deci`.
        config: the model with its wider heads.
        arrays: by path, as that configuration describes them.
        tables: divisors of the RoPE frequencies by tensor name, float32; none where they are the ordinary ones.
    """

    architecture: str
    config: ModelConfig
    arrays: Mapping[str, Any]
    tables: dict[str, np.ndarray]

    def metadata(self) -> dict[str, Any]:
        """The keys behind the architecture's prefix."""
        config, shapes = self.config, self.config.layers
        windows = [shape.sliding_window for shape in shapes if shape.sliding_window is not None]
        widths = {
            "attention.head_count": [shape.num_attention_heads for shape in shapes],
            "attention.head_count_kv": [shape.num_key_value_heads for shape in shapes],
            "feed_forward_length": [shape.intermediate_size for shape in shapes],
        }
        if self.architecture == "llama":
            widths = {key: values[0] for key, values in widths.items()}
        keys: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            # These graphs have no sliding window: up to its length none is needed.
            "context_length": min([config.max_position_embeddings, *windows]),
            "embedding_length": config.hidden_size,
            "block_count": config.num_layers,
            **widths,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": float(config.norm_eps),
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": float(config.rope.theta),
        }
        if len(self.tables) == 2:
            keys["rope.scaling.type"] = "longrope"
            keys["rope.scaling.original_context_length"] = config.rope.get("original_max_position_embeddings")
            keys["rope.scaling.attn_factor"] = 1.0
        return {f"{self.architecture}.{key}": value for key, value in keys.items()}

    def name(self, tensor: Tensor) -> str:
        """llama.cpp's name of a tensor of Llama's table."""
        names = gguf.get_tensor_name_map(ARCHITECTURES[self.architecture].names, self.config.num_layers)
        name = names.get_name(tensor.name, (".weight", ".bias"))
        if name is None:
            raise InputError(f"llama.cpp's architecture {self.architecture} has no place for {tensor.name}")
        return name

    def tensors(self, tensors: list[Tensor]) -> Iterator[tuple[str, np.ndarray]]:
        """Names and arrays, one at a time, rows of queries and keys in llama.cpp's order."""
        for tensor in tensors:
            array = tensor.pack(self.arrays)
            path, shape = next(iter(tensor.shapes.items()))
            if path.endswith(("q_proj", "k_proj", "q_bias", "k_bias")):
                array = permute(array, shape[-2])
            yield tensor.name, array


def gguf_form(config: ModelConfig, arrays: Mapping[str, Any]) -> GgufForm:
    """The model as llama.cpp's `llama` or `deci`.

    Args:
        config: the model; if it was pruned, widths become multiples of 64, those of heads up to the original one.
        arrays: its arrays by path.

    Raises:
        InputError: it has a feature that these graphs do not have.
    """
    _check(config)
    rows = [np.asarray(arrays[f"layers.{i}.attention.rope_pairs"]).reshape(-1) for i in range(config.num_layers)]
    pairs = [int(pair) for pair in np.unique(np.concatenate(rows))]
    most_rest = max(shape.qk_head_dim - shape.rotary_dim for shape in config.layers)
    width = max(2 * (len(pairs) + -(-most_rest // 2)), *(2 * -(-s.v_head_dim // 2) for s in config.layers))
    whole, filled = config.head_dim // 2 * 2, _multiple(width, _STEP)
    width = whole if width <= whole < filled else filled
    if width == config.rotary_dim == config.head_dim and not most_rest:
        pairs = list(range(width // 2))  # there is room for all: each has its own place and its own frequency
    scales = query_scales(config, width)
    frames = [whole_head_frame(pairs, width, s.qk_head_dim - s.rotary_dim, *scales) for s in config.layers]

    ordinary = config.rope.rope_type == "default" and len(pairs) == config.rotary_dim // 2 == width // 2
    rope = RopeConfig(config.rope.theta) if ordinary else chosen_frequencies(config, pairs, width // 2)
    target = dataclasses.replace(
        config,
        model_type="llama",
        head_dim=width,
        rotary_dim=width,
        layers=tuple(_wide_layer(shape, width, 1 if _unpruned(config) else _STEP) for shape in config.layers),
        rope=rope,
        source="",
    )
    short, long = (np.asarray(rope.get(name, ()), np.float32) for name in ("short_factor", "long_factor"))
    tables = {} if ordinary else {"rope_freqs.weight": short}
    if not np.array_equal(short, long):
        tables = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    architecture = "llama" if target.distinct_shapes() == 1 else "deci"
    return GgufForm(architecture, target, WidenedArrays(config, arrays, target, frames), tables)


def _check(config: ModelConfig) -> None:
    reason = None
    if config.parallel_block or config.norm != "rms" or not config.gated_mlp:
        reason = "a parallel block, LayerNorm or an MLP without gate"
    elif config.hidden_act not in ("silu", "swish"):
        reason = f"the activation {config.hidden_act}"
    if reason:
        raise InputError(
            f"{config.model_type}: llama.cpp's graphs for such models do not have {reason}; export it with --format hf"
        )


def _unpruned(config: ModelConfig) -> bool:
    """Whether the model is what its original configuration says."""
    if not config.source:
        return False
    raw = json.loads(config.source)
    return find_family(raw).read_config(raw, config.source) == config


def _multiple(width: int, of: int) -> int:
    return -(-width // of) * of


def _wide_layer(shape: LayerShape, width: int, multiple: int) -> LayerShape:
    """Equally many query heads in each group, whole rotated heads of one width."""
    groups = max(shape.group_sizes)
    return dataclasses.replace(
        shape,
        query_to_kv=tuple(kv for kv in range(shape.num_key_value_heads) for _ in range(groups)),
        qk_head_dim=width,
        rotary_dim=width,
        v_head_dim=width,
        intermediate_size=_multiple(shape.intermediate_size, multiple),
    )


def _kind(shape: tuple[int, ...], wanted: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if wanted == gguf.GGMLQuantizationType.Q8_0 and shape[-1] % _BLOCK:
        return gguf.GGMLQuantizationType.F16
    return wanted


def _encode(name: str, array: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if kind in _FLOATS:
        return converted(name, array, _FLOATS[kind]).view(np.uint8)
    return gguf.quantize(converted(name, array, DTYPES["float32"]), kind)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kind = {bool: "bool", str: "string", float: "float32", int: "uint32"}[type(value)]
        getattr(writer, f"add_{kind}")(key, value)
