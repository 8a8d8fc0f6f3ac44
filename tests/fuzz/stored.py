"""Our own files and the weights of others: checkpoints, journals, locks, safetensors, .bin files and their indices."""

from __future__ import annotations

import functools
import json
import logging
import random
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jaxtyping
import numpy as np
import torch
from safetensors.numpy import save_file

from intraslice_jax.convert.sources import Safetensors, TensorSource, TorchFiles, open_folder
from intraslice_jax.errors import InputError
from intraslice_jax.io import journal as journal_module
from intraslice_jax.io.checkpoint import open_checkpoint, save
from intraslice_jax.io.digests import write_digests
from intraslice_jax.io.journal import Journal
from intraslice_jax.io.lock import locked
from intraslice_jax.prune.budget import LayerRatios
from intraslice_jax.prune.pipeline import LayerFacts, StreamFacts
from tests.fuzz.harness import HOSTILE, Target, mutate_bytes, mutate_json
from tests.prune.flavours import make

RUN = {"prune": {"sparsity": 0.3, "refine": None}, "versions": {"jax": "0.1"}}
TENSORS = {"a.weight": np.ones((4, 6), np.float32), "b.weight": np.zeros((3,), np.float16), "c": np.ones((), np.int64)}


def targets() -> list[Target]:
    """One target for each file that is read in a way of its own."""
    text, data = (mutate_json, mutate_bytes), (mutate_bytes,)
    return [
        Target("checkpoint/config.json", _checkpoint("config.json"), open_checkpoint, text),
        Target("checkpoint/report.json", _checkpoint("report.json"), open_checkpoint, text),
        Target("checkpoint/SHA256SUMS", _checkpoint("SHA256SUMS"), open_checkpoint, (mutate_bytes, mutate_sums)),
        *(
            Target(f"checkpoint/{name}", _checkpoint(name), _read_sealed_checkpoint, mutations)
            for name, mutations in (
                ("state/_CHECKPOINT_METADATA", text),
                ("state/state/manifest.ocdbt", data),
                ("state/state/d/*", data),
            )
        ),
        Target("journal/run.json", _journal("run.json"), _read_journal, text),
        Target("journal/ratios.json", _journal("ratios.json"), _read_journal, text),
        Target("journal/run.json, sealed", _journal("run.json"), _sealed("run.json"), (mutate_json,)),
        Target("journal/ratios.json, sealed", _journal("ratios.json"), _sealed("ratios.json"), (mutate_json,)),
        *(
            Target(f"journal/{name}", _journal(name), _read_digested_journal, mutations)
            for name, mutations in (
                ("layers/00000/entry.json", text),
                ("streams/00000/entry.json", text),
                ("layers/00000/state/state/manifest.ocdbt", data),
                ("sums/entry.json", text),
                ("sums/arrays.safetensors", (mutate_bytes, mutate_header)),
            )
        ),
        Target("lock", _lock, _take_lock, text),
        Target("safetensors", _safetensors, _read_safetensors, (mutate_bytes, mutate_header)),
        Target("safetensors index", _index, _read_folder, text),
        Target("bin", functools.partial(_bin, True), _read_bin, data),
        Target("bin of the oldest format", functools.partial(_bin, False), _read_bin, data),
    ]


@functools.cache
def _stored() -> tuple[tempfile.TemporaryDirectory, Path, Path]:
    """A checkpoint and a journal of one model; kept as long as the process."""
    keeper = tempfile.TemporaryDirectory()
    folder = Path(keeper.name)
    model = make("gqa", layers=1, source='{"a": 1}')
    save(model, folder / "checkpoint")
    with closing(Journal(folder / "journal")) as journal:
        journal.begin(RUN)
        journal.put("ratios", {"attention": [0.5], "mlp": [0.25]})
        journal.put_arrays("sums", {"a": np.ones((2, 3), np.float32)}, {"sequences": 3})
        record: dict[str, Any] = {"layer": 0, "kept_heads": [0, 1], "query_heads": 2, "kv_heads": 1, "qk_head_dim": 4}
        record |= {"v_head_dim": 4, "intermediate_size": 8, "attention_error": 0.5, "mlp_error": 0.25, "notes": {}}
        shape = {"query_to_kv": [0, 0], "qk_head_dim": 4, "rotary_dim": 4, "v_head_dim": 4, "intermediate_size": 8}
        facts = {"shape": {**shape, "sliding_window": None}, "record": {**record, "seconds": 1.0}}
        arrays = {"w": jnp.ones((3, 2)), "rope_pairs": jnp.zeros((2, 0), jnp.int32)}
        journal.layer_done(0, arrays, facts, [jnp.ones((2, 4))], {"owed": 0.5})
    return keeper, folder / "checkpoint", folder / "journal"


def _copied(source: Path, folder: Path, name: str) -> Path:
    for file in source.rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return max(folder.glob(name), key=lambda file: file.stat().st_size)


