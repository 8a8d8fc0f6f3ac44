"""Prints the PyTorch table of docs/speed.md: an export beside its dense original, in turn, in one process.

    python -m tests.convert.measure_torch_speed EXPORT DENSE_EXPORT [CONTEXT [REPEATS]]

Both folders are what `intraslice export` wrote. Prefill reads CONTEXT random tokens; decode adds one token behind them.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from intraslice_jax.convert.modeling_intraslice import CACHE
from tests.convert.exported import in_torch, quiet_torch


def once(model, tokens: torch.Tensor) -> tuple[float, float]:
    """Seconds of a prefill without its last token's head for the others, and of the median of 8 decode steps."""
    started = time.perf_counter()
    out = model(tokens, use_cache=True, logits_to_keep=1)
    prefill, steps = time.perf_counter() - started, []
    for _ in range(8):
        started = time.perf_counter()
        out = model(tokens[:, -1:], use_cache=True, **{CACHE: out[CACHE]})
        steps.append(time.perf_counter() - started)
    return prefill, statistics.median(steps)


def main(pruned: str, dense: str, context: str = "1024", repeats: str = "5") -> None:
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, quiet_torch(Path(folder)), torch.inference_mode():
        torch.set_num_threads(threads)
        models = {"dense": in_torch(dense), "pruned": in_torch(pruned)}
        tokens = torch.randint(3, 1000, (1, int(context)), generator=torch.Generator().manual_seed(0))
        for model in models.values():
            once(model, tokens)
        rounds = [{name: once(model, tokens) for name, model in models.items()} for _ in range(int(repeats))]
    print(f"context {context}, {threads} threads, medians of {repeats}")
    for i, phase in enumerate(("prefill", "decode")):
        slow, fast = (1e3 * statistics.median(found[name][i] for found in rounds) for name in ("dense", "pruned"))
        print(f"{phase:8s} dense {slow:9.2f} ms  pruned {fast:9.2f} ms  {slow / fast:.2f} x faster")


if __name__ == "__main__":
    main(*sys.argv[1:])
