"""Prints the peak of the memory that a real run takes beyond what the process had, as JSON; `test_memory.py` runs it.

The first run compiles, the second one is measured: the operating system's own high-water mark, set back before it.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import jax
import numpy as np

from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig, uniform_query_to_kv
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Decoder, decoder_to_arrays
from intraslice_jax.prune.pipeline import prune_model


def status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(config: ModelConfig, samples: int, seq: int, settings: PruneConfig) -> int:
    """Bytes at the peak of a run, the model's own included."""
    model = LanguageModel(config, Decoder(config), None, "measured")
    windows = np.random.default_rng(0).integers(0, config.vocab_size, (samples, seq)).astype(np.int32)
    prune_model(model, windows, settings)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    prune_model(model, windows, settings)
    return status("VmHWM") - before + sum(a.nbytes for a in jax.tree.leaves(decoder_to_arrays(model.decoder)))


def main(sizes: str, settings: str) -> None:
    hidden, inner, layers, samples, seq = json.loads(sizes)
    shape = LayerShape(uniform_query_to_kv(hidden // 64, hidden // 128), 64, 64, 64, inner)
    config = ModelConfig("llama", 512, hidden, 64, 64, (shape,) * layers)
    print(json.dumps(measure(config, samples, seq, PruneConfig(iterative="never", **json.loads(settings)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
