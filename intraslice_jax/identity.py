"""What a pruning run is of: what must be equal for an interrupted one to be continued with the same bits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from intraslice_jax.config import CalibrationConfig, PruneConfig
from intraslice_jax.io.checkpoint import versions
from intraslice_jax.model import LanguageModel
from intraslice_jax.parallel.fingerprint import fingerprint
from intraslice_jax.parallel.placement import mesh_of


def run_identity(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    text_sha256: str,
    config: PruneConfig,
    calibrate: CalibrationConfig,
) -> dict[str, Any]:
    """JSON-serialisable facts of a run. Where a text was read from does not matter, its digest does."""
    mesh = mesh_of(model.decoder)
    file = Path(config.ratios)
    facts = {
        "prune": {**dataclasses.asdict(config), "sparsity": config.target_sparsity},
        "ratios_file_sha256": _sha256(file.read_bytes()) if file.is_file() else None,
        "calibrate": {
            "samples": calibrate.samples,
            "sequence_length": calibrate.sequence_length,
            "sampling": calibrate.sampling,
            "seed": calibrate.seed,
            "text_sha256": text_sha256,
            "tokens_sha256": _sha256(np.ascontiguousarray(windows, np.int32).tobytes()),
        },
        "model": {
            "architecture_sha256": _sha256(json.dumps(model.config.to_json(), sort_keys=True).encode()),
            "weights": fingerprint(model.decoder),
            "dtype": str(model.decoder.embed_tokens[...].dtype),
        },
        "mesh": None if mesh is None else dict(mesh.shape),
        "processes": jax.process_count(),
        "backend": jax.default_backend(),
        "versions": versions(),
    }
    return json.loads(json.dumps(facts))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
