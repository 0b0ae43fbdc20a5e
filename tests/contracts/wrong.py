"""Wrong values for the arguments of public functions, by the arguments' names."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from contracts import calls

import jaxsparse as js


class Nothing:
    """Of no use as an argument."""

    def __repr__(self):
        return "Nothing()"


@dataclasses.dataclass(frozen=True)
class Made:
    """A wrong value that is made of the valid one."""

    make: Callable[[Any], Any]

    def __call__(self, valid):
        return self.make(valid)


def leaf(value):
    """A tree of which the last leaf is another one."""

    @Made
    def wrong(tree):
        flat, treedef = jax.tree.flatten(tree)
        made = value(flat[-1]) if callable(value) else value
        return jax.tree.unflatten(treedef, [*flat[:-1], made])

    return wrong


@Made
def smaller(tree):
    """Without its last leaf, where it is a dictionary."""
    if not isinstance(tree, dict):
        return {}
    last = list(tree)[-1]
    return {k: v for k, v in tree.items() if k != last}


@Made
def other_structure(tree):
    return {"of": {"another": {"model": jnp.ones((2, 2))}}}


names_of = lambda s: s if isinstance(s, dict) else ["a"]
abstract = lambda x: jax.ShapeDtypeStruct(np.shape(x), np.float32)
with_nan = lambda x: np.full(np.shape(x), np.nan, np.float32)

TREE = {
    "a string": "params",
    "no tree": Nothing(),
    "None": None,
    "a string for a leaf": leaf("kernel"),
    "a number for a leaf": leaf(1.5),
    "a list for a leaf": leaf([[1.0, 2.0], [3.0, 4.0]]),
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
    "NaN": Made(with_nan),
    "another width": np.ones((16, 5), np.float32),
    "objects": np.array([[None] * 8] * 16, object),
    "complex": np.ones((16, 8), np.complex64),
    "abstract": Made(abstract),
    "a number": 3.0,
}
OBJECT = {"None": None, "a string": "it", "a number": 3, "a tree": {"a": 1}}
DROP = {
    "a string": "up",
    "a list": [1, 2],
    "another group": {"nothing_like_it": [1]},
    "a number for indices": Made(lambda d: {calls.name(): 3}),
    "out of range": Made(lambda d: {calls.name(): [99]}),
    "fractions": Made(lambda d: {calls.name(): [0.5]}),
    "text": Made(lambda d: {calls.name(): ["a"]}),
    "None": None,
    "a number": 3,
}
BY_GROUP = {
    "None": None,
    "a string": "scores",
    "a list": [1.0],
    "a number": 3,
    "text in it": Made(lambda s: dict.fromkeys(names_of(s), "high")),
    "a list in it": Made(lambda s: {k: [1.0, 2.0] for k in names_of(s)}),
    "of another size": Made(
        lambda s: dict.fromkeys(names_of(s), np.ones(5, np.float32))
    ),
    "None in it": Made(lambda s: dict.fromkeys(names_of(s))),
}
ANY_SIZE = {k: v for k, v in BY_GROUP.items() if k != "of another size"}
BY_NAME = {
    "None": None,
    "a string": "losses",
    "a list": [1.0],
    "text in it": Made(lambda s: dict.fromkeys(names_of(s), "high")),
    "another name": Made(lambda s: {"nothing_like_it": 1.0}),
    "NaN in it": Made(lambda s: dict.fromkeys(names_of(s), float("nan"))),
    "None in it": Made(lambda s: dict.fromkeys(names_of(s))),
}
PATH = {"None": None, "a number": 3, "a tuple": ("up", "kernel"), "bytes": b"up"}
SHAPE = {
    "None": None,
    "a number": 3,
    "text": "8x16",
    "fractions": (1.5, 2),
    "negative": (-1, 2),
}
LABELS = {
    "None": None,
    "a string": "labels",
    "too short": np.array([0]),
    "fractions": np.ones(4) / 2,
    "negative": np.array([-1, 0, 0, 0]),
    "a gap": np.array([0, 0, 5, 5]),
}
ALONE = TREE | {"NaN": leaf(with_nan)}
SHAPED = {k: MATRIX[k] for k in ("a list", "None", "a string", "abstract", "a number")}
FLAT = {k: v for k, v in MATRIX.items() if k != "another width"}
GRAM = {k: v for k, v in MATRIX.items() if k != "a vector"}  # of second moments alone
SWITCH = {"a string": "yes", "a number": 3, "a list": [True]}
NAMES = {"None": None, "a number": 3, "another": ["nothing_like_it"], "numbers": [1.5]}

# By the name of an argument; of one function alone as `function.argument`.
LOGITS = {
    "None": None,
    "a string": "l",
    "another": {"left": np.ones((2, 6, 16), np.float32)},
    "another shape": {"up": {"kernel": np.ones((3, 3), np.float32)}},
}
EXITS = {
    "None": None,
    "an array": np.ones((2, 3, 4), np.float32),
    "empty": [],
    "numbers": [1.0, 2.0],
    "different": [np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)],
    "integers": [np.ones((2, 3), int)] * 2,
}
MASK_NUMBERS = {
    "None": None,
    "a string": "mask",
    "a list": [0.0, 1.0],
    "bools": np.ones(8, bool),
    "a matrix": np.ones((2, 4), np.float32),
}
# One row is taken, and NaN goes on, as in other products.
ROWS = {k: v for k, v in MATRIX.items() if k not in ("a vector", "NaN")}
ENGINES = {"None": None, "a string": "gathered", "a list": [1], "an engine": len}
KINDS = {
    "params": TREE,
    "scores": TREE,
    "grads": GRADS,
    "gradients": LIKE,
    "masks": MASKS,
    "first": MASKS,
    "second": MASKS,
    "rename": {k: v for k, v in FUNCTION.items() if k not in ("None", "a tree")},
    "strict": SWITCH,
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
    "values": LIKE,
    "format": {
        "a string": "bitmap",
        "a number": 3,
        "a pattern of no format": js.Unstructured(),
        "no match": {"nothing_like_it": js.formats.Bitmap},
        "an array": np.ones(2),
    },
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
    "begin": INTEGER,
    "end": INTEGER,
    "sparse": INTEGER,
    "dense": INTEGER,
    "step": INTEGER,
    "chunk": INTEGER,
    "average": INTEGER,
    "order": INTEGER,
    "iterations": INTEGER,
    "every": INTEGER,
    "damping": POSITIVE,
    "rel_damping": POSITIVE,
    "eps": POSITIVE,
    "q": {k: v for k, v in SPARSITY.items() if k != "one"},
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
    "host": SWITCH,
    "exceptions": {
        "a string": "up",
        "broken": {"up(": 0.1},
        "text": {"up": "x"},
        "a number": 3,
    },
    "rules": {
        "a string": "btd",
        "broken": {"my_call": "nonsense"},
        "a number": {"my_call": 3},
        "a list": ["a"],
    },
    "stages": {
        "None": None,
        "a number": 3,
        "empty": (),
        "numbers": (1, 1),
        "text": "ab",
    },
    "hidden": {
        "None": None,
        "a number": 3,
        "text": {"up": "last"},
        "another": {"left": 0},
        "beyond": {"up": 7, "down": 1},
    },
    "to": LABELS,
    "followers": {
        "None": None,
        "a list": ["1"],
        "another": {"1": "9"},
        "a string": "1",
        "numbers": {1: 0},
    },
    "stated": {"a list": [1], "a number": 3},
    "stream": {
        "None": None,
        "a number": 3,
        "empty": [],
        "strings": ["a"],
        "a tree": [{"a": 1.0}],
    },
    "at": {
        "None": None,
        "a number": 3,
        "text": ["a"],
        "not rising": [4, 2],
        "fractions": [1.5],
    },
    "mask": {
        "floats": np.ones((8, 16), np.float32),
        "None": None,
        "a string": "mask",
        "a list": [[True]],
        "another shape": np.ones((3, 3), bool),
    },
    "group_sizes": {
        "None": None,
        "a string": "g",
        "too short": np.ones(2, np.int32),
        "fractions": np.ones(4),
    },
    "input": {"None": None, "a number": 0, "text": "in", "fractions": (0.5,)},
    "output": {"None": None, "a number": 0, "text": "in", "fractions": (0.5,)},
    "axis": {"None": None, "text": "last", "a tuple": (0, 1), "a fraction": 0.5},
    "errors": {"None": None, "a string": "e"},
    "info": {"None": None, "a string": "e", "numbers": {"up": 1.0}},
    "iterable": {"None": None, "a number": 3},
    "leaf": {"None": None, "a string": "w", "a number": 1.5},
    "inputs": {
        "None": None,
        "a string": "x",
        "text": np.array(["a"]),
        "a list": [[1.0]],
    },
    "batch": {
        "None": None,
        "a string": "x",
        "a list": [[1.0] * 8],
        "another width": np.ones((4, 5), np.float32),
        "a number": 3.0,
    },
    "value": NUMBER,
    "paths": {"None": None, "a string": "up", "numbers": [1, 2]},
    "key_path": {"a number": 3},
    "*": {
        "None": (None,),
        "text": ("a",),
        "another width": (np.ones((4, 5), np.float32),),
        "a list": ([[1.0] * 8],),
    },
    "measure": SWITCH,
    "kernels.dense.x": ROWS,
    "kernels.gathered.x": ROWS,
    "kernels.matmul.x": ROWS,
    "kernels.native.x": ROWS,
    "kernels.pallas.x": ROWS,
    "kernels.choose.rules": ENGINES,
    "kernels.matmul.rules": ENGINES,
    "kernels.sparsify.rules": ENGINES,
    "kernels.packed_apply.rules": ENGINES,
    "rows": INTEGER,
    "platform": {k: v for k, v in CHOICE.items() if k != "None"},
    "sensitivity": OBJECT,
    "runs": OBJECT,
    "xlabel": {},  # any text
    "before": TREE,
    "after": LIKE,
    "history": OBJECT,
    "grow": OBJECT,
    "adapters": OBJECT,
    "masking.adapter_importance.grads": OBJECT,
    "train": FUNCTION,
    "rounds": INTEGER,
    "rewind_to": LIKE,
    "update": FUNCTION,
    "calibration.batch_statistics.stats": TREE,
    "calibration.batch_statistics.batches": {
        "None": None,
        "a number": 3,
        "empty": [],
        "an array": np.ones((4, 8), np.float32),
        "a string": "batches",
    },
    "rank": INTEGER,
    "gamma": POSITIVE,
    "transforms.soft_shrink.factor": POSITIVE | {"one": 1.5},
    "factors": {"None": None, "a string": "f", "a number": 3},
    "drop_fraction": POSITIVE | {"one": 1.5},
    "thresholds": {
        "None": None,
        "a string": "t",
        "another": {"left": np.float32(0)},
        "another shape": {"up": {"kernel": np.ones((3, 3), np.float32)}},
    },
    "axis_name": {"None": None, "a number": 0, "a list": ["data"]},
    "workers": INTEGER,
    "fraction": POSITIVE | {"one": 1.5},
    "student": LIKE,
    "teacher": LIKE,
    "losses.square_head.mask": {
        "floats": np.ones((2, 3), np.float32),
        "a string": "mask",
        "a list": [[True]],
        "another shape": np.ones((3, 3), bool),
    },
    "rest": OBJECT,
    "density": POSITIVE | {"one": 1.5},
    "mu": POSITIVE | {"zero": 0.0},
    "unit": {"a string": "columns", "a fraction": 0.5, "None": None, "a bool": True},
    "indices": {
        "a string": "i",
        "a number": 3,
        "fractions": leaf(np.ones(2)),
        "out of range": leaf(np.array([0, 999])),
        "negative": leaf(np.array([-1, 0])),
        "a leaf less": smaller,
        "another structure": other_structure,
    },
    "cuts": INTEGER | {"one": 1},
    "threshold": NUMBER,
    "contrib.guidance_masks.threshold": POSITIVE | {"above": 1.5},
    "clients": {
        "None": None,
        "a number": 3,
        "empty": [],
        "a tree": Made(lambda clients: clients[0]),
        "another shape": Made(lambda clients: [LIKE["another shape"](clients[0])]),
        "another structure": [{"of": {"another": {"model": np.ones(2)}}}],
        "NaN": Made(lambda clients: [leaf(with_nan)(clients[0])]),
    },
    "embeddings": {
        "None": None,
        "a string": "e",
        "a vector": np.ones(6),
        "NaN": np.full((6, 3), np.nan),
        "text": np.array([["a"] * 3] * 6),
    },
    "divergences": {
        "None": None,
        "a string": "d",
        "too short": np.ones(5),
        "NaN": np.full(6, np.nan),
        "negative": -np.ones(6),
        "nothing": np.zeros(6),
    },
    "concepts": {"a number": 3, "too short": ["a"], "numbers": [1] * 6},
    "prompts": {"None": None, "a string": "ab", "too short": ["a"], "empty": []},
    "targets": {"None": None, "a string": "ab", "too short": ["a"], "empty": []},
    "generate": FUNCTION | {"too few": lambda prompts, targets: ["a"]},
    "check": FUNCTION | {"no bool": lambda answer, target: "yes"},
    "contrib.paser.costs": {
        "None": None,
        "a string": "c",
        "too short": np.ones(5),
        "one": np.ones(6),
    },
    "contrib.paser.budget": INTEGER | {"too many": 7},
    "contrib.paser.clusters": INTEGER | {"too many": 7},
    "candidates": INTEGER
    | {
        "another group": {"nothing_like_it": [1]},
        "falling": Made(lambda _: {calls.name(): [4, 2]}),
        "too many": Made(lambda _: {calls.name(): [99]}),
    },
    "whole": POSITIVE | {"one": 1.0},
    "gate": {**MATRIX, "a vector": np.ones(5, np.float32)},
    "kernel": {**MATRIX, "a vector": np.ones(5, np.float32)},
    "maps": MATRIX,
    "contrib.hybrid.x": {**MATRIX, "a vector": np.ones(5, np.float32)},
    "adaptive.mass_targets.maps": FLAT,
    "adaptive.filter_gates.logits": {k: v for k, v in FLAT.items() if k != "a vector"},
    "module": OBJECT,
    "modules": OBJECT,
    "predictor": OBJECT,
    "width": INTEGER,
    "channels": INTEGER,
    "filters": INTEGER,
    "frozen_from": POSITIVE | {"one": 1.0},
    "pool": SPARSITY,
    "gains": LIKE | {"NaN": leaf(with_nan)},
    "mass": POSITIVE | {"above": 1.5},
    "decoupled": SWITCH,
    # Of one function.
    "channels.scale_channels.gates": BY_GROUP,
    "channels.drop_closed.gates": ANY_SIZE,
    "narrowing.flops_share.gates": BY_GROUP,
    "masking.width_gates.logits": BY_GROUP,
    "masking.width_gates.scores": BY_GROUP | {"None": {}},
    "masking.soft_to_hard.gates": OBJECT,
    "contrib.threshold_gates.scores": ANY_SIZE,
    "contrib.threshold_gates.thresholds": BY_GROUP,
    "contrib.hybrid_gate.mask": MASK_NUMBERS,
    "contrib.hybrid_loss.mask": MASK_NUMBERS,
    "contrib.hybrid_gate.step": POSITIVE,
    "adaptive.filter_logits.pool": CHOICE,
    "adaptive.choose_exit.logits": EXITS,
    "adaptive.exit_threshold.logits": EXITS,
    "adaptive.exit_threshold.costs": {
        "None": None,
        "a number": 3,
        "text": ["a", "b"],
        "too few": [1.0],
        "falling": [2.0, 1.0],
        "NaN": [1.0, float("nan")],
    },
    "masking.cram.sparsities": {
        "None": None,
        "nothing": (),
        "percent": (50.0,),
        "text": ("half",),
        "a number": 0.5,
    },
    "masking.masked_by_logits.logits": LOGITS,
    "masking.masks_of_logits.logits": LOGITS,
    "exchange.specs.opt_state": {},  # anything may hold no memory
    "exchange.largest.x": {"None": None, "a string": "x", "integers": np.ones(4, int)},
    "allocations.sensitivity.sparsities": {
        "None": None,
        "a string": "half",
        "a number": 0.5,
        "nothing": [],
        "percent": [50.0],
        "a tree": {"w": 0.5},
    },
    # Gradients alone: there is nothing that they have to be like.
    "calibration.gradient_norms.grads": ALONE,
    "curvature.block_fisher.grads": ALONE,
    "curvature.diagonal_fisher.grads": ALONE,
    "curvature.kronecker_fisher.grads": ALONE,
    "curvature.mfac.grads": ALONE,
    "patterns.pack.masks": TREE | {"floats": MASKS["floats"]},
    "keep_sparse.masks": TREE | {"floats": MASKS["floats"]},
    "experts.group_experts.groups": INTEGER,
    "narrowing.narrow_like.tree": {},  # anything, of which parameters' parts are cut
    "tree.leaves_with_paths.tree": {},  # any pytree
    "tree.map_with_path.tree": {},
    "tree.keys_like.tree": {},
    "tree.unwrap_variables.tree": {},
    "tree.default_axes.path": {},  # for the message
    "tree.kernel_axes.path": {},
    "tree.resolve_axes.params": {},  # leaves that are no arrays have no axes
    "tree.default_where.leaf": {},
    "tree.why_dense.leaf": {},
    "transforms.find_states.opt_state": {},  # anything may hold none
    "curvature.check_one_damping.rel_damping": {},
    "tree.to_matrices.w": SHAPED,
    "tree.from_matrices.matrices": SHAPED,
    "scores.bias_compensation.mean": SHAPED | {"another width": np.ones(5, np.float32)},
    "contrib.expert_distances.router": FLAT,
    "experts.router_similarity.logits": FLAT,
    "solvers.magnitude.gram": GRAM,
    "solvers.wanda.gram": GRAM,
    "calibration.init.gram": SWITCH,
    "calibration.init.batch": SHAPE,
    "contrib.atomic_init.batch": SHAPE,
    "allocations.evolve.batches": {"None": None, "a number": 3, "empty": []},
    "allocations.evolve.sizes": {
        "None": None,
        "text": {"a": "b"},
        "fractions": {"a": 1.5, "b": 2},
        "empty": {},
    },
    "allocations.level_sparsities.sizes": {
        "None": None,
        "text": {"a": "b"},
        "fractions": {"a": 1.5, "b": 2},
    },
    "solvers.refit_channels.keep": {
        "None": None,
        "floats": np.ones(8),
        "too short": np.ones(3, bool),
        "a string": "k",
    },
    "scores.bias_compensation.kept": {
        "None": None,
        "floats": np.ones(8),
        "too short": np.ones(3, bool),
        "a string": "k",
    },
    "experts.merge_gates.gates": MATRIX,
    "channels.normalize_max.scores": ANY_SIZE,
    "channels.drop_lowest.scores": BY_GROUP,
    "channels.drop_to_budget.scores": BY_GROUP,
    "channels.per_parameter.scores": BY_GROUP,
    "channels.lamp.scores": ANY_SIZE,
    "channels.normalize_mean.scores": ANY_SIZE,
    "channels.normalize_norm.scores": ANY_SIZE,
    "channels.normalize_range.scores": ANY_SIZE,
    "channels.standardize.scores": ANY_SIZE,
    "schedules.at.*": {
        "text": ("a",),
        "fractions": (1.5,),
        "negative": (-1,),
        "empty": (),
    },
}
# Arguments that a valid call leaves at their defaults, and wrong values of them.
MORE = {
    "where",
    "axes",
    "pattern",
    "min_keep",
    "steps",
    "score",
    "trace",
    "zeros",
    "unseen",
    "solver",
    "scope",
    "reduce",
    "norms",
    "positions",
    "missing",
    "exceptions",
    "rules",
    "chunk",
    "average",
    "block_size",
    "total_steps",
    "masks",
    "rename",
    "strict",
    "iterations",
    "rho",
    "rel_damping",
    "damping",
    "usage",
    "every",
}


# What is taken in spite of it: the function, the argument, the value, and the reason.
LATER = (
    "(curvature.*_estimator|prune_schedule|recipes.*|transforms.windowed_obs|"
    "transforms.(rigl|set_|snfs|static|drop_and_grow|acdc|soft_shrink|frugal)|masking.cram)",
    "its parameters come at init",
)
TAKEN = [
    (".*", "where", "no answer", "it counts as true or false, tree.select says"),
    (".*", "params", "an abstract leaf", "only shapes are looked at, it says"),
    (LATER[0], "where", "(no match|another tree)", LATER[1]),
    (LATER[0], "axes", "(no match|too many)", LATER[1]),
    (LATER[0], "sparsity", "a list", LATER[1]),
    ("masking.bip", "axes", "(no match|too many)", LATER[1]),
    ("masking.(cram|bip)", "loss_fn", "no arguments", "it is called later"),
    ("curvature.mfac", "axes", "(no match|too many)", "of blocks alone, it says"),
    ("curvature.stream_grads", "batches", ".*", "they are looked at as they come"),
    (".*.(update|atomic_update.*)", "(x|g|down)", "NaN", "not looked for, it says"),
    ("curvature.window_update.*", "grads", "NaN", "not entered, it says"),
    (
        "losses.(distill|jensen_shannon)",
        ".*_logits",
        "NaN",
        "the loss is NaN, as any would be",
    ),
    ("curvature.span_ihvp", "coefficients", "NaN", "a product, and no choice"),
    ("scores.bias_compensation", "w", "NaN", "a product, and no choice"),
    ("experts.merge_gates", "gates", "NaN", "a sum within a model, and no choice"),
    ("depth.nm_gates", "logits", "NaN", "within a model, under jit"),
    ("contrib.hybrid", "(x|gate)", "NaN", "within a model, under jit"),
    ("contrib.fold_hybrid", "(kernel|gate)", "NaN", "a product, and no choice"),
    ("adaptive.*", "(maps|logits|x)", "NaN", "within a model, under jit"),
]
# Only these look at shapes alone.
OF_SHAPES = {
    *("allocations.round_to_weights", "allocations.erk", "allocations.uniform"),
    *("contrib.als", "allocations.arithmetic_progression"),
    *("patterns.check_masks", "patterns.sparsity_of", "patterns.verify"),
    *("patterns.count", "patterns.indices", "patterns.overlap", "patterns.transfer"),
    *(
        "curvature.window_init",
        "scores.random",
        "narrowing.narrow",
        "narrowing.widen",
    ),
    *("channels.per_parameter", "depth.remove_blocks"),
    *("depth.share_blocks", "trace", "tracing.retrace", "tree.select"),
    "report.table",
    *("masking.init_mask_logits", "masking.masks_of_logits"),
}


def why_taken(function, argument, label):
    """The reason for which a value is taken, None where it should not be."""
    if (argument, label) == (
        "params",
        "an abstract leaf",
    ) and function not in OF_SHAPES:
        return None
    given = (function, argument, label)
    for *expressions, reason in TAKEN:
        if all(re.fullmatch(e, x) for e, x in zip(expressions, given, strict=True)):
            return reason
    return None


# What a message calls an argument besides its name.
ALSO = {
    "opt_state": ("optimizer state",),
    "batches": ("inputs: ", "batch: "),
    "every": ("interval",),
    "table_or_tables": ("js.report.table",),
    "*": ("0/0: a mask",),
    "drop": ("nothing_like_it",),
    "names": ("nothing_like_it",),
    "followers": ("9: not a block",),
}
PARTS_OF_PATHS = ("kernel", "bias", "up", "down", "of/another/model", "block")


def names(message, function, argument):
    """Whether a message says which argument or which parameter is wrong."""
    arguments = inspect.signature(function).parameters
    words = (*arguments, *PARTS_OF_PATHS, *ALSO.get(argument, ()))
    return any(re.search(rf"(?<!\w){re.escape(word)}", message) for word in words)


def cases(calls, function_of):
    """All wrong calls: of a function, one argument, and what it is replaced by."""
    for function, make in calls.items():
        parameters = inspect.signature(function_of(function)).parameters
        given = make()
        extra = [
            p for p in parameters if p not in given and p in MORE and "*" not in given
        ]
        for argument in [*given, *extra]:
            kind = KINDS.get(f"{function}.{argument}", KINDS.get(argument))
            assert kind is not None, f"{function}: no wrong values of {argument}"
            default = getattr(parameters.get(argument), "default", None)
            for label, value in kind.items():
                if value is not None or default is not None:
                    yield Case(function, argument, label, value)


class Case(NamedTuple):
    function: str
    argument: str
    label: str
    value: Any

    def arguments(self, given, default):
        """Those of a valid call, but for one; first what is passed without a name."""
        valid = given.get(self.argument, default)
        if self.argument in ("masks", "kept") and valid is None:
            valid = calls.masks()
        made = isinstance(self.value, Made)
        given = given | {self.argument: self.value(valid) if made else self.value}
        if "*" not in given:
            return (), given
        rest = given.pop("*")
        return (*given.values(), *rest), {}
