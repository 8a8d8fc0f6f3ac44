"""Bytes on each device of what goes through all layers: mask gradients, divergences, refinement; arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp

from intraslice_jax.calibrate.held_out import held_out_count
from intraslice_jax.models.decoder import abstract_arrays
from intraslice_jax.parallel.rules import RULES
from intraslice_jax.planning.memory import Residency, Setting, layer_arrays, shard_bytes, standing, stream_bytes, widest
from intraslice_jax.planning.programs import Program
from intraslice_jax.prune.divergence import judging_shapes


def gradients_phase(
    setting: Setting, programs: Mapping[str, Program], residency: Residency, batch: int
) -> dict[str, int]:
    """By part, where the sum is largest in a batch of the mask gradients.

    Args:
        setting: of the run.
        programs: of `WholeModelSteps.gradients`.
        residency: where the weights wait.
        batch: sequences, over all devices.
    """
    dense, layers = setting.dense, setting.dense.num_layers
    boundary = stream_bytes(dense, batch, setting.seq, jnp.dtype(setting.dtype).itemsize, setting.mesh)
    forward, loss, backward = (programs[f"gradients: {name}"] for name in ("forward", "loss", "backward"))
    base = {
        "weights at rest": standing(setting, residency)["weights at rest"],
        "layer in use": setting.layer(dense, RULES.in_use()) if setting.mesh.devices > 1 else 0,
        "head moments": layers * (forward.new_bytes - boundary),
    }
    moments = [
        base | {"boundaries": (layers + 1) * boundary, "step temporaries": forward.temporary_bytes},
        base
        | {
            "layer in use": head_bytes(setting),
            "boundaries": (layers + 2) * boundary,  # and what is behind the final norm
            "step temporaries": loss.new_bytes + loss.temporary_bytes,
        },
        # From the last layer to the first, masks take the place of boundaries. What left the last layer stays, and
        # there is the gradient with respect to it.
        *(
            base
            | {
                "boundaries": (left + 2) * boundary,
                "masks": (layers - left + 1) * backward.new_bytes,
                "step temporaries": backward.temporary_bytes,
            }
            for left in (layers, 1)
        ),
    ]
    return _largest(moments)


def kl_phase(
    setting: Setting,
    loop: Mapping[str, Mapping[str, int]],
    programs: Mapping[str, Program],
    residency: Residency,
) -> dict[str, int]:
    """By part, where the sum is largest while modules are pruned alone and their divergences measured.

    Args:
        setting: of the run.
        loop: `intraslice_jax.planning.memory.phases` of the same run.
        programs: of `WholeModelSteps.kl`.
        residency: where the weights wait.
    """
    mesh, held_out = setting.mesh, held_out_count(setting.samples)
    share = 1 - held_out / setting.samples if held_out < setting.samples else 1
    tokens = sum(
        windows * seq // (1 if windows % mesh.data else mesh.data)
        for windows, seq in judging_shapes(setting.samples, setting.seq)
    )
    judging = tokens * setting.dense.hidden_size * jnp.dtype(setting.dtype).itemsize
    found = standing(setting, residency)
    base = {
        "weights at rest": found["weights at rest"],
        "pruned layers": setting.layer(setting.pruned),  # only the one at hand
        "layer in use": found["layer in use"],
        "residual stream": int(share * found["residual stream"]),
        "judging windows": judging,
    }
    # What was kept of a layer's attention stays while its MLP is at work.
    mixed = loop["head moments"]["kept activations"]
    moments = []
    for name, parts in loop.items():
        kept = parts["kept activations"] + mixed * (name in ("MLP", "MLP solve", "output"))
        moments.append({**parts, **base, "kept activations": kept})
    block, loss = programs["kl: block"], programs["kl: loss"]
    whole = moments[list(loop).index("output")]  # all that a layer keeps, as at a measurement
    another = setting.layer(setting.dense, RULES.in_use()) if mesh.devices > 1 else 0
    moments += [
        whole
        | {
            "layer in use": base["layer in use"] + another,
            "judging windows": 2 * judging,
            "step temporaries": block.new_bytes + block.temporary_bytes,
        },
        whole
        | {
            "layer in use": base["layer in use"] + head_bytes(setting),
            "judging windows": 2 * judging,
            "step temporaries": loss.new_bytes + loss.temporary_bytes,
        },
    ]
    return _largest(moments)


def refinement_phase(setting: Setting, programs: Mapping[str, Program], kept: int) -> dict[str, int]:
    """By part, where the sum is largest in the refinement, of which all layers are on the devices.

    Args:
        setting: of the run.
        programs: of `WholeModelSteps.refinement`.
        kept: windows on a device row, of those whose predictions by the dense model are kept.
    """
    dense, pruned, mesh, layers = setting.dense, setting.pruned, setting.mesh, setting.pruned.num_layers
    itemsize = jnp.dtype(setting.dtype).itemsize
    narrow = setting.dtype != "float32"
    window = stream_bytes(dense, mesh.data, setting.seq, itemsize, mesh)
    wide = stream_bytes(dense, mesh.data, setting.seq, 4, mesh)
    arrays = layer_arrays(pruned, widest(dense), "float32")
    projections = shard_bytes({name: a for name, a in arrays.items() if name.endswith("_proj")}, mesh)
    loss, backward, update = (programs[f"refinement: {name}"] for name in ("loss", "backward", "update"))
    found = standing(setting, "device")
    base = {
        "weights at rest": found["weights at rest"],
        "pruned layers": found["pruned layers"],
        "residual stream": setting.stream,  # what the loop left behind its last layer
        "dense predictions": kept * window,
        "float32 weights and moments": 3 * layers * projections,
    }
    # The final norm keeps its input in float32; its output and the gradient there stay until the step ends.
    loss_kept = window + wide * narrow
    in_use = setting.layer(pruned, RULES.in_use()) if narrow or mesh.devices > 1 else 0
    moments = [
        base
        | {
            "layer in use": head_bytes(setting),
            "boundaries": (layers + 1) * window + loss_kept,
            "step temporaries": loss.new_bytes + loss.temporary_bytes,
        },
        # The gradients of the layer before are still there, and those of this one are not yet in parts.
        base
        | {
            "layer in use": in_use,
            "boundaries": (layers + 2) * window + loss_kept + wide,
            "gradients": projections + backward.new_bytes,
            "step temporaries": backward.temporary_bytes,
        },
        base
        | {
            "boundaries": (layers + 2) * window + loss_kept + wide,
            "gradients": projections,
            "step temporaries": update.new_bytes + update.temporary_bytes,
        },
        # At the end the learned weights are cast, all of them.
        base | {"learned weights": layers * projections * itemsize // 4 * narrow},
    ]
    return _largest(moments)


def head_bytes(setting: Setting) -> int:
    """The head as it is used on a mesh, made whole along `data`; without one it is used where it lies."""
    if setting.mesh.devices == 1:
        return 0
    table = {"lm_head": abstract_arrays(setting.dense.with_layers(()), setting.dtype)["embed_tokens"]}
    return shard_bytes(table, setting.mesh, RULES.in_use())


def kept_windows(samples: int, held_out: int, rows: int) -> int:
    """Windows of the training and the held-out part that one of so many device rows gets."""
    return math.ceil((samples - held_out) / rows) + math.ceil(held_out / rows)


def _largest(moments: list[dict[str, int]]) -> dict[str, int]:
    return max(moments, key=lambda parts: sum(parts.values()))
