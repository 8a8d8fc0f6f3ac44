"""Estimators of how much each layer can lose, by name (docs/method.md section 4).

A new estimator is one class, or one function, that follows `Estimator`; `ESTIMATORS[name] = MyEstimator()` makes it
known to `ratios="name"`.
"""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from typing_extensions import TypedDict

from intraslice_jax.calibrate.gradients import GroupGradients, OnBatch, group_gradients, head_grams
from intraslice_jax.config import ModelConfig, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.model import LanguageModel
from intraslice_jax.prune.allocation import UnitScores, allocate, allocate_evenly, check_reachable, modules
from intraslice_jax.prune.budget import TOLERANCE, LayerRatios
from intraslice_jax.prune.linalg import eigh_descending, solver_precision, to_solver
from intraslice_jax.prune.resume import Resumable, RunLog
from intraslice_jax.prune.sensitivity import KLSensitivity
from intraslice_jax.reading import Index, check, parse_json, read_bytes
from intraslice_jax.reading_yaml import read_yaml
from intraslice_jax.settings import closest, shortened

DEGENERATE = 1e-6
"""Eigenvalues closer than this times the largest count as equal: float32 moments do not tell them apart."""


GRADIENTS = "gradients"
"""What a run's log calls the sums over the groups that are done."""

KEPT_SUMS = 16
"""How often they are kept there during a pass over the text; of a large model they are some hundred MB."""

Terms: TypeAlias = Mapping[str, Sequence[np.ndarray]]
"""By name, an array per layer."""

TermsOf: TypeAlias = Callable[[GroupGradients], Terms]


@runtime_checkable
class Estimator(Protocol):
    """Judges the units of a model.

    Returns either `UnitScores`, which are ranked over the whole model and turned into ratios that meet the
    budget, or `LayerRatios`, which are used as they are.
    """

    def __call__(
        self,
        model: LanguageModel,
        windows: Int[np.ndarray, "samples seq"],
        config: PruneConfig,
        on_batch: OnBatch | None = None,
    ) -> UnitScores | LayerRatios:
        """Scores or ratios.

        Args:
            model: to be pruned.
            windows: int32 calibration tokens.
            config: how much is to be removed.
            on_batch: to be told the sequences done and their number, by estimators that take long.
        """
        ...


@runtime_checkable
class ResumableEstimator(Protocol):
    """An estimator that takes long, and goes on where it was when the run was stopped."""

    def resumed(
        self,
        model: LanguageModel,
        windows: Int[np.ndarray, "samples seq"],
        config: PruneConfig,
        on_batch: OnBatch | None,
        run_log: RunLog | None,
    ) -> UnitScores | LayerRatios:
        """As `Estimator.__call__`; `run_log` holds what an earlier call left there, and gets what this one finds."""
        ...


def estimate_ratios(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    config: PruneConfig,
    on_batch: OnBatch | None = None,
    run_log: RunLog | None = None,
) -> LayerRatios:
    """The ratios that `config.ratios` names: an estimator, or a file of ratios.

    Raises:
        InputError: there is no such estimator, the file is malformed, or the budget is beyond what can be removed.
        RunError: an activation, a loss or a gradient is not finite.
    """
    estimator = find_estimator(config.ratios)
    # What is beyond reach is said at once; attention and MLP share one budget only in `kl`.
    if isinstance(estimator, KLSensitivity):
        check_reachable(*modules(model.config, config), config)
    elif not isinstance(estimator, FromFile):
        allocate_evenly(model.config, config)
    if run_log is not None and isinstance(estimator, ResumableEstimator):
        found = estimator.resumed(model, windows, config, on_batch, run_log)
        run_log.drop_arrays(GRADIENTS)
    else:
        found = estimator(model, windows, config, on_batch)
    if isinstance(found, UnitScores):
        return allocate(model.config, found, config)
    check_ratios(found, model.config, config, config.ratios)
    return found


