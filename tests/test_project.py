"""The project itself: what a wheel carries, and that the strict settings are really on."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from intraslice_jax.xla_flags import known_flags
from tests.without_torch import WITHOUT_TORCH

ROOT = Path(__file__).resolve().parent.parent


def test_strict_settings():
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    assert jax.config.jax_numpy_rank_promotion == "raise"
    with pytest.raises(Exception, match="promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)
    with pytest.raises(ValueError, match="rank"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_flags_that_xla_does_not_know_are_left_out():
    kept = "--xla_backend_optimization_level=0"
    assert known_flags([kept, "--xla_a_flag_of_yesterday=true"]) == [kept]


@pytest.mark.parametrize("name", ["intraslice_jax", "intraslice_jax.convert"])
def test_annotations_are_checked(name):
    assert type(importlib.import_module(name).__spec__.loader).__name__ == "_JaxtypingLoader"


def test_works_without_torch():
    """Every module imports on a machine that has no torch; only the exported modelling file needs it."""
    code = f"""
{WITHOUT_TORCH}
import importlib, pkgutil
import intraslice_jax
for module in pkgutil.walk_packages(intraslice_jax.__path__, "intraslice_jax."):
    if module.name != "intraslice_jax.convert.modeling_intraslice":
        importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wheel_carries_every_file(tmp_path):
    """An sdist, then a wheel from it: the two links must have become real files."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    for name in ["intraslice_jax", "convert", "configs"]:
        no_caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=no_caches)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    package = ROOT / "intraslice_jax"
    wanted = {package / "py.typed", *package.rglob("*.py")}
    for link in ["convert", "configs"]:  # rglob does not follow links
        assert (package / link).is_symlink()
        wanted |= {*(package / link).rglob("*.py"), *(package / link).rglob("*.yaml")}
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        carried = {name for name in wheel.namelist() if name.startswith("intraslice_jax/")}
    assert carried == {path.relative_to(ROOT).as_posix() for path in wanted}
