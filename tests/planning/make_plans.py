"""Makes docs/plans.md: `intraslice plan` for well-known models on well-known sets of devices.

    python -m tests.planning.make_plans docs/plans.md

Some minutes; a plan compiles the program's steps for as many devices as the set has, and makes no weights.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-405b", "phi-4")
DEVICES = ("v5e-16", "v5p-64", "8xH100")

HEAD = """# Ready plans

What `intraslice plan` says of five models on three sets of devices: 128 calibration windows of 2,048 tokens,
weights in bfloat16, 30 % removed, uniform ratios (`--preset fast`). Memory comes from steps that were compiled, for
host devices, with the shapes that each device would have; **nothing here was run on these devices**. Their memory and
peak rates are those of the data sheets, 40 % of the peak is assumed, and communication takes no time, so take the
seconds as a lower bound; compiling comes on top. TPUs have no float64 and leave the solves to their hosts, which is
most of their seconds. With this preset nothing estimates ratios, and there is no refinement.

Each row is the first mesh and residency that fit:

    intraslice plan llama-2-70b --devices v5p-64 --preset fast

"""
COLUMNS = (
    "model",
    "devices",
    "mesh",
    "residency",
    "GiB per device, at its peak in",
    "host, GiB",
    "checkpoint + journal, GiB",
    "PFLOP per device",
    "received per layer, GiB",
    "seconds",
    "layer shapes",
)
FOOT = """
Llama-3.1-405B is planned with the context and vocabulary of its `config.json`. The table is made by
`python -m tests.planning.make_plans docs/plans.md`.
"""


def row(model: str, devices: str) -> str:
    """One line of the table; the refusal where nothing fits."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = ["plan", model, "--preset", "fast", "--devices", devices, "--output", str(file)]
        # The number of host devices is fixed when jax starts.
        done = subprocess.run([sys.executable, "-m", "intraslice_jax", *command], capture_output=True, text=True)
        if done.returncode:
            return f"| {model} | {devices} | {' '.join(done.stderr.split()).partition(': ')[2]} | | | | | | | | |"
        plan = json.loads(file.read_text(encoding="utf-8"))
    cells = [
        model,
        devices,
        f"`{plan['run']['mesh']}`",
        plan["run"]["residency"],
        f"{gib(plan['device_bytes'])}, {plan['peak_phase']}",
        gib(plan["host_bytes"]),
        " + ".join(gib(plan["disk_bytes"][part]) for part in ("checkpoint", "journal")),
        f"{sum(plan['flops_per_device'].values()) / 1e15:.2f}",
        gib(sum(plan["collective_bytes_per_layer"].values())),
        f"{plan['seconds']:.0f}",
        str(plan["distinct_layer_shapes"]["pruned"]),
    ]
    return f"| {' | '.join(cells)} |"


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


if __name__ == "__main__":
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for model in MODELS:
        for devices in DEVICES:
            lines.append(row(model, devices))
            print(lines[-1], flush=True)
    Path(sys.argv[1]).write_text(HEAD + "\n".join(lines) + "\n" + FOOT, encoding="utf-8")
