"""Many damaged files of every format, and a table of what became of them.

    python -m tests.fuzz.run --count 20000 --seed 1 [--only gguf] [--keep FOLDER]

Formats are tried in processes of their own with bounded memory. A failure is printed with its traceback; `--keep`
writes the file that caused it. The exit code is 1 if anything failed or hung.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import multiprocessing
import pkgutil
import resource
import sys
import tempfile
from pathlib import Path

from tests import fuzz
from tests.fuzz.harness import Outcome, Target
from tests.fuzz.harness import fuzz as try_files

MEMORY = 8 * 2**30
"""Bytes of address space beyond what a process has when it starts."""


def all_targets() -> list[Target]:
    """The formats of every module beside this one that names some."""
    names = [info.name for info in pkgutil.iter_modules(fuzz.__path__)]
    modules = [importlib.import_module(f"{fuzz.__name__}.{name}") for name in names if name not in ("run", "test_fuzz")]
    return [target for module in modules if hasattr(module, "targets") for target in module.targets()]


def _in_own_process(name: str, count: int, seed: int) -> Outcome:
    logging.disable(logging.WARNING)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    target = next(target for target in all_targets() if target.name == name)
    with tempfile.TemporaryDirectory() as folder:
        return try_files(target, Path(folder), count, seed)


def main() -> int:
    """Runs the script; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="files in all, spread evenly over the formats")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="formats whose name contains this")
    parser.add_argument("--keep", type=Path, help="folder for files that failed")
    given = parser.parse_args()
    names = [target.name for target in all_targets() if given.only in target.name]
    each = -(-given.count // len(names))
    print(f"{'format':<40}{'read':>8}{'refused':>8}{'failed':>8}{'hung':>8}")
    bad = total = 0
    for name in names:
        # A fresh process: nothing that a damaged file did to a library outlives its format.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            outcome = pool.apply(_in_own_process, (name, each, given.seed))
        counts = [outcome.counts[kind] for kind in ("read", "refused", "failed", "hung")]
        print(f"{name:<40}" + "".join(f"{count:>8}" for count in counts), flush=True)
        bad, total = bad + sum(counts[2:]), total + sum(counts)
        for i, (kind, (content, trace)) in enumerate(outcome.failures.items()):
            print(f"  {kind}\n{trace}", flush=True)
            if given.keep is not None:
                given.keep.mkdir(parents=True, exist_ok=True)
                (given.keep / f"{name.replace('/', '_').replace(' ', '_')}-{i}").write_bytes(content)
    print(f"{total} files, {bad} failed or hung")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
