"""Whether a member that grows weights by gradients sees them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse.transforms._state import DropAndGrowState, find_states


def check_sees_gradients(opt_state: optax.OptState) -> None:
    """Raises where a member of a chain stands before one that needs raw gradients.

    A member with statistics of its own, such as moments, hands on something else.
    """
    for chain in _chains(opt_state):
        for i, state in enumerate(chain):
            before = [x for x in chain[:i] if _has_statistics(x)]
            if before and any(_grows(x) for x in find_states(state)):
                raise ValueError(
                    "Masks that move need raw gradients, but a member with the state "
                    f"{_name(before[0])} stands before them in the chain, and hands on "
                    "its own updates. Put them first: method.wrap(optimizer), or "
                    "js.enforce(optax.chain(method, optimizer))."
                )


def _chains(state: Any) -> list[tuple]:
    """The states of all chains: plain tuples, and dictionaries of named ones."""
    if isinstance(state, dict):
        state = tuple(state.values())
    if not isinstance(state, tuple):
        return []
    own = [] if hasattr(state, "_fields") else [state]
    return own + [chain for child in state for chain in _chains(child)]


def _has_statistics(state: Any) -> bool:
    return any(jnp.ndim(x) > 0 for x in jax.tree.leaves(state))


def _grows(state: Any) -> bool:
    return isinstance(state.score_state, DropAndGrowState)


def _name(state: Any) -> str:
    """The type of the first state with statistics, as `ScaleByAdamState`."""
    if hasattr(state, "_fields"):
        return type(state).__name__
    return next(_name(x) for x in state if _has_statistics(x))
