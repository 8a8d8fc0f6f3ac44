"""The pruning methods by name."""

from __future__ import annotations

from collections.abc import Callable, Collection

from intraslice_jax.errors import InputError
from intraslice_jax.prune.baselines.flap import FLAP
from intraslice_jax.prune.baselines.magnitude import Magnitude
from intraslice_jax.prune.baselines.obs import OBS
from intraslice_jax.prune.baselines.wanda_sp import WandaSP
from intraslice_jax.prune.intraslice import IntraSlice
from intraslice_jax.prune.method import PruningMethod
from intraslice_jax.settings import closest

METHODS: dict[str, Callable[[], PruningMethod]] = {
    "intraslice": IntraSlice,
    "magnitude": Magnitude,
    "wanda_sp": WandaSP,
    "flap": FLAP,
    "obs": OBS,
}
"""What `PruneConfig.method` names: each prunes one layer after the other in the same loop."""

SLICEGPT = "slicegpt"
"""The method that rotates the stream between the layers: measured by `compare`, neither saved nor exported."""


def create_method(name: str) -> PruningMethod:
    """A method by its name.

    Raises:
        InputError: there is no such method, or it does not work layer by layer.
    """
    if name == SLICEGPT:
        raise InputError(
            f"method {SLICEGPT} changes the decoder itself and its result cannot be saved; "
            f"measure it with `intraslice compare`, or choose {', '.join(METHODS)}"
        )
    check_name(name, METHODS)
    return METHODS[name]()


def check_name(name: str, known: Collection[str]) -> None:
    """Raises InputError for a method that is not known, with the likeliest one."""
    if name not in known:
        raise InputError(f"there is no method {name!r}; {closest(name, known)}")
