"""The `intraslice` command: finds the commands, reads their options, turns failures into exit codes.

0: the thing asked for was done; 1: a failure in the run, or an interruption; 2: a wrong input. Failures are one
line on standard error; only an error that nobody foresaw shows its traceback.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from intraslice_jax import commands
from intraslice_jax.commands import _arguments as arguments
from intraslice_jax.config import PruneConfig, default_preset, preset, with_layout
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.io.atomic import journal_of
from intraslice_jax.io.lock import locked
from intraslice_jax.parallel.threads import enough_threads
from intraslice_jax.settings import closest, load_settings, with_defaults
from intraslice_jax.xla_flags import known_flags


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    Args:
        args: the arguments behind the program's name; None takes those of the process.
    """
    given = list(sys.argv[1:] if args is None else args)
    if given == ["--version"]:
        print(f"intraslice {importlib.metadata.version('intraslice-jax')}")
        return 0
    if not given or given[0] == "help":
        given = [*given[1:], "--help"]
    name = "intraslice"
    options: Any = None
    try:
        with _terminable():
            modules = find_commands()
            command, options = _parse(given, modules)
            name = f"intraslice {command}"
            _prepare_process()
            _run(modules[command], options)
    except InputError as error:
        return _fail(name, error, 2, options)
    except KeyboardInterrupt:
        output = getattr(options, "output", None)
        kept = "nothing was written"
        if output is not None:
            kept = f"{output} is as it was before" if output.exists() else f"{output} was not written"
        return _fail(name, f"interrupted; {kept}; {_again(name, output) or 'the same command starts again'}", 1)
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RunError, OSError) as error:
        again = _again(name, getattr(options, "output", None))
        # A number that is not finite would be there again.
        lasting = isinstance(error, RunError) and "cannot be written" not in str(error)
        return _fail(name, f"{error}; {again}" if again and not lasting else error, 1, options)
    except MemoryError as error:
        return _fail(name, f"out of memory; try a smaller `batch_size` ({error})", 1, options)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(name, f"out of device memory; try a smaller `batch_size` ({error})", 1, options)
    return 0


def find_commands() -> dict[str, ModuleType]:
    """The modules of `intraslice_jax.commands` by command name; `bench_prune` is the command `bench prune`."""
    names = [info.name for info in pkgutil.iter_modules(commands.__path__) if not info.name.startswith("_")]
    return {name.replace("_", " "): importlib.import_module(f"{commands.__name__}.{name}") for name in names}


def _parse(given: list[str], modules: dict[str, ModuleType]) -> tuple[str, Any]:
    """The command's name and its options, where the command line is stronger than YAML than defaults."""
    options: dict[str, type] = {name: module.Options for name, module in modules.items()}
    if " ".join(given[:2]) in modules:
        given = [" ".join(given[:2]), *given[2:]]
    command = given[0]
    if command not in modules and not command.startswith("-"):
        raise InputError(f"there is no command {command!r}; {closest(command, modules)}")
    if command in modules:
        arguments.check_flags(given[1:], command, options[command])
        given = arguments.merge_repeated(arguments.numbers_for_names(given, options[command]), options[command])
        config = arguments.config_file(given, getattr(modules[command], "DEFAULT_CONFIG", None))
        read = {} if config is None else load_settings(config, options[command])
        # Where there is no such section, the command itself looks up what its preset says.
        if {"preset", "prune"} <= {field.name for field in dataclasses.fields(options[command])}:
            method = arguments.value_of("--method", given) or read.get("prune", PruneConfig).method
            name = arguments.value_of("--preset", given) or read.get("preset", default_preset(method))
            layout = arguments.value_of("--layout", given) or read.get("prune", PruneConfig).layout
            named = with_layout(preset(name), layout)
            options[command] = with_defaults(options[command], {"preset": name, "prune": named})
            read = {} if config is None else load_settings(config, options[command])
        if read:
            options[command] = with_defaults(options[command], read)
    parsed = arguments.parse(given, options)
    return next(name for name, kind in options.items() if type(parsed) is kind), parsed


def _prepare_process() -> None:
    """Settings that must precede the import of jax and transformers; the user's own are kept."""
    logging.basicConfig(format="%(message)s")  # before a library has its own way
    logging.getLogger("intraslice_jax").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it prints by itself
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "intraslice" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        _without_triton_products()
    if os.environ.get("JAX_NUM_CPU_DEVICES", "1") != "1":
        enough_threads()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # retries; the failure itself is told by us
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries; ours know where they are


def _without_triton_products() -> None:
    """Leaves matrix products to cuBLAS: XLA would compile many Triton kernels for each, for minutes in float32."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_triton_gemm" not in flags:
        os.environ["XLA_FLAGS"] = " ".join([flags, *known_flags(["--xla_gpu_enable_triton_gemm=false"])]).strip()


def _run(command: ModuleType, options: Any) -> None:
    """Runs a command, in all processes of a run of several at once; only the first of them prints.

    From the first second to the last no other run can have the same output.
    """
    output = getattr(options, "output", None)
    lock = nullcontext() if output is None else locked(output, getattr(options, "resume", False))
    parallel = getattr(options, "parallel", None)
    joined = () if parallel is None else (parallel.coordinator, parallel.num_processes, parallel.process_id)
    if parallel is None or not (parallel.distributed or any(option is not None for option in joined)):
        with lock:
            command.run(options)
        return
    from intraslice_jax.parallel import distributed

    distributed.start(parallel)
    try:
        with distributed.only_first_speaks(), lock if distributed.is_first() else nullcontext():
            command.run(options)
            distributed.barrier("done")
    except (Exception, KeyboardInterrupt) as error:
        # The others would wait for this process in their next collective.
        message = arguments.in_flags(" ".join(str(error).split()), type(options)) or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            message = "interrupted"
        if not isinstance(error, InputError | RunError | OSError | KeyboardInterrupt):
            traceback.print_exc()
        if distributed.is_first():
            print(f"intraslice: {message}", file=sys.stderr, flush=True)
        distributed.abandon(message, 2 if isinstance(error, InputError) else 1)


def _again(name: str, output: Path | None) -> str:
    """How to continue a run that kept a journal; nothing for others."""
    if name != "intraslice prune" or output is None or not journal_of(output).is_dir():
        return ""
    return f"the same command with --resume goes on from {journal_of(output)}"


def _fail(name: str, error: BaseException | str, code: int, options: Any = None) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    if options is not None:
        message = arguments.in_flags(message, type(options))
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """Takes SIGTERM like Ctrl-C, so that a stopped job leaves no half-written folder behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
