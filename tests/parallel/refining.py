"""A process of two that stop a refinement and go on with it; says whether that changed a bit, and where it went on."""

import sys
from contextlib import closing

from intraslice_jax.config import ParallelConfig, PruneConfig
from intraslice_jax.io.journal import Journal
from intraslice_jax.model import on_mesh
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.parallel import distributed
from intraslice_jax.parallel.mesh import make_mesh
from intraslice_jax.parallel.placement import to_host
from intraslice_jax.prune import refine as refine_module
from intraslice_jax.prune.pipeline import prune_model
from intraslice_jax.prune.refine import RefineSettings, refine
from tests.prune.flavours import make, windows

port, number, folder = sys.argv[1:]
distributed.start(ParallelConfig(coordinator=f"localhost:{port}", num_processes=2, process_id=int(number)))
refine_module.LEAST_SECONDS, refine_module.WRITING = 0.0, 1e-9  # the first state is kept, and no other
model, tokens = on_mesh(make("gqa"), make_mesh("data=2,model=2")), windows(16)
pruned = prune_model(model, tokens, PruneConfig(0.4, align=2, iterative="never")).decoder


class Stop(Exception):
    """Stands for whatever ends a run."""


def learn(run_log: Journal | None, steps: int | None = None) -> tuple[list[int], dict[str, bytes]]:
    """The windows told, and the notes and the bits of the learned weights; so many steps end the run."""
    told: list[int] = []

    def on_batch(done: int, _: int) -> None:
        told.append(done)
        if len(told) == steps:
            raise Stop

    try:
        learned = refine(model, pruned, tokens, RefineSettings(passes=2), on_batch, run_log)
    except Stop:
        return told, {}
    bits = {name: to_host(array).tobytes() for name, array in decoder_to_arrays(learned.decoder).items()}
    return told, bits | {"notes": repr(learned.notes).encode()}


_, expected = learn(None)
for last in (3, None):
    with closing(Journal(folder)) as journal:
        journal.begin({})
        told, found = learn(journal, last)
print("same" if found == expected else "different", *told, flush=True)
distributed.barrier("done")
