"""Wrong values for the arguments of public functions, by the arguments' names."""

import functools

import calls
import jax
import jax.numpy as jnp
import numpy as np

import jaxsparse as js


class Nothing:
    """Of no use as an argument."""

    def __repr__(self):
        return "Nothing()"


def leaf(value):
    """A tree of which one leaf is another one; what is no tree is replaced."""

    def wrong(tree):
        flat, treedef = jax.tree.flatten(tree)
        made = value(flat[-1]) if callable(value) else value
        return jax.tree.unflatten(treedef, [*flat[:-1], made])

    return wrong


def lists(tree):
    return leaf(lambda x: [[1.0, 2.0], [3.0, 4.0]])(tree)


def smaller(tree):
    """Without its last leaf, where it is a dictionary."""
    if not isinstance(tree, dict):
        return {}
    last = list(tree)[-1]
    return {k: v for k, v in tree.items() if k != last}


def other_structure(tree):
    return {"of": {"another": {"model": jnp.ones((2, 2))}}}


names_of = lambda s: s if isinstance(s, dict) else ["a"]
abstract = lambda x: jax.ShapeDtypeStruct(np.shape(x), np.float32)
with_nan = lambda x: np.full(np.shape(x), np.nan, np.float32)
is_axes = lambda x: isinstance(x, js.Axes)

