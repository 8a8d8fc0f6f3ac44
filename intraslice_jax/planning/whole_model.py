"""What of a run goes through all layers at once: estimating ratios, and the refinement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from intraslice_jax.calibrate.gradients import automatic_batch
from intraslice_jax.calibrate.held_out import held_out_count
from intraslice_jax.models.attention_by_head import heads_together
from intraslice_jax.parallel.batches import even_batch
from intraslice_jax.planning.memory import Residency, Setting
from intraslice_jax.planning.programs import Program
from intraslice_jax.planning.whole_memory import gradients_phase, kept_windows, kl_phase, refinement_phase
from intraslice_jax.planning.whole_programs import WholeModelSteps
from intraslice_jax.prune.divergence import judging_shapes
from intraslice_jax.prune.estimators import FromGradients, find_estimator
from intraslice_jax.prune.sensitivity import KLSensitivity

if TYPE_CHECKING:
    from intraslice_jax.planning.plan import Run


@dataclass(frozen=True)
class WholeModel:
    """The stages of a run that are not its loop over layers.

    Attributes:
        setting: of the run.
        programs: those that it needs, by stage and step.
        batch: sequences of one step of the mask gradients, over all devices; 0 if there is none.
    """

    setting: Setting
    programs: Mapping[str, Program]
    batch: int

    @classmethod
    def of(cls, setting: Setting, run: Run, steps: WholeModelSteps) -> WholeModel:
        """Compiles what the run's ratios and refinement need.

        Raises:
            InputError: there are no such ratios.
        """
        estimator, programs, batch = find_estimator(run.ratios), {}, 0
        samples, seq, rows = setting.samples, setting.seq, setting.mesh.data
        if isinstance(estimator, FromGradients):
            with heads_together():
                most = rows * automatic_batch(setting.dense, seq, estimator.matrices, setting.budget)
            batch = even_batch(samples, most, rows)
            programs |= steps.gradients(batch, estimator.matrices)
        if isinstance(estimator, KLSensitivity):
            programs |= steps.kl(*max(judging_shapes(samples, seq), key=math.prod))
        if run.refine and samples > held_out_count(samples):
            programs |= steps.refinement()
        return cls(setting, programs, batch)

    def phases(self, loop: Mapping[str, Mapping[str, int]], residency: Residency) -> dict[str, dict[str, int]]:
        """Bytes on the first device by stage, and by part.

        A refinement is left out where the weights do not wait on the devices: then a run has none.

        Args:
            loop: `intraslice_jax.planning.memory.phases` for this residency.
            residency: where the weights wait.
        """
        setting, programs, found = self.setting, self.programs, {}
        if self.batch:
            found["gradients"] = gradients_phase(setting, programs, residency, self.batch)
        if "kl: block" in programs:
            found["kl"] = kl_phase(setting, loop, programs, residency)
        if "refinement: update" in programs and residency == "device":
            kept = kept_windows(setting.samples, held_out_count(setting.samples), setting.mesh.data)
            found["refinement"] = refinement_phase(setting, programs, kept)
        return found
