"""Setup for every test: a CPU, checked annotations, a cache of compiled programs, and no user files."""

import atexit
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

ROOT = Path(__file__).parent.parent
REAL_MODEL = "LORA_JAX_REAL_MODEL"

# Before jax is imported; a variable that is already set wins. Programs that tests start inherit them.
_hub_home = tempfile.TemporaryDirectory(prefix="lora_jax-tests-")
atexit.register(_hub_home.cleanup)
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # with libtpu installed, jax would look for a TPU first
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or the second of two processes that load libtpu aborts
    # Compiling takes most of the suite's time: without LLVM's optimizations it takes less than half, and later runs
    # take a fifth. tests/parity and users' programs have them; TPU programs are exactly the same.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "HF_HOME": _hub_home.name,  # neither the user's token nor their cached files
    "LORA_JAX_CACHE": _hub_home.name,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers complains about every fork
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

# Every annotation of lora_jax is checked, shapes included, when it is called (under jit: when it is traced).
# The numeric tower lets an int stand for a float, as type checkers do.
jaxtyping.install_import_hook(
    "lora_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

hypothesis.settings.register_profile(
    "lora_jax", deadline=None, max_examples=30, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("lora_jax")

collect_ignore = [] if find_spec("torch") else ["parity"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    parity = Path(__file__).parent / "parity"
    without_model = pytest.mark.skip(reason=f"{REAL_MODEL} is not set: give the folder of a real checkpoint")
    for item in items:
        if item.path.is_relative_to(parity):
            item.add_marker("parity")
        if "real_model" in getattr(item, "fixturenames", ()):
            item.add_marker("real_model")
        if item.get_closest_marker("real_model") and not os.environ.get(REAL_MODEL):
            item.add_marker(without_model)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of a real checkpoint; tests that need it are skipped if there is none."""
    folder = Path(os.environ[REAL_MODEL]).expanduser()
    assert (folder / "config.json").is_file(), f"{REAL_MODEL}={folder} holds no config.json"
    return folder


@pytest.fixture(autouse=True)
def names() -> Iterator[None]:
    """Messages name options as the command line does, whose words users see in all of lora_jax but its Python API."""
    from lora_jax.errors import naming_flags  # only now, since its annotations are checked

    with naming_flags():
        yield


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compile as users do, for tests whose programs take much longer to run than to compile."""
    import jax  # only now, since its variables are set above

    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)
