"""Prints the tables of docs/scaling.md; run it as `JAX_NUM_CPU_DEVICES=8 python -m tests.parallel.measure_scaling`.

What lies on the first device is counted shard by shard; what travels is read from the compiled programs.
"""

import re

import jax
import numpy as np

from intraslice_jax.calibrate import statistics
from intraslice_jax.calibrate.statistics import GramMoments, empty_map_moments, zeros_like_moments
from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.model import LanguageModel, on_mesh
from intraslice_jax.models.decoder import Decoder, decoder_to_arrays
from intraslice_jax.parallel import moments, placement
from intraslice_jax.parallel.mesh import make_mesh
from intraslice_jax.prune.calibration import ResidualStream

ITEM = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1, "u32": 4}
SHAPE = LayerShape(tuple(h // 2 for h in range(8)), 32, 32, 32, 768)
CONFIG = ModelConfig("llama", 4096, 256, 32, 32, (SHAPE,) * 4)


def on_first_device(tree) -> int:
    first = jax.devices()[0]
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


def collective_bytes(compiled) -> dict[str, int]:
    """Bytes that each kind of collective leaves on a device."""
    found: dict[str, int] = {}
    for shapes, kind in re.findall(r"= (\S.*?) (all-[a-z]+|reduce-scatter|collective-permute)\(", compiled.as_text()):
        sizes = re.findall(r"(f32|bf16|s32|u32|pred)\[([\d,]*)\]", shapes)
        total = sum(ITEM[dtype] * int(np.prod([int(n) for n in dims.split(",") if n])) for dtype, dims in sizes)
        found[kind] = found.get(kind, 0) + total
    return found


def layer_sums(mesh) -> dict[str, moments.MomentSum]:
    heads, v, inner = SHAPE.num_attention_heads, SHAPE.v_head_dim, SHAPE.intermediate_size
    return {
        "attention": moments.MomentSum(empty_map_moments(heads * v, heads * v), mesh),
        "MLP": moments.MomentSum(zeros_like_moments(GramMoments, gram=(inner, inner), total=(inner,)), mesh),
    }


def main() -> None:
    model = LanguageModel(CONFIG, Decoder(CONFIG), None, "measured")
    windows = np.zeros((16, 64), np.int32)
    print("| mesh | parameters | moments: attention | moments: MLP | layer in use | stream per token |")
    print("|---|---:|---:|---:|---:|---:|")
    for spec in ("data=1,model=1", "data=2", "data=4", "data=8", "data=4,model=2", "data=2,model=4", "data=1,model=8"):
        placed = on_mesh(model, make_mesh(spec))
        mesh = placement.mesh_of(placed.decoder)
        sums = {name: on_first_device(total._moments) for name, total in layer_sums(mesh).items()}
        layer = placement.gathered(placed.decoder.layers[0])
        per_token = {
            on_first_device(ResidualStream.start(placed, windows[:count], 1).batches) / (count * windows.shape[1])
            for count in (8, 16)
        }
        cells = [on_first_device(decoder_to_arrays(placed.decoder)), *sums.values(), on_first_device(layer)]
        print(f"| {spec} | {' | '.join(f'{c:,}' for c in cells)} | {' or '.join(f'{b:g}' for b in per_token)} |")
    print("\n| mesh | weights gathered | MLP step | MLP reduction |\n|---|---|---|---|")
    for spec in ("data=2", "data=8", "data=2,model=4"):
        placed = on_mesh(model, make_mesh(spec))
        mesh = placement.mesh_of(placed.decoder)
        leaves, _ = jax.tree.flatten(placed.decoder.layers[0])
        block = placement.gathered(placed.decoder.layers[0])
        move = placement._moved(tuple(leaf.sharding for leaf in jax.tree.leaves(block)))
        total = layer_sums(mesh)["MLP"]._moments
        stream = ResidualStream.start(placed, windows[:8], 1)
        step = moments.add_on_mesh.lower(
            statistics.attend_and_add_mlp, mesh, 1, (), True, total, None, (block, stream.batches[0], stream.rope)
        )
        programs = (move.lower(leaves), step, moments.reduce_over_data.lower(total, mesh))
        cells = [", ".join(f"{k} {v:,}" for k, v in collective_bytes(p.compile()).items()) or "none" for p in programs]
        print(f"| {spec} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
