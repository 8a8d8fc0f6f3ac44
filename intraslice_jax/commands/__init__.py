"""The commands of `intraslice`, one module each.

A module `name.py` here is the command `name` (`bench_prune.py` is `bench prune`): it holds a frozen dataclass
`Options`, whose docstring is the command's help, and `run(options)`, which does the work and imports what is heavy
inside. `DEFAULT_CONFIG`, if there is one, names the recipe of `configs/` whose values are the command's defaults.
Modules whose name starts with an underscore are shared helpers.
"""
