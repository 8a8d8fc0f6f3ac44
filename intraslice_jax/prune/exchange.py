"""Which modules give parameters to which others, from what one step of each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from intraslice_jax.prune.budget import HeadWidths


@dataclass(frozen=True)
class Move:
    """One step of one module, measured alone.

    Attributes:
        layer: of the module.
        heads: what its attention would keep; None if the module is its MLP.
        parameters: removed by it; negative where it gives some back.
        cost: change of the divergence, in nats per token.
    """

    layer: int
    heads: HeadWidths | None
    parameters: int
    cost: float

    @property
    def price(self) -> float:
        """Nats per removed parameter: what a removal costs, or giving back gains, per parameter."""
        return self.cost / self.parameters


def exchange(moves: Sequence[Move]) -> list[Move]:
    """Removals paid for by others being taken back, the most profitable first, at most one step per module.

    The cheapest removals and the dearest parameters alternate such that never more is given back than is removed, and
    as long as a removed parameter costs less than one given back gains. Any beginning of the list is an exchange.
    """
    removals = sorted((move for move in moves if move.parameters > 0), key=lambda move: move.price)
    returns = sorted((move for move in moves if move.parameters < 0), key=lambda move: -move.price)
    chosen: list[Move] = []
    moved: set[tuple[int, bool]] = set()
    removed = 0

    def next_of(candidates: list[Move]) -> Move | None:
        return next((move for move in candidates if (move.layer, move.heads is None) not in moved), None)

    while True:
        cheap, dear = next_of(removals), next_of(returns)
        if cheap is None or dear is None or cheap.price >= dear.price:
            return chosen
        move = dear if removed + dear.parameters >= 0 else cheap
        chosen.append(move)
        moved.add((move.layer, move.heads is None))
        removed += move.parameters
