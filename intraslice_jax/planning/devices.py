"""Accelerators that a plan knows by name, from their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from intraslice_jax.errors import InputError

UTILISATION = 0.4
"""The share of a peak rate that is assumed where no rate was given or measured."""


@dataclass(frozen=True)
class Accelerator:
    """One device and its share of a host.

    Attributes:
        name: as its maker calls it.
        memory: bytes.
        narrow: bfloat16 operations per second, at the peak and with dense operands.
        wide: float32 operations per second at the highest precision: six bfloat16 passes on a TPU, the float32 units
            of a GPU.
        solve: float64 operations per second of whatever solves.
        solves: whether the device does that itself; TPUs have no float64 and leave it to their host.
        per_host: devices of one host.
        host_memory: bytes.
    """

    name: str
    memory: int
    narrow: float
    wide: float
    solve: float
    solves: bool
    per_host: int
    host_memory: int


V5E = Accelerator("TPU v5e", 16 * 10**9, 197e12, 197e12 / 6, 1e12, False, 4, 192 * 10**9)
V5P = Accelerator("TPU v5p", 95 * 10**9, 459e12, 459e12 / 6, 1e12, False, 4, 448 * 10**9)
H100 = Accelerator("H100 SXM", 80 * 10**9, 989e12, 67e12, 34e12, True, 8, 2 * 10**12)


def parse_devices(text: str) -> tuple[Accelerator, int]:
    """The kind and the number of devices that a text such as `v5e-16`, `v5p-64` or `8xH100` names.

    Google counts TensorCores in v5p-64: it has 32 chips, which jax sees as 32 devices.

    Raises:
        InputError: the text names something else.
    """
    match = re.fullmatch(r"v5e-(?P<v5e>\d+)|v5p-(?P<v5p>\d+)|(?P<h100>\d+)xH100", text, re.IGNORECASE)
    if match:
        if match["v5e"] and int(match["v5e"]):
            return V5E, int(match["v5e"])
        if match["v5p"] and int(match["v5p"]) >= 2 and int(match["v5p"]) % 2 == 0:
            return V5P, int(match["v5p"]) // 2
        if match["h100"] and int(match["h100"]):
            return H100, int(match["h100"])
    raise InputError(f"`devices={text}` is not known; expected for example v5e-16, v5p-64 (32 chips) or 8xH100")
