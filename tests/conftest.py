"""Every test runs on eight simulated devices, with strict promotion rules.

XLA compiles as quickly as it can, because most tests compile much and compute little;
`make test-all` and whoever sets XLA_FLAGS have its own choice.
"""

import ctypes
import functools
import gc
import os

import jaxlib.version

# Idle threads of NumPy's linear algebra spin: beside a second worker a small
# decomposition takes seconds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # Each worker has a processor: to compile a program in parts is a third more work.
    " --xla_cpu_parallel_codegen_split_count=1"
)
if jaxlib.version.__version_info__ < (0, 11, 1):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # later ones know no other way

flags = os.environ.get("XLA_FLAGS", QUICK)
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import compilation_cache
import hypothesis
import jax
import jax.numpy as jnp
import pytest
from _pytest.doctest import DoctestModule

try:  # JAX promises nothing here: without it all is only slower
    from jax._src.interpreters import mlir
except ImportError:
    mlir = None

MOST_PROGRAMS = 700


@functools.cache
def ir_context():
    """MLIR's context for many programs: with its dialects it is half the time that a
    small cached program takes, and JAX makes one for each."""
    return make_ir_context()


make_ir_context = getattr(mlir, "make_ir_context", None)
if make_ir_context:
    mlir.make_ir_context = ir_context

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci")


def pytest_configure(config):
    """Shares what is compiled, unless the user has said where it is to be kept."""
    shared = compilation_cache.folder_of_this_machine()
    if config.getoption("numprocesses", None):  # the workers do the work
        compilation_cache.tidy(shared)
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = compilation_cache.Cache(shared)
        config.pluginmanager.register(SharedCache(cache))


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
    """Here are no doctests. To look for them in each file is half of collection."""
    return [x for x in (yield) if not isinstance(x, DoctestModule)]


def pytest_collection_finish():
    """What is loaded stays; not to collect it saves an eighth of all time.

    Tracing makes many objects and few cycles: it need not be looked for them so often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)


class SharedCache:
    """Keeps what is compiled, here and in the programs that tests start.

    In memory not for ever: a program takes a megabyte, and ten memory maps, of which
    Linux gives a process 65,530 and ends it beyond them.
    """

    def __init__(self, cache: compilation_cache.Cache):
        self.cache, self.programs = cache, 0
        jax.monitoring.register_event_duration_secs_listener(self.count)
        options = {
            "jax_compilation_cache_dir": str(cache.own),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": 0,
            # Else an entry's key depends on the folder, for the sake of GPUs.
            "jax_persistent_cache_enable_xla_caches": "none",
        }
        for name, value in options.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)

    def count(self, event, duration, **_):
        self.programs += event == "/jax/core/compile/backend_compile_duration"

    def pytest_runtest_teardown(self, item, nextitem):
        if nextitem is None or nextitem.path != item.path:
            self.cache.exchange()
            if self.programs > MOST_PROGRAMS:
                jax.clear_caches()
                ir_context.cache_clear()
                self.programs = 0
                # The C library keeps what is freed, unless it is told.
                getattr(ctypes.CDLL(None), "malloc_trim", bool)(0)

    def pytest_unconfigure(self):
        self.cache.close()


class GetKey:
    """A new random key at each call; its seed is in the message of a failing test."""

    def __init__(self, seed: int):
        self.seed = seed
        self.calls = 0

    def __call__(self) -> jax.Array:
        self.calls += 1
        return jax.random.fold_in(jax.random.key(self.seed), self.calls)

    def __repr__(self) -> str:
        return f"GetKey(seed={self.seed}, calls={self.calls})"


@pytest.fixture
def getkey() -> GetKey:
    return GetKey(20260101)


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    """A bf16 parameter that turns float32, or a vector that meets a matrix, by accident
    is an error of the library and not a surprise for its users."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def relaxed_promotion():
    """JAX's default promotion rules, for code of others that needs them."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.fixture(scope="session")
def float16():
    """Skips where XLA compiles no float16: for an x86 processor without F16C it lacks a
    function that LLVM calls to convert one."""
    try:
        jax.jit(lambda x: jnp.sum(x.astype(jnp.float32)))(jnp.ones(64, jnp.float16))
    except jax.errors.JaxRuntimeError as e:
        if "Failed to materialize symbols" not in str(e):
            raise
        pytest.skip("XLA has no float16 for this processor")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
