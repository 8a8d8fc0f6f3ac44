"""The mesh: which devices share the calibration sequences and which share the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
from jax.sharding import AxisType, Mesh

from intraslice_jax.errors import InputError

DATA, MODEL = "data", "model"
"""Names of the mesh axes: sequences are split over `data`, heads and channels over `model`."""

_EXPECTED = "expected data=D,model=M, for example `mesh=data=4,model=2`"


def parse_mesh(text: str, devices: int) -> tuple[int, int]:
    """The sizes of the axes `data` and `model` that a text such as `data=4,model=2` names.

    An axis that is not named gets 1, except that `data` gets all devices that `model` leaves.

    Raises:
        InputError: the text is malformed, or so many devices cannot be arranged like that.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in (DATA, MODEL) or name in sizes or not value.isdecimal() or int(value) < 1:
            raise InputError(f"mesh {text!r}: {item.strip()!r} does not name the size of an axis; {_EXPECTED}")
        sizes[name] = int(value)
    model = sizes.get(MODEL, 1)
    if devices % model == 0:
        sizes.setdefault(DATA, devices // model)
    data = sizes.get(DATA, 1)
    if devices % (data * model):
        raise InputError(
            f"mesh {text!r} takes {data * model} devices, which do not divide the {devices} that there are; "
            f"choose sizes whose product divides {devices}"
        )
    return data, model


def make_mesh(text: str | None = None, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh that a text names; without one all devices on `data`, or None where there is only one device.

    A mesh smaller than the machine takes the first devices.

    Args:
        text: as for `parse_mesh`.
        devices: jax devices; those of all processes if not given.

    Raises:
        InputError: as `parse_mesh`; or the mesh leaves out devices of a run of several processes.
    """
    devices = list(jax.devices() if devices is None else devices)
    if text is None and len(devices) == 1:
        return None
    data, model = (len(devices), 1) if text is None else parse_mesh(text, len(devices))
    processes = len({device.process_index for device in devices})
    if processes > 1 and data * model < len(devices):
        raise InputError(
            f"mesh {text!r} takes {data * model} of {len(devices)} devices; "
            f"a run of {processes} processes must use all of theirs"
        )
    return jax.make_mesh((data, model), (DATA, MODEL), (AxisType.Auto,) * 2, devices=devices[: data * model])


def is_shared(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Whether it has devices of several processes."""
    return mesh is not None and mesh.is_multi_process


def ways(mesh: Mesh | None) -> int:
    """How many parts the sequences are split into."""
    return 1 if mesh is None else mesh.shape[DATA]