def find_estimator(name: str) -> Estimator:
    """The estimator of that name, or one that reads the file of that name."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    path = Path(name)
    if path.suffix.lower() in (".json", ".yaml", ".yml") or os.path.isfile(name):  # of any length
        return FromFile(path)
    raise InputError(
        f"unknown ratios {shortened(name)}; {closest(name, ESTIMATORS)}; or name a .json or .yaml file of ratios"
    )


@dataclass(frozen=True)
class Uniform:
    """The same ratio everywhere."""

    def __call__(
        self, model: LanguageModel, windows: np.ndarray, config: PruneConfig, on_batch: OnBatch | None = None
    ) -> LayerRatios:
        return allocate_evenly(model.config, config)


class FromGradients(Resumable):
    """Scores from sums over groups of gradients; a run that is stopped goes on with the sums that it had."""

    matrices = False

    def resumed(
        self,
        model: LanguageModel,
        windows: np.ndarray,
        config: PruneConfig,
        on_batch: OnBatch | None,
        run_log: RunLog | None,
    ) -> UnitScores:
        """The scores, going on behind the sequences whose sums the log has."""
        terms_of = self.prepare(model, windows, config)
        totals = _Totals.kept_in(run_log)
        groups = group_gradients(
            model,
            windows,
            group=config.gradient_group,
            matrices=self.matrices,
            batch_size=config.batch_size,
            memory_budget=config.memory_budget,
            on_batch=on_batch,
            start=totals.sequences,
        )
        step = max(1, len(windows) // KEPT_SUMS)
        for group in groups:
            done = totals.sequences // step
            totals.add(terms_of(group), group.sequences)
            if totals.sequences // step > done:
                totals.keep_in(run_log)
        return self.scores(totals)

    @abc.abstractmethod
    def prepare(self, model: LanguageModel, windows: np.ndarray, config: PruneConfig) -> TermsOf:
        """What makes the terms of a group, float64."""

    @abc.abstractmethod
    def scores(self, totals: _Totals) -> UnitScores:
        """What is made of their sums over all groups."""


class Fisher(FromGradients):
    """Whole heads, and channels, by the squared gradients of their masks."""

    def prepare(self, model: LanguageModel, windows: np.ndarray, config: PruneConfig) -> TermsOf:
        def terms(group: GroupGradients) -> Terms:
            heads = [np.square(g.sum(1, dtype=np.float64)) for g in group.attention]
            return {"heads": heads, "channels": _squares(group.mlp)}

        return terms

    def scores(self, totals: _Totals) -> UnitScores:
        return UnitScores(totals["heads"], totals["channels"])


class FisherPCA(FromGradients):
    """Principal components of heads, by the squared gradients of the heads' masks rotated into their basis."""

    def prepare(self, model: LanguageModel, windows: np.ndarray, config: PruneConfig) -> TermsOf:
        def terms(group: GroupGradients) -> Terms:
            # All that the gradients g of a head say in any basis is in the sum of g^T g.
            products = [np.einsum("hv,hw->hvw", g, g, dtype=np.float64) for g in group.attention]
            grams = [np.asarray(gram, np.float64) for gram in group.head_gram]
            return {"products": products, "grams": grams, "channels": _squares(group.mlp)}

        return terms

    def scores(self, totals: _Totals) -> UnitScores:
        pairs = zip(totals["products"], totals["grams"], strict=True)
        return UnitScores(tuple(rotated_scores(product, gram) for product, gram in pairs), totals["channels"])


class FisherComponents(FromGradients):
    """Principal components of heads, by the squared gradients of masks on the components themselves."""

    matrices = True

    def prepare(self, model: LanguageModel, windows: np.ndarray, config: PruneConfig) -> TermsOf:
        grams = head_grams(model, windows, batch_size=config.batch_size, memory_budget=config.memory_budget)
        bases = [eigenbases(gram) for gram in grams]

        def terms(group: GroupGradients) -> Terms:
            components = [component_scores(m, basis) for m, basis in zip(group.matrices, bases, strict=True)]
            return {"components": components, "channels": _squares(group.mlp)}

        return terms

    def scores(self, totals: _Totals) -> UnitScores:
        return UnitScores(tuple(a.reshape(-1) for a in totals["components"]), totals["channels"])


