"""Every test runs on eight simulated devices, with strict promotion rules."""

import os

flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci")


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


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