TREE = {
    "a string": "params",
    "no tree": Nothing(),
    "None": None,
    "a string for a leaf": leaf("kernel"),
    "a number for a leaf": leaf(1.5),
    "a list for a leaf": lists,
    "an object for a leaf": leaf(lambda x: np.array([None, 1], object)),
    "text for a leaf": leaf(lambda x: np.array(["a", "b"])),
    "an abstract leaf": leaf(abstract),
}
LIKE = TREE | {
    "another shape": leaf(lambda x: np.ones((*np.shape(x), 3), np.float32)),
    "one axis less": leaf(lambda x: np.ones(np.shape(x)[1:], np.float32)),
    "a leaf less": smaller,
    "another structure": other_structure,
}
GRADS = LIKE | {"NaN": leaf(with_nan)}
MASKS = LIKE | {
    "floats": leaf(lambda x: np.ones(np.shape(x), np.float32)),
    "a bool for a leaf": leaf(True),
}
NUMBER = {
    "a string": "half",
    "None": None,
    "a list": [0.5],
    "NaN": float("nan"),
    "no number": Nothing(),
    "a bool": True,
    "an array": np.ones(2),
    "complex": 1j,
}
POSITIVE = NUMBER | {"negative": -1.0}
SPARSITY = NUMBER | {"one": 1, "negative": -0.1, "percent": 50, "above": 1.5}
INTEGER = NUMBER | {"negative": -3, "a fraction": 2.5, "text": "3"}
STEP = NUMBER | {"negative": -3, "a fraction": 2.5}
FUNCTION = {
    "a string": "magnitude",
    "None": None,
    "a number": 3,
    "no arguments": lambda: 0.0,
    "a tree": {"w": np.ones(2)},
}
KEY = {"an integer": 0, "None": None, "a string": "seed", "keys": np.ones(3)}
WHERE = {
    "a broken expression": "kernel(",
    "no match": "nothing_like_it",
    "one argument": lambda path: True,
    "a number": 3,
    "numbers": {"up": 1, "down": 0},
    "another tree": {"left": True},
    "no answer": lambda path, leaf: "yes" if leaf is None else Nothing(),
}
AXES = {
    "a string": "in",
    "a number": 1,
    "a tuple": (0, 1),
    "tuples": {"kernel": (0, 1)},
    "no match": {"nothing_like_it": calls.AXES},
    "a broken expression": {"kernel(": calls.AXES},
    "too many": js.Axes(input=(0, 1), output=(2,)),
    "None in it": {"kernel": None},
}
PATTERN = {
    "a string": "2:4",
    "None": None,
    "a class": js.NM,
    "a number": 2,
    "a tuple": (2, 4),
}
CHOICE = {"a string": "nonsense", "None": None, "a number": 3, "a list": ["layer"]}
TRACE = {
    "the model": calls.apply_fn,
    "None": None,
    "a string": "trace",
    "a tree": {"a": 1},
}
GROUPS = {
    "None": None,
    "a string": "groups",
    "a list": ["up"],
    "numbers": {"up": 3},
    "names": {"up": "down"},
    "a number": 3,
}
STATS = {"None": None, "a tree": {"up/kernel": np.ones(8)}, "a string": "stats"}
BATCHES = {
    "None": None,
    "a number": 3,
    "empty": [],
    "an array": np.ones((4, 8), np.float32),
    "lists": [[[1.0] * 8]],
    "another width": [np.ones((4, 5), np.float32)],
    "strings": ["a batch"],
    "a string": "batches",
    "None in it": [None],
    "an empty batch": [np.ones((0, 8), np.float32)],
}
MATRIX = {
    "a list": [[1.0, 2.0], [3.0, 4.0]],
    "a vector": np.ones(8, np.float32),
    "integers": np.ones((16, 8), np.int32),
    "None": None,
    "a string": "w",
    "NaN": with_nan,
    "another width": np.ones((16, 5), np.float32),
    "objects": np.array([[None] * 8] * 16, object),
    "complex": np.ones((16, 8), np.complex64),
    "abstract": abstract,
    "a number": 3.0,
}
OBJECT = {"None": None, "a string": "it", "a number": 3, "a tree": {"a": 1}}
DROP = {
    "a string": "up",
    "a list": [1, 2],
    "another group": {"nothing_like_it": [1]},
    "a number for indices": lambda d: {calls.name(): 3},
    "out of range": lambda d: {calls.name(): [99]},
    "fractions": lambda d: {calls.name(): [0.5]},
    "text": lambda d: {calls.name(): ["a"]},
    "None": None,
    "a number": 3,
}
BY_GROUP = {
    "None": None,
    "a string": "scores",
    "a list": [1.0],
    "a number": 3,
    "text in it": lambda s: dict.fromkeys(names_of(s), "high"),
    "a list in it": lambda s: {k: [1.0, 2.0] for k in names_of(s)},
    "of another size": lambda s: dict.fromkeys(names_of(s), np.ones(5, np.float32)),
    "None in it": lambda s: dict.fromkeys(names_of(s)),
}
BY_NAME = {
    "None": None,
    "a string": "losses",
    "a list": [1.0],
    "text in it": lambda s: dict.fromkeys(names_of(s), "high"),
    "another name": lambda s: {"nothing_like_it": 1.0},
    "NaN in it": lambda s: dict.fromkeys(names_of(s), float("nan")),
    "None in it": lambda s: dict.fromkeys(names_of(s)),
}
PATH = {"None": None, "a number": 3, "a tuple": ("up", "kernel"), "bytes": b"up"}
SHAPE = {"None": None, "a number": 3, "text": "8x16", "fractions": (1.5, 2), "negative": (-1, 2)}
LABELS = {
    "None": None,
    "a string": "labels",
    "too short": np.array([0]),
    "fractions": np.ones(4) / 2,
    "negative": np.array([-1, 0, 0, 0]),
    "a gap": np.array([0, 0, 5, 5]),
}
SWITCH = {"a string": "yes", "a number": 3, "a list": [True]}
NAMES = {"None": None, "a number": 3, "another": ["nothing_like_it"], "numbers": [1.5]}

