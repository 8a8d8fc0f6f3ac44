"""Data sets as text, and text as tokens, prepared as the pruning literature does."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int
from transformers import BatchEncoding, PreTrainedTokenizerBase

from intraslice_jax.calibrate.documents import JOIN, Documents, column_of, documents_of
from intraslice_jax.errors import InputError, refused

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How the field reads a well-known data set.

    Attributes:
        path, config, revision, files: arguments of `datasets.load_dataset`; `files` names the file of each
            split where the whole set would be too large or the hub has no plain default.
        column: where the text is.
        join: what stands between two documents of the stream.
        evaluation_split: the split perplexities are reported on.
        documents: only so many documents from the first, per split; all where a split is not named.
        evaluation_windows: only so many windows from the first are measured.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] | None = None
    column: str = "text"
    join: str = JOIN
    evaluation_split: str = "test"
    documents: Mapping[str, int] = field(default_factory=dict)
    evaluation_windows: int | None = None


KNOWN = {
    "wikitext2": Recipe("Salesforce/wikitext", "wikitext-2-raw-v1"),
    # One shard of many: SparseGPT, and most work after it, evaluates on the first 1,100 documents, and of these on
    # no more than 256 windows.
    "c4": Recipe(
        "allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        join=" ",
        evaluation_split="validation",
        documents={"train": 10_000, "validation": 1_100},
        evaluation_windows=256,
    ),
    # The set's own loader is a script, which nothing runs any more; the hub keeps a converted copy.
    "ptb": Recipe(
        "ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        files={split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "validation", "test")},
        column="sentence",
        join=" ",
    ),
    "alpaca": Recipe("tatsu-lab/alpaca", evaluation_split="train"),
}
"""Short names of well-known data sets."""


def read_dataset(
    name: str,
    config: str | None = None,
    split: str | None = "train",
    column: str = "text",
    folder: str | None = None,
) -> Documents:
    """The text column of a `datasets` data set. Rows without text are left out.

    Args:
        name: a short name of `KNOWN` (its configuration, column and join string are the field's), a hub id, or a
            local folder: data files, or what `save_to_disk` wrote.
        config: the data set's configuration; not for short names.
        split: which split; slices such as `train[:1%]` work. None means the one that perplexities are reported
            on (`test` where the name says nothing else).
        column: where the text is, or messages, as for `read_files`; not for short names. Documents are joined by an
            empty line.
        folder: a local copy of the hub's repository, for short names.

    Raises:
        InputError: the data set, configuration, split or column does not exist, holds no text, or cannot be
            downloaded.
    """
    recipe = KNOWN.get(name) or Recipe(name, config, column=column)
    if folder is not None:
        if not Path(folder).is_dir():
            raise InputError(f"data set {name}@{folder}: there is no such folder; expected a copy of {recipe.path}")
        recipe = dataclasses.replace(recipe, path=folder, revision=None)
    if name in KNOWN and config is not None:
        raise InputError(
            f"data set {name} is a short name for {recipe.path} and takes no configuration, found {config!r}; "
            f"use the full name to choose one"
        )
    split = split or recipe.evaluation_split
    rows = _load(recipe, name, split)
    where = f"data set {name}, split {split}"
    column = column_of(rows.column_names, recipe.column, where)
    values = rows.select_columns([column])[: recipe.documents.get(split, len(rows))][column]
    return Documents(documents_of(values, column, where), recipe.join)


def _load(recipe: Recipe, name: str, split: str) -> Dataset:
    """One split of a data set, every failure as an InputError."""
    # Imported here: it takes seconds, and text files do not need it.
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    folder = Path(recipe.path)
    exists = os.path.exists(recipe.path)  # pathlib's raises for very long names
    if os.path.isfile(recipe.path) or (recipe.path.startswith((".", "/", "~")) and not exists):
        found = "is a file" if exists else "does not exist"
        raise InputError(f"data set {name} {found}; give a hub name or a folder")
    try:
        if exists and any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return _saved_split(datasets.load_from_disk(recipe.path), name, split)
        arguments: dict[str, Any] = {"split": split, "revision": recipe.revision}
        if recipe.files is not None:
            wanted = split.partition("[")[0]
            if wanted not in recipe.files:
                raise InputError(f"data set {name} has no split {split!r}; its splits are {_list(recipe.files)}")
            arguments["data_files"] = {wanted: recipe.files[wanted]}
        if not exists:  # without a network the hub's library tries for half a minute
            log.info("asking the Hugging Face hub for data set %s", recipe.path)
        return datasets.load_dataset(recipe.path, recipe.config, **arguments)
    except InputError:
        raise
    except DatasetNotFoundError as error:
        raise InputError(f"data set {name} was not found{_nearest(name)}: {_line(error)}") from error
    except ConnectionError as error:
        copy = f"a copy of {recipe.path} as {name}@FOLDER" if name in KNOWN else "the folder of a local copy"
        raise InputError(
            f"data set {name} cannot be downloaded ({_line(error)}){_nearest(name)}; without a network give {copy}, "
            "or text files"
        ) from error
    except Exception as error:
        # Unknown splits and configurations arrive here (the message lists those that exist), and damaged files.
        raise InputError(f"data set {name}, split {split}: {_line(error)}") from error


def _saved_split(saved: Dataset | DatasetDict, name: str, split: str) -> Dataset:
    """The split of what `save_to_disk` wrote; a single table serves as any split."""
    import datasets

    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise InputError(f"data set {name} has no split {split!r}; its splits are {_list(saved)}")
    return saved[split]


def _nearest(name: str) -> str:
    if name in KNOWN:
        return ""
    near = difflib.get_close_matches(name, KNOWN, n=1)
    return f" (did you mean {near[0]}?)" if near else f" (short names are {_list(KNOWN)})"


def _list(names: Any) -> str:
    return ", ".join(map(str, names))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_PIECE, _OVERLAP = 2**16, 2**11
"""How many characters of a text are encoded in one go, and how many of these with the next ones again."""


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Int[np.ndarray, " tokens"]:
    """The token ids of a whole text, int32, without special tokens.

    As a whole a long text takes more than linear time, and some 150 bytes of memory for each character. It is encoded
    in pieces that overlap, and two pieces are joined at a token that both have, in the middle of the overlap: what a
    tokenizer makes of a character depends on its surroundings, but not on what is a thousand characters away. Where
    they share no token (in one word of a hundred thousand letters, say) the text is cut.

    Raises:
        InputError: the tokenizer fails.
    """
    if len(text) <= _PIECE or not tokenizer.is_fast:
        return _encode(tokenizer, text)[0]
    piece, taken, found = _piece(tokenizer, text, 0), 0, []
    while piece.stop < len(text):
        inside = piece.starts[piece.starts >= piece.stop - _OVERLAP]
        following = _piece(tokenizer, text, int(inside[0]) if len(inside) else piece.stop)
        shared = _shared_token(piece, following)
        if shared is None:
            shared, following = (len(piece.ids), 0), _piece(tokenizer, text, piece.stop)
        found.append(piece.ids[taken : shared[0]])
        piece, taken = following, shared[1]
    return np.concatenate([*found, piece.ids[taken:]])


class _Piece(NamedTuple):
    """Tokens of a part of a text.

    Attributes:
        stop: the position in the text where the part ends.
        ids: int32.
        starts: the position in the text where each token begins, -1 for one that begins within a character.
    """

    stop: int
    ids: Int[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " tokens"]


def _piece(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> _Piece:
    part = text[start : start + _PIECE]
    ids, encoding = _encode(tokenizer, part)
    spans = np.asarray(encoding[0].offsets, np.int64).reshape(-1, 2)
    clean = (spans[:, 0] < spans[:, 1]) & (spans[:, 0] >= np.append(0, spans[:-1, 1]))
    return _Piece(start + len(part), ids, np.where(clean, start + spans[:, 0], -1))


def _shared_token(piece: _Piece, following: _Piece) -> tuple[int, int] | None:
    """The index in both of the middle one of the tokens that they have at the same position."""
    _, here, there = np.intersect1d(piece.starts, following.starts, return_indices=True)
    same = (piece.ids[here] == following.ids[there]) & (piece.starts[here] >= 0)
    here, there = here[same], there[same]
    return (int(here[len(here) // 2]), int(there[len(there) // 2])) if len(here) else None


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, BatchEncoding]:
    # verbose=False: the stream is cut into windows later, so a note that it exceeds the context would mislead.
    with refused("the tokenizer cannot encode the text"):
        encoding = tokenizer(text, add_special_tokens=False, verbose=False)
        return np.asarray(encoding["input_ids"], np.int32), encoding


def text_hash(text: str) -> str:
    """SHA-256 of the text's UTF-8 bytes, in hexadecimal: what reports identify a text by."""
    return hashlib.sha256(text.encode()).hexdigest()