def _checkpoint(name: str) -> Callable[[Path], Path]:
    return lambda folder: _copied(_stored()[1], folder, name)


def _journal(name: str) -> Callable[[Path], Path]:
    return lambda folder: _copied(_stored()[2], folder, name)


def _read_sealed_checkpoint(folder: Path) -> object:
    """Somebody changed the files and the digests."""
    write_digests(folder, "state")
    return dict(open_checkpoint(folder).arrays)


def _read_journal(folder: Path) -> object:
    logging.getLogger(journal_module.__name__).disabled = True  # what is left out is told in a warning
    try:
        with closing(Journal(folder)) as journal:
            journal.begin(RUN)
            found: list[object] = [journal.get("ratios", LayerRatios), journal.get_arrays("sums", dict[str, int])]
            if found[-1] is None:
                raise InputError("the sums were left out")
            if journal.layers_done:
                arrays, facts = journal.layer(0, LayerFacts)
                found += [dict(arrays), facts, journal.stream([jnp.ones((2, 4))], StreamFacts)]
            return found
    except jaxtyping.TypeCheckError as error:  # what checks annotations in tests reads an array to see its kind
        raise error.__cause__ if isinstance(error.__cause__, InputError) else error from error
    finally:
        logging.getLogger(journal_module.__name__).disabled = False


def _read_digested_journal(folder: Path) -> object:
    for part in ("layers/00000", "streams/00000", "sums"):
        write_digests(folder / part, ".")
    return _read_journal(folder)


def _sealed(name: str) -> Callable[[Path], object]:
    """Somebody changed a fact and its seal."""

    def read(folder: Path) -> object:
        try:
            data = json.loads((folder / name).read_text())
            data["sha256"] = journal_module._seal(data["content"])
            (folder / name).write_text(json.dumps(data))
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        return _read_journal(folder)

    return read


def _lock(folder: Path) -> Path:
    with locked(folder / "out"):
        content = json.loads((folder / ".out.lock").read_text())
    (folder / ".out.lock").write_text(json.dumps({**content, "boot": ""}))  # so that the host alone says where
    return folder / ".out.lock"


def _take_lock(folder: Path) -> None:
    with locked(folder / "out"):
        assert (folder / ".out.lock").is_file()


def _safetensors(folder: Path) -> Path:
    save_file(TENSORS, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def _read_safetensors(folder: Path) -> object:
    return _whole(Safetensors([folder / "model.safetensors"], str(folder)))


def _index(folder: Path) -> Path:
    for i, (name, array) in enumerate(TENSORS.items()):
        save_file({name: array}, folder / f"model-{i}.safetensors")
    weight_map = {name: f"model-{i}.safetensors" for i, name in enumerate(TENSORS)}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def _read_folder(folder: Path) -> object:
    return _whole(open_folder(folder))


def _bin(new: bool, folder: Path) -> Path:
    content = {name: torch.nn.Parameter(torch.from_numpy(a), a.dtype.kind == "f") for name, a in TENSORS.items()}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    return folder / "pytorch_model.bin"


def _read_bin(folder: Path) -> object:
    return _whole(TorchFiles([folder / "pytorch_model.bin"], str(folder)))


def _whole(source: TensorSource) -> object:
    """What the configuration says is read only if names and shapes are those of the model."""
    found = {}
    for name, array in TENSORS.items():
        if source.shapes.get(name) == array.shape:
            found[name] = source.read(name), source.view(name)
    return found


def mutate_sums(rng: random.Random, content: bytes) -> bytes:
    """Names and digests of a list replaced."""
    lines = content.decode().splitlines()
    names = ("../../etc/passwd", "/dev/zero", "state", ".", "", "a\0b", "x" * 300, "state/" * 1000, "config.json")
    at = rng.randrange(len(lines))
    digest, _, name = lines[at].partition("  ")
    lines[at] = f"{rng.choice((digest, '0' * 64, ''))}  {rng.choice((name, *names))}"
    return "\n".join(lines).encode()


def mutate_header(rng: random.Random, content: bytes) -> bytes:
    """The header of a safetensors file changed as JSON, or its length."""
    end = 8 + int.from_bytes(content[:8], "little")
    if rng.random() < 0.1:
        length = rng.choice((0, 1, end, len(content), 10**18, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + content[8:]
    header = mutate_json(rng, content[8:end])
    if rng.random() < 0.3:  # of one tensor only
        data = json.loads(content[8:end])
        entry = data[rng.choice(sorted(set(data) - {"__metadata__"}))]
        field = rng.choice(("dtype", "shape", "data_offsets"))
        entry[field] = rng.choice((*HOSTILE, "F8_E4M3", "BOOL", [0, 10**18], [2**62, 4], [-1, -4]))
        header = json.dumps(data).encode()
    return len(header).to_bytes(8, "little") + header + content[end:]