def _squares(gradients: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.square(g, dtype=np.float64) for g in gradients]


@dataclass(frozen=True)
class FromFile:
    """Ratios from a JSON or YAML file `{"attention": [...], "mlp": [...]}` with a number per layer.

    A list `heads` of `num_attention_heads`, `qk_head_dim` and `v_head_dim` per layer says what stays of the attentions.
    """

    path: Path

    def __call__(
        self, model: LanguageModel, windows: np.ndarray, config: PruneConfig, on_batch: OnBatch | None = None
    ) -> LayerRatios:
        found = read_ratios(self.path, model.config)
        removed = found.sparsity(model.config)
        if config.sparsity is not None and abs(removed - config.sparsity) > TOLERANCE:
            raise InputError(
                f"{self.path} removes {removed:.1%} of the block parameters, `sparsity` asks for "
                f"{config.sparsity:.1%}; leave `sparsity` out, as the file says how much is removed, or change the file"
            )
        return found


ESTIMATORS: dict[str, Estimator] = {
    "uniform": Uniform(),
    "fisher": Fisher(),
    "fisher_pca": FisherPCA(),
    "fisher_components": FisherComponents(),
    "kl": KLSensitivity(),
}
"""Known estimators; may be added to."""


@dataclass(frozen=True)
class Eigenbases:
    """Principal components of the heads of a layer.

    Attributes:
        vectors: as columns, in descending order of their eigenvalue; [heads, v, v].
        space: number of the eigenspace of each; [heads, v]. Within one the vectors are arbitrary.
    """

    vectors: np.ndarray
    space: np.ndarray


def eigenbases(gram: Float[np.ndarray, "heads v v"]) -> Eigenbases:
    """Eigenvectors of each head's second moment."""
    with solver_precision():
        values, vectors = (np.asarray(a) for a in eigh_descending(to_solver(gram)))
    apart = values[:, :-1] - values[:, 1:] > DEGENERATE * values[:, :1]
    space = np.concatenate([np.zeros((len(values), 1), int), np.cumsum(apart, 1)], 1)
    return Eigenbases(vectors, space)


def rotated_scores(
    products: Float[np.ndarray, "heads v v"], gram: Float[np.ndarray, "heads v v"]
) -> Float[np.ndarray, " components"]:
    """Sum over groups of (g Q)_i^2 for every component i of every head, given the sums of g^T g.

    Within an eigenspace the mean over its components stands for each: it does not depend on the basis.
    """
    basis = eigenbases(gram)
    squares = np.einsum("hvi,hvw,hwi->hi", basis.vectors, products, basis.vectors, optimize=True)
    same = basis.space[:, :, None] == basis.space[:, None, :]
    return ((same @ squares[:, :, None])[:, :, 0] / same.sum(2)).reshape(-1)


def component_scores(
    matrix: Float[np.ndarray, "heads v v"], basis: Eigenbases
) -> Float[np.ndarray, "heads components"]:
    """[Q^T M Q]_ii^2 for every component i of every head of one group.

    Within an eigenspace of m components with the block B of the symmetrised matrix, the mean over all its
    orthonormal bases stands for each: (2 ||B||^2 + tr(B)^2) / (m (m + 2)), by the fourth moments of a uniformly
    distributed unit vector.
    """
    rotated = np.einsum("hvi,hvw,hwj->hij", basis.vectors, matrix, basis.vectors, optimize=True)
    rotated = 0.5 * (rotated + rotated.swapaxes(1, 2))
    same = basis.space[:, :, None] == basis.space[:, None, :]
    size = same.sum(2)
    diagonal = np.diagonal(rotated, axis1=1, axis2=2)
    trace = (same @ diagonal[:, :, None])[:, :, 0]
    rows = np.where(same, np.square(rotated), 0).sum(2)
    norm = (same @ rows[:, :, None])[:, :, 0]
    return (2 * norm + np.square(trace)) / (size * (size + 2))


