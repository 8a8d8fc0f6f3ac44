"""Which query heads stay, where the grouping or the budget allows only some choices (docs/method.md section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from intraslice_jax.errors import InputError
from intraslice_jax.prune.attention import HeadEnergies, aligned_widths, even_width, plan_heads

Grouping = Literal["ragged", "uniform"]


def choose_heads(
    energies: HeadEnergies,
    kept_channels: int,
    query_to_kv: Sequence[int],
    grouping: Grouping,
    cost: Callable[[np.ndarray, int], int],
    allowed: tuple[int, int],
    align: int = 2,
) -> tuple[Int[np.ndarray, " kept"], int]:
    """Heads and their common even width: the usual plan if its cost is allowed, else the best one that is.

    Args:
        energies: of the layer's heads.
        kept_channels: budget of o-projection input channels.
        query_to_kv: the KV head of each query head.
        grouping: `ragged` drops query heads one by one, `uniform` leaves every kept KV head equally many.
        cost: parameters of an attention with these heads of this width.
        allowed: the least and the greatest cost (`Ledger.attention_range`). If no plan lies between them, the
            next greater one is taken.
        align: widths are multiples of this, or the full width.

    Returns:
        Ascending head indices and the width.
    """
    if align > 2:
        heads, width = plan_aligned_heads(energies, kept_channels, query_to_kv, grouping, align)
    elif grouping == "uniform":
        heads, width = plan_grouped_heads(energies, kept_channels, query_to_kv)
    else:
        heads, width = plan_heads(energies, kept_channels)
    low, high = allowed
    if low <= cost(heads, width) <= high:
        return heads, width

    def rating(plan: tuple[np.ndarray, int]) -> tuple[int, int, float]:
        parameters = cost(*plan)
        return max(low - parameters, 0), max(parameters - high, 0), -float(energies.of(*plan).sum())

    full = energies.channel_scores.shape[1]
    candidates = _candidates(energies, query_to_kv, grouping)
    widths = aligned_widths(full, align)
    return min(((heads, width) for heads in candidates for width in widths), key=rating)


def plan_grouped_heads(
    energies: HeadEnergies, kept_channels: int, query_to_kv: Sequence[int]
) -> tuple[Int[np.ndarray, " kept"], int]:
    """`plan_heads` for equally many query heads per kept KV head.

    Of all numbers of KV heads and of query heads in each, the pair with the greatest energy at the width that the
    budget gives it. As in the ragged plan a head is not made narrower than 3/4, unless it is the only one.

    Returns:
        Ascending head indices and the even width.
    """
    full = energies.channel_scores.shape[1]
    kept_channels = max(2, min(kept_channels, energies.channel_scores.size))

    def width(heads: np.ndarray) -> int:
        return min(kept_channels // len(heads), full)

    candidates = [heads for heads in _grouped(energies, query_to_kv) if len(heads) == 1 or width(heads) >= 0.75 * full]
    best = max(candidates, key=lambda heads: energies.of(heads, width(heads)).sum())
    return best, even_width(kept_channels, len(best), full)


def plan_aligned_heads(
    energies: HeadEnergies, kept_channels: int, query_to_kv: Sequence[int], grouping: Grouping, align: int
) -> tuple[Int[np.ndarray, " kept"], int]:
    """`plan_heads` for widths that are multiples of `align`, which meet the budget only nearly.

    Of the widths from 3/4 on, the one with the greatest energy when the budget is met with a part of a head, and as
    many heads of it as come nearest to the budget.

    Returns:
        Ascending head indices and the width.
    """
    full = energies.channel_scores.shape[1]
    kept_channels = max(2, min(kept_channels, energies.channel_scores.size))
    every = np.argsort(-energies.total, kind="stable")
    least = min(0.75 * full, kept_channels)  # a single head may be narrower

    def energy(width: int) -> float:
        sums = np.concatenate([[0.0], np.cumsum(energies.of(every, width))])
        return float(np.interp(kept_channels / width, np.arange(len(sums)), sums))

    width = max((w for w in aligned_widths(full, align) if w >= least), key=energy)

    def rating(heads: np.ndarray) -> tuple[int, float]:
        return abs(len(heads) * width - kept_channels), -float(energies.of(heads, width).sum())

    return min(_candidates(energies, query_to_kv, grouping), key=rating), width


def head_counts(query_to_kv: Sequence[int], grouping: Grouping) -> list[int]:
    """The numbers of query heads that a layer may keep, ascending."""
    if grouping == "ragged":
        return list(range(1, len(query_to_kv) + 1))
    sizes = [query_to_kv.count(kv) for kv in set(query_to_kv)]
    counts = {m * n for m in range(1, max(sizes) + 1) for n in range(1, sum(size >= m for size in sizes) + 1)}
    return sorted(counts)


def strongest_heads(
    energies: HeadEnergies, count: int, query_to_kv: Sequence[int], grouping: Grouping
) -> Int[np.ndarray, " kept"]:
    """That many heads of the greatest energy, ascending.

    Raises:
        InputError: the grouping does not allow that number.
    """
    fitting = [heads for heads in _candidates(energies, query_to_kv, grouping) if len(heads) == count]
    if not fitting:
        raise InputError(f"an attention of {len(query_to_kv)} heads cannot keep {count} with grouping {grouping}")
    return max(fitting, key=lambda heads: energies.total[heads].sum())


def _candidates(energies: HeadEnergies, query_to_kv: Sequence[int], grouping: Grouping) -> Iterator[np.ndarray]:
    return _grouped(energies, query_to_kv) if grouping == "uniform" else _nested(energies)


def _nested(energies: HeadEnergies) -> Iterator[np.ndarray]:
    """The n heads of the greatest energy, for every n."""
    every = np.arange(len(energies.total))
    order = np.argsort(-energies.total, kind="stable")
    return (np.sort(every[order[:n]]) for n in range(1, len(order) + 1))


def _grouped(energies: HeadEnergies, query_to_kv: Sequence[int]) -> Iterator[np.ndarray]:
    """The best m heads of each of the best n KV heads that have so many, for every m and n."""
    to_kv = np.asarray(query_to_kv)
    groups = [np.flatnonzero(to_kv == kv) for kv in np.unique(to_kv)]
    groups = [group[np.argsort(-energies.total[group], kind="stable")] for group in groups]
    for size in range(1, max(map(len, groups)) + 1):
        best = [group[:size] for group in groups if len(group) >= size]
        best.sort(key=lambda group: -energies.total[group].sum())
        for count in range(1, len(best) + 1):
            yield np.sort(np.concatenate(best[:count]))
