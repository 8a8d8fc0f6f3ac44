"""Peak memory of pruning with the layers on the device, in host memory and on disk (Linux, one CPU device).

    python -m tests.prune.measure_residency FOLDER [LAYERS]

FOLDER gets a float32 Llama of 26 MB per layer (16 layers by default) and what is made of it, and can be deleted
afterwards.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.allocator import FREED_AT_ONCE
from tests.tiny import tiny_config, tiny_text, tiny_weights, write_tiny_llama

# The arrays that jax holds after each layer, and the most memory that the process had resident, in bytes.
_RUN = """
import sys
import jax
from intraslice_jax.progress import RunProgress
from intraslice_jax.cli import main

seen = []
original = RunProgress.on_layer
def on_layer(self, record):
    seen.append(sum(array.nbytes for array in jax.live_arrays()))
    original(self, record)
RunProgress.on_layer = on_layer
code = main(sys.argv[1:])
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(max(seen), 1024 * int(peak))
sys.exit(code)
"""
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 1792,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
}


def make(folder: Path, layers: int) -> int:
    """Writes a model and a text; returns the bytes of the weights."""
    config = tiny_config(**SIZES, num_hidden_layers=layers)
    weights = tiny_weights(config)
    write_tiny_llama(folder / f"model{layers}", weights=weights, **SIZES, num_hidden_layers=layers)
    (folder / "text").write_text(tiny_text())
    return sum(array.nbytes for array in weights.values())


def measure(folder: Path, layers: int, residency: str, *options: str) -> tuple[int, int]:
    """The most bytes in jax's arrays after a layer, and the most bytes resident, of one run."""
    arguments = ["prune", f"model{layers}", "-o", f"{layers}-{residency}", "--residency", residency, "--overwrite"]
    arguments += ["--calibration", "text", "--samples", "2", "--sequence-length", "32", "--preset", "fast", *options]
    command, environment = [sys.executable, "-c", _RUN, *arguments], os.environ | FREED_AT_ONCE
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    live, peak = done.stdout.splitlines()[-1].split()
    return int(live), int(peak)


def main(folder: Path, layers: int) -> None:
    """Prints one line per residency."""
    print(f"weights {make(folder, layers) / 1e6:,.0f} MB; of a model of 1 layer {make(folder, 1) / 1e6:,.0f} MB")
    for residency in ("device", "host", "disk"):
        for count in (1, layers):
            live, peak = measure(folder, count, residency)
            print(f"{residency}, {count} layers: arrays {live / 1e6:,.0f} MB, peak {peak / 1e6:,.0f} MB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16)