def read_ratios(path: Path, config: ModelConfig) -> LayerRatios:
    """Ratios from a file, checked against the model.

    Raises:
        InputError: the file is missing, not JSON or YAML, or does not hold one number in [0, 1] per layer, and widths
            of heads that the model has if any.
    """
    advice = f"`ratios` takes a file of ratios or one of {', '.join(ESTIMATORS)}"
    if path.suffix.lower() == ".json":
        data = parse_json(read_bytes(path, advice), str(path), "write it again")
    else:
        data = read_yaml(path, advice)
    known = [field.name for field in dataclasses.fields(LayerRatios)]
    for key in data if isinstance(data, Mapping) else ():
        if key not in known:
            raise InputError(f"{path}: unknown key {shortened(key)}; {closest(str(key), known)}")
    ratios = check(data, LayerRatios, str(path))
    _check_shape(ratios, config, str(path))
    if len(ratios.heads) not in (0, config.num_layers):
        raise InputError(f"{path}: 'heads' holds {len(ratios.heads)} layers, the model has {config.num_layers}")
    for i, (widths, shape) in enumerate(zip(ratios.heads, config.layers, strict=False)):
        for name, value in dataclasses.asdict(widths).items():
            if value > getattr(shape, name):
                raise InputError(f"{path}: heads[{i}]: {name} is {value}, the model has {getattr(shape, name)}")
    return ratios


def check_ratios(ratios: LayerRatios, model: ModelConfig, prune: PruneConfig, name: str) -> None:
    """Raises InputError unless there is a ratio between 0 and the maximum for every layer and kind."""
    _check_shape(ratios, model, name)
    for kind in ("attention", "mlp"):
        for i, ratio in enumerate(getattr(ratios, kind)):
            if ratio > prune.max_ratio + 1e-9:
                raise InputError(
                    f"{name}: {kind}[{i}] is {ratio:g}, above the maximum of {prune.max_ratio:g}; "
                    "lower it or raise max_ratio"
                )


def _check_shape(ratios: LayerRatios, model: ModelConfig, name: str) -> None:
    for kind in ("attention", "mlp"):
        values = getattr(ratios, kind)
        if len(values) != model.num_layers:
            raise InputError(f"{name}: {kind!r} holds {len(values)} ratios, the model has {model.num_layers} layers")
        for i, value in enumerate(values):
            if not 0 <= value <= 1:  # NaN is neither
                raise InputError(f"{name}: {kind}[{i}] is {value:g}, expected a ratio between 0 and 1")


class Summed(TypedDict):
    """Facts of the sums of gradients: over how many sequences."""

    sequences: Index


class _Totals:
    """Sums of terms, an array per name and layer, and over how many sequences."""

    def __init__(self) -> None:
        self.sequences = 0
        self._arrays: dict[str, np.ndarray] = {}

    @classmethod
    def kept_in(cls, run_log: RunLog | None) -> _Totals:
        """Those of a run that was stopped, or empty ones."""
        totals = cls()
        kept = None if run_log is None else run_log.get_arrays(GRADIENTS, Summed)
        if kept is not None:
            totals._arrays, totals.sequences = kept[0], kept[1]["sequences"]
        return totals

    def keep_in(self, run_log: RunLog | None) -> None:
        """For a run that goes on later."""
        if run_log is not None:
            run_log.put_arrays(GRADIENTS, self._arrays, {"sequences": self.sequences})

    def add(self, terms: Terms, sequences: int) -> None:
        """Adds the terms of a group."""
        for name, layers in terms.items():
            for i, array in enumerate(layers):
                key = f"{name}.{i}"
                self._arrays[key] = self._arrays[key] + array if key in self._arrays else array
        self.sequences += sequences

    def __getitem__(self, name: str) -> tuple[np.ndarray, ...]:
        """The sums of all layers."""
        layers = sum(key.rpartition(".")[0] == name for key in self._arrays)
        return tuple(self._arrays[f"{name}.{i}"] for i in range(layers))
