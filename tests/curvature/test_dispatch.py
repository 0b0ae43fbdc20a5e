"""A new approximation is a class and what it answers: nothing else is edited."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse import curvature
from jaxsparse.curvature import dispatch

W = {"a": np.array([[3.0, 1.0], [2.0, 4.0]], np.float32)}
X = {"a": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)}


@dataclasses.dataclass(frozen=True)
class Place:
    path: str
    shape: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Multiple:
    """`damping` times the identity."""

    damping: jax.Array
    treedef: Any = dataclasses.field(metadata={"static": True})
    layouts: tuple[Place, ...] = dataclasses.field(metadata={"static": True})

    @property
    def paths(self):
        return tuple(layout.path for layout in self.layouts)


@dispatch.ihvp.register
def _(fisher: Multiple, xs):
    return [x / fisher.damping for x in xs]


@dispatch.inverse_diagonal.register
def _(fisher: Multiple):
    return [jnp.full(shape, 1 / fisher.damping) for shape in dispatch.shapes(fisher)]


def multiple():
    return Multiple(jnp.float32(4), jax.tree.structure(W), (Place("a", (2, 2)),))


def test_it_is_one_and_answers_what_all_do():
    fisher = multiple()
    assert isinstance(fisher, curvature.Fisher)
    np.testing.assert_array_equal(curvature.ihvp(fisher, X)["a"], X["a"] / 4)
    np.testing.assert_array_equal(curvature.inverse_diagonal(fisher)["a"], 1 / 4)
    (part,) = curvature.apart(fisher)
    assert part.paths == ("a",)
    np.testing.assert_array_equal(curvature.ihvp(part, X)["a"], X["a"] / 4)
    with pytest.raises(ValueError, match=r"a: tree has shape \(3,\)|a: .*\(3,\)"):
        curvature.ihvp(fisher, {"a": np.ones(3, np.float32)})


def test_it_is_asked_under_jit():
    found = jax.jit(curvature.ihvp)(multiple(), X)
    np.testing.assert_array_equal(found["a"], X["a"] / 4)


def test_the_solver_prunes_by_it():
    pruned = js.solvers.obs(W, multiple(), 0.5, update="none")
    np.testing.assert_array_equal(pruned.masks["a"], W["a"] > 2)
    pruned = js.solvers.obs(W, multiple(), 0.5, update="independent", steps=2)
    np.testing.assert_array_equal(pruned.params["a"], np.where(W["a"] > 2, W["a"], 0))


def test_what_it_does_not_answer_is_said():
    fisher, masks = multiple(), {"a": np.ones((2, 2), bool)}
    assert dispatch.can(dispatch.ihvp, fisher)
    asked = {
        dispatch.restrict: lambda: curvature.restrict(fisher, masks),
        dispatch.eliminate: lambda: curvature.eliminate(fisher, W, masks),
        dispatch.inverse_blocks: lambda: curvature.inverse_blocks(fisher),
        dispatch.group_scores: lambda: curvature.group_scores(fisher, W),
        dispatch.greedy_scores: lambda: curvature.greedy_scores(fisher, W),
    }
    for question, ask in asked.items():
        assert not dispatch.can(question, fisher)
        with pytest.raises(TypeError, match="Multiple"):
            ask()
    with pytest.raises(TypeError, match="A Multiple has no joint update"):
        js.solvers.obs(W, fisher, 0.5)
    with pytest.raises(TypeError, match=r"greedy=True .* got a Multiple"):
        js.solvers.obs(W, fisher, 0.5, greedy=True, update="none")


def test_what_is_none_is_refused():
    for other in (3, None, W, curvature.diagonal_estimator().init(W)):
        assert not isinstance(other, curvature.Fisher)
        with pytest.raises(TypeError, match="block_fisher"):
            curvature.ihvp(other, X)
