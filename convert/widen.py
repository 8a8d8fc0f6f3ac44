"""A pruned model inside a wider one that computes the same: what was kept takes its places, the rest is zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from intraslice_jax.config import ModelConfig
from intraslice_jax.convert.families import default_rope_pairs
from intraslice_jax.models.decoder import abstract_arrays
from intraslice_jax.models.padding import query_places


@dataclass(frozen=True)
class Frame:
    """Where the channels of a layer's query and key heads stand in a wider layer's heads.

    Attributes:
        slots: position of each RoPE pair of the original model among the wider head's pairs.
        half: distance between the two channels of a pair in the wider head.
        rest: places of the channels that are not rotated.
        rotated_scale: factor on the rotated channels of queries.
        rest_scale: factor on their other channels.
    """

    slots: Mapping[int, int]
    half: int
    rest: tuple[int, ...]
    rotated_scale: float = 1.0
    rest_scale: float = 1.0

    def places(self, pairs: np.ndarray) -> np.ndarray:
        """Channels [heads, width] of heads that kept the given pairs [heads, pairs], in the narrow head's order."""
        first = np.asarray([[self.slots[int(pair)] for pair in row] for row in pairs], int).reshape(pairs.shape)
        rest = np.broadcast_to(np.asarray(self.rest, int), (len(pairs), len(self.rest)))
        return np.concatenate([first, first + self.half, rest], 1)


class WidenedArrays(Mapping[str, np.ndarray]):
    """Arrays of a wider model by path, each made from the narrower model's when it is asked for.

    Args:
        config: the narrower model.
        arrays: its arrays by path.
        target: the wider model; its layers have at least as many KV heads, query heads in each, and channels.
        frames: one per layer.

    Arrays that only the wider model has (biases) are zero.
    """

    def __init__(
        self, config: ModelConfig, arrays: Mapping[str, Any], target: ModelConfig, frames: Sequence[Frame]
    ) -> None:
        self._config, self._arrays, self._target, self._frames = config, arrays, target, frames
        self._shapes = {path: array.shape for path, array in abstract_arrays(target).items()}
        self._default_pairs = default_rope_pairs(target)

    def __getitem__(self, path: str) -> np.ndarray:
        if path in self._default_pairs:
            return self._default_pairs[path]
        wanted = self._shapes[path]
        if path not in self._arrays:
            return np.zeros(wanted, np.asarray(self._arrays["embed_tokens"]).dtype)
        array = np.asarray(self._arrays[path])
        module, _, name = path.partition(".")
        if module != "layers" or "norm" in name:
            return array
        layer, _, name = name.partition(".")
        array = self._scaled(int(layer), name, array)
        wide = np.zeros(wanted, array.dtype)
        wide[self._places(int(layer), name, array.shape)] = array
        return wide

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _scaled(self, layer: int, name: str, array: np.ndarray) -> np.ndarray:
        """Queries with the frame's factors, in float32 where there are any; other arrays as they are."""
        frame, rotary = self._frames[layer], self._config.layers[layer].rotary_dim
        if name not in ("attention.q_proj", "attention.q_bias"):
            return array
        if frame.rotated_scale == frame.rest_scale == 1:
            return array
        scales = np.full(array.shape[-1], frame.rest_scale)
        scales[:rotary] = frame.rotated_scale
        return (array.astype(np.float64) * scales).astype(np.float32)

    def _places(self, layer: int, name: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """The index under which an array of the narrow layer stands in the wide one."""
        module, _, name = name.partition(".")
        if module == "mlp":
            return tuple(slice(size) for size in shape)
        narrow, wide = self._config.layers[layer], self._target.layers[layer]
        kv = np.arange(narrow.num_key_value_heads)
        heads = kv if name[0] in "kv" else query_places(narrow, wide)
        values = np.arange(narrow.v_head_dim)[None]
        match name:
            case "q_proj" | "k_proj" | "q_bias" | "k_bias":
                pairs = np.asarray(self._arrays[f"layers.{layer}.attention.rope_pairs"])
                places = self._frames[layer].places(pairs)
                if name[0] == "q":
                    places = places[list(narrow.query_to_kv)]
                index = (heads[:, None], places)
                return index if name.endswith("bias") else (slice(None), *index)
            case "v_proj":
                return slice(None), heads[:, None], values
            case "v_bias" | "o_proj":
                return heads[:, None], values
            case _:  # the bias of the o-projection
                return (slice(None),)


def whole_head_frame(
    pairs: Sequence[int], width: int, rest: int, rotated_scale: float = 1.0, rest_scale: float = 1.0
) -> Frame:
    """A frame of a head of `width` channels all of which rotate: first the given pairs, then pairs that stand still.

    Args:
        pairs: of the original model.
        width: even.
        rest: channels of the narrow head that are not rotated; they take pairs of frequency 0.
        rotated_scale: as in `Frame`.
        rest_scale: as in `Frame`.
    """
    half = width // 2
    still = [channel for slot in range(len(pairs), half) for channel in (slot, slot + half)]
    return Frame({pair: slot for slot, pair in enumerate(pairs)}, half, tuple(still[:rest]), rotated_scale, rest_scale)
