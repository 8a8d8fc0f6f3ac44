"""`intraslice report`: what runs did, as an HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from intraslice_jax.commands._types import Config


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the page of a run again, or a page that compares several runs.

    `prune` writes report.html by itself. What `eval` measures is taken in when its --output lies in the run's folder:
    `intraslice eval RUN --dataset wikitext2 --output RUN/wikitext2.json`, then `intraslice report RUN`.

    Attributes:
        runs: folders that `prune` or `demo` wrote.
        output: the folder to write: report.html, pictures, report.json; for one run its own folder if not given.
        config: YAML file with any of these options; the command line is stronger.
        overwrite: replace OUT if it exists.
    """

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN")]]
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="OUT")] = None
    config: Config = None
    overwrite: bool = False


def run(options: Options) -> None:
    """Reads, draws, writes."""
    from intraslice_jax.commands._output import say
    from intraslice_jax.errors import InputError
    from intraslice_jax.io.atomic import atomic_folder, check_output

    if not options.runs:
        raise InputError("no run was given; name one or more folders that `intraslice prune` wrote")
    first, *others = options.runs
    if others and options.output is None:
        raise InputError(f"{len(options.runs)} runs are compared in a folder of their own; pass --output OUT")
    if options.output is not None:
        check_output(options.output, options.overwrite)

    from intraslice_jax.report.single import write_report

    if options.output is None:
        target = Path(first)
        drawn = write_report(target)
    else:
        target = options.output
        with atomic_folder(options.output, options.overwrite) as folder:
            drawn = _compare(options.runs, folder) if others else write_report(first, folder)
    if not drawn:
        say("matplotlib is not installed, so there are no pictures; pip install matplotlib")
    print(f"{target / 'report.html'}: written")


def _compare(runs: tuple[str, ...], folder: Path) -> bool:
    from intraslice_jax.commands._output import write_json
    from intraslice_jax.report.comparison import comparison_facts, comparison_page, draw_comparison, read_runs
    from intraslice_jax.report.write import write_page

    found = read_runs(runs)
    images = draw_comparison(found)
    write_page(folder, comparison_page(found, images or {}), _file_names(images or {}))
    write_json(folder / "report.json", comparison_facts(found))
    return images is not None


def _file_names(images: dict[str, bytes]) -> dict[str, bytes]:
    """Texts may be called anything; their pictures are numbered."""
    return {f"perplexity-{i}": image for i, image in enumerate(images.values(), 1)}