# By the name of an argument; of one function alone as `function.argument`.
KINDS = {
    "params": TREE,
    "scores": TREE,
    "grads": GRADS,
    "gradients": LIKE,
    "masks": MASKS,
    "updates": LIKE,
    "removed": MASKS,
    "kept": MASKS,
    "tree": LIKE,
    "diagonal": LIKE,
    "inverse_diagonal": LIKE,
    "sparsities": LIKE | {"percent": leaf(50.0)},
    "experts": TREE,
    "sparsity": SPARSITY,
    "final": SPARSITY,
    "init": SPARSITY,
    "lower": SPARSITY,
    "upper": SPARSITY,
    "loss_fn": FUNCTION,
    "apply_fn": FUNCTION,
    "fitness": FUNCTION,
    "score": FUNCTION,
    "cost": FUNCTION,
    "solver": FUNCTION,
    "f": FUNCTION,
    "key": KEY,
    "where": WHERE,
    "axes": AXES,
    "pattern": PATTERN,
    "scope": CHOICE,
    "reduce": CHOICE,
    "zeros": CHOICE,
    "unseen": CHOICE,
    "norms": CHOICE,
    "positions": CHOICE,
    "missing": CHOICE,
    "trace": TRACE,
    "trace_": TRACE,
    "groups": GROUPS,
    "stats": STATS,
    "batches": BATCHES,
    "w": MATRIX,
    "gram": MATRIX,
    "mean": MATRIX,
    "router": MATRIX,
    "logits": MATRIX,
    "x": MATRIX,
    "g": MATRIX,
    "down": MATRIX,
    "matrices": MATRIX,
    "student_logits": MATRIX,
    "teacher_logits": MATRIX,
    "coefficients": MATRIX,
    "distances": MATRIX,
    "similarity": MATRIX,
    "usage": MATRIX,
    "fisher": OBJECT,
    "state": OBJECT,
    "sums": OBJECT,
    "a": OBJECT,
    "b": OBJECT,
    "factor": OBJECT,
    "packed": OBJECT,
    "view": OBJECT,
    "tx": OBJECT,
    "optimizer": OBJECT,
    "opt_state": OBJECT,
    "table_or_tables": OBJECT,
    "drop": DROP,
    "losses": BY_NAME,
    "sizes": BY_NAME,
    "costs": BY_NAME,
    "gates": BY_NAME,
    "redundancy": BY_NAME,
    "path": PATH,
    "wanted": PATH,
    "shape": SHAPE,
    "labels": LABELS,
    "names": NAMES,
    "min_keep": INTEGER,
    "steps": INTEGER,
    "window": INTEGER,
    "block_size": INTEGER,
    "count": INTEGER,
    "levels": INTEGER,
    "generations": INTEGER,
    "offspring": INTEGER,
    "steps_per_epoch": INTEGER,
    "total_steps": INTEGER,
    "clusters": INTEGER,
    "at_least": INTEGER,
    "d_in": INTEGER,
    "size": INTEGER,
    "keep": INTEGER,
    "of": INTEGER,
    "n": INTEGER,
    "periods": INTEGER,
    "duration": INTEGER,
    "interval": INTEGER,
    "begin": STEP,
    "end": STEP,
    "step": INTEGER,
    "chunk": INTEGER,
    "average": INTEGER,
    "order": INTEGER,
    "iterations": INTEGER,
    "every": INTEGER,
    "damping": POSITIVE,
    "rel_damping": POSITIVE,
    "eps": POSITIVE,
    "decay": POSITIVE | {"one": 1.0},
    "outlier": POSITIVE,
    "spread": POSITIVE,
    "strength": POSITIVE,
    "increment": POSITIVE,
    "temperature": POSITIVE,
    "hardness": POSITIVE,
    "rho": POSITIVE,
    "power": POSITIVE,
    "budget": POSITIVE,
    "difference": NUMBER,
    "learning_rate": NUMBER,
    "peak": POSITIVE,
    "gram_": SWITCH,
    "host": SWITCH,
    "exceptions": {"a string": "up", "broken": {"up(": 0.1}, "text": {"up": "x"}, "a number": 3},
    "rules": {"a string": "btd", "broken": {"my_call": "nonsense"}, "a number": {"my_call": 3}, "a list": ["a"]},
    "stages": {"None": None, "a number": 3, "empty": (), "numbers": (1, 1), "text": "ab"},
    "hidden": {"None": None, "a number": 3, "text": {"up": "last"}, "another": {"left": 0}, "beyond": {"up": 7, "down": 1}},
    "to": LABELS,
    "followers": {"None": None, "a list": ["1"], "another": {"1": "9"}, "a string": "1", "numbers": {1: 0}},
    "stated": {"a list": [1], "a number": 3},
    "stream": {"None": None, "a number": 3, "empty": [], "strings": ["a"], "a tree": [{"a": 1.0}]},
    "at": {"None": None, "a number": 3, "text": ["a"], "not rising": [4, 2], "fractions": [1.5]},
    "keep_": MATRIX,
    "mask": {"floats": np.ones((8, 16), np.float32), "None": None, "a string": "mask", "a list": [[True]], "another shape": np.ones((3, 3), bool)},
    "group_sizes": {"None": None, "a string": "g", "too short": np.ones(2, np.int32), "fractions": np.ones(4)},
    "input": {"None": None, "a number": 0, "text": "in", "fractions": (0.5,)},
    "output": {"None": None, "a number": 0, "text": "in", "fractions": (0.5,)},
    "axis": {"None": None, "text": "last", "a tuple": (0, 1), "a fraction": 0.5},
    "errors": {"None": None, "a string": "e"},
    "info": {"None": None, "a string": "e", "numbers": {"up": 1.0}},
    "iterable": {"None": None, "a number": 3},
    "leaf": {"None": None, "a string": "w", "a number": 1.5},
    "inputs": {"None": None, "a string": "x", "text": np.array(["a"]), "a list": [[1.0]]},
    "batch": {"None": None, "a string": "x", "a list": [[1.0] * 8], "another width": np.ones((4, 5), np.float32), "a number": 3.0},
    "value": NUMBER,
    "paths": {"None": None, "a string": "up", "numbers": [1, 2]},
    "key_path": {"a number": 3},
    "*": {"None": (None,), "text": ("a",), "another width": (np.ones((4, 5), np.float32),), "a list": ([[1.0] * 8],)},
    # Of one function.
    "calibration.init.gram": SWITCH,
    "calibration.init.batch": SHAPE,
    "structured.atomic_init.batch": SHAPE,
    "allocations.evolve.batches": {"None": None, "a number": 3, "empty": []},
    "allocations.evolve.sizes": {"None": None, "text": {"a": "b"}, "fractions": {"a": 1.5, "b": 2}, "empty": {}},
    "allocations.level_sparsities.sizes": {"None": None, "text": {"a": "b"}, "fractions": {"a": 1.5, "b": 2}},
    "solvers.refit_channels.keep": {"None": None, "floats": np.ones(8), "too short": np.ones(3, bool), "a string": "k"},
    "scores.bias_compensation.kept": {"None": None, "floats": np.ones(8), "too short": np.ones(3, bool), "a string": "k"},
    "structured.merge_gates.gates": MATRIX,
    "structured.normalize_max.scores": BY_GROUP,
    "structured.select.scores": BY_GROUP,
    "structured.select_to.scores": BY_GROUP,
    "structured.per_parameter.scores": BY_GROUP,
    "structured.lamp.scores": BY_GROUP,
    "structured.normalize_mean.scores": BY_GROUP,
    "structured.normalize_norm.scores": BY_GROUP,
    "structured.normalize_range.scores": BY_GROUP,
    "structured.standardize.scores": BY_GROUP,
    "schedules.at.*": {"text": ("a",), "fractions": (1.5,), "negative": (-1,), "empty": ()},
    "learning_rates": NUMBER,
}
# Arguments that a valid call leaves at their defaults, and wrong values of them.
MORE = {
    "where", "axes", "pattern", "min_keep", "steps", "score", "trace", "zeros",
    "unseen", "solver", "scope", "reduce", "norms", "positions", "missing",
    "exceptions", "rules", "chunk", "average", "block_size", "total_steps", "masks",
    "iterations", "rho", "rel_damping", "damping", "usage", "groups_", "every",
}


def kind_of(function, argument):
    return KINDS.get(f"{function}.{argument}", KINDS.get(argument))


def apply(wrong, valid):
    """A wrong value, which may be made of the valid one."""
    made = getattr(wrong, "__module__", None) == __name__ and callable(wrong)
    return wrong(valid) if made and not isinstance(wrong, type) else wrong
