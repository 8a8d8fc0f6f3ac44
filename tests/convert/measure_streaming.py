"""Peak memory of conversion and export on a synthetic Llama checkpoint of any size (Linux).

    python -m tests.convert.measure_streaming FOLDER [LAYERS]

34 layers (the default) make 3.3 GB of bfloat16. FOLDER gets the checkpoint and what is written from it, together
four times that size, and can be deleted afterwards.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from intraslice_jax.convert.families import FAMILIES
from intraslice_jax.convert.shards import Planned, write_tensors
from tests.without_torch import WITHOUT_TORCH

# The program without torch, as its users have it, and a last line with the most memory that it had resident, in kB.
_RUN = f"""
{WITHOUT_TORCH}
from intraslice_jax.cli import main
code = main(sys.argv[1:])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
sys.exit(code)
"""
COMMANDS = {
    "Hugging Face to Orbax": ["convert", "hf", "orbax"],
    "Orbax to Hugging Face": ["export", "orbax", "back"],
    "Hugging Face to float16": ["export", "hf", "half", "--dtype", "float16"],
}


def make_checkpoint(folder: Path, layers: int) -> int:
    """Writes a bfloat16 Llama in shards and returns the bytes of its largest tensor, the embedding."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    family = FAMILIES["LlamaForCausalLM"]
    tensors = family.tensors(family.read_config(raw, ""))
    plan = [Planned(t.name, np.dtype(ml_dtypes.bfloat16), t.shape) for t in tensors]
    write_tensors(folder, plan, _random(plan), 10**9)
    return max(tensor.nbytes for tensor in plan)


def _random(plan: list[Planned]) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for tensor in plan:
        yield tensor.name, rng.random(tensor.shape, np.float32)


def peak(folder: Path, arguments: list[str]) -> int:
    """Bytes that one command had resident at most."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return 1024 * int(done.stdout.split()[-1])


def main(folder: Path, layers: int) -> None:
    """Prints one line per command."""
    largest = make_checkpoint(folder / "hf", layers)
    size = sum(file.stat().st_size for file in (folder / "hf").glob("*.safetensors"))
    limit = 1.3 * largest + 500e6
    print(f"checkpoint {size / 1e6:,.0f} MB, largest tensor {largest / 1e6:,.0f} MB, limit {limit / 1e6:,.0f} MB")
    for name, arguments in COMMANDS.items():
        print(f"{name}: peak {peak(folder, arguments) / 1e6:,.0f} MB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 34)
