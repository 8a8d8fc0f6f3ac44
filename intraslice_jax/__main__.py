"""`python -m intraslice_jax` is the `intraslice` command."""

import sys

from intraslice_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
