"""Structured pruning of language models with IntraSlice, in JAX.

    import intraslice_jax as isl

    model = isl.load("model.gguf")
    pruned = isl.prune(model, text, sparsity=0.3)

The functions are imported when first used, so that importing the package (and `intraslice --help`) is instant.

`isl.prune` is the function. Modules of the subpackage of that name are imported with `from`, as in
`from intraslice_jax.prune import pipeline`; `import intraslice_jax.prune.pipeline as p` would look into the function.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intraslice_jax.api import export, generate, load, perplexity, prune, restore, save

__all__ = ["export", "generate", "load", "perplexity", "prune", "restore", "save"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("intraslice-jax")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from intraslice_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """The import of the subpackage `prune` would otherwise put it in the place of the function."""

    @property
    def prune(self) -> Any:
        return __getattr__("prune")

    @prune.setter
    def prune(self, _: ModuleType) -> None:
        """The subpackage stays in `sys.modules`, where `from intraslice_jax.prune...` finds it."""


sys.modules[__name__].__class__ = _Package
