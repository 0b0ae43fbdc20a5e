"""One valid call of every public function, as `test_wrong_calls.py` changes them.

All are of one small model; a new function is a new entry of `CALLS`. Everything is made
when it is first asked for, and once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse as js

SHAPES = {
    "down": {"bias": (4,), "kernel": (16, 4)},
    "up": {"kernel": (8, 16)},
}
ROWS, EXAMPLES = 4, 3


def draw(seed, shape, dtype=np.float32):
    numbers = np.random.default_rng([len(shape), seed]).standard_normal(shape)
    return jax.device_put(numbers.astype(dtype))


def of_shapes(make):
    return jax.tree.map(make, SHAPES, is_leaf=lambda s: isinstance(s, tuple))


@functools.cache
def params():
    return of_shapes(lambda shape: draw(0, shape))


@functools.cache
def grads():
    return of_shapes(lambda shape: draw(1, shape))


@functools.cache
def scores():
    return of_shapes(lambda shape: jax.device_put(np.abs(np.asarray(draw(0, shape)))))


@functools.cache
def example_grads():
    """Of the kernels alone, as `per_example_grads` takes them."""
    return {
        "down": {"bias": None, "kernel": draw(2, (EXAMPLES, 16, 4))},
        "up": {"kernel": draw(2, (EXAMPLES, 8, 16))},
    }


@functools.cache
def sensitivity():
    losses = {"up/kernel": np.array([1.0, 2.0])}
    return js.allocations.Sensitivity(0.5, (0.25, 0.5), losses)


@functools.cache
def layer_info():
    given = dict.fromkeys(js.oneshot.LayerInfo._fields, np.float64(0.5))
    return {"up/kernel": js.oneshot.LayerInfo(**given)}


@functools.cache
def inverse_diagonal():
    return jax.tree.map(lambda g: abs(g[0]) + 1, example_grads())


@functools.cache
def masks():
    full = lambda shape: jax.device_put(np.indices(shape).sum(0) % 2 == 0)
    one = lambda shape: (
        full(shape) if len(shape) > 1 else jax.device_put(np.array(True))
    )
    return of_shapes(one)


def sparsities():
    return of_shapes(lambda shape: 0.5 if len(shape) > 1 else 0.0)


@functools.cache
def packed():
    return js.formats.pack(params(), masks(), axes=AXES)


@functools.cache
def tiles():
    pattern = js.Balanced((1, 4))
    pruned = js.prune(params(), 0.5, pattern=pattern, axes=AXES)
    return js.formats.pack(*pruned, format=pattern, axes=AXES)["up"]["kernel"]


@functools.cache
def batch():
    return draw(3, (ROWS, 8))


def apply_fn(params, x):
    hidden = jax.nn.relu(x @ params["up"]["kernel"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"][None]


def loss_fn(params, x):
    return jnp.mean(apply_fn(params, x) ** 2)


@functools.cache
def key():
    return jax.random.key(0)


@functools.cache
def trace():
    return js.trace(apply_fn, params(), batch())


@functools.cache
def groups():
    return js.coupling.groups(trace()).prunable


@functools.cache
def name():
    (found,) = groups()
    return found


def channel_scores():
    return {name(): draw(4, (16,)) ** 2}


def width_logits():
    return js.masking.init_width_logits(groups(), candidates=4)


def channel_gates():
    return {name(): np.asarray(draw(4, (16,))) ** 2}


def both_gates():
    return js.masking.width_gates(groups(), width_logits(), candidates=4)


def hybrid():
    return js.contrib.init_hybrid(8, key=jax.random.key(0), rank=2)


def predictor():
    return js.adaptive.init_filter_predictor(8, 4, key=jax.random.key(0))


def drop():
    return js.coupling.Drop({name(): np.array([1, 3])}, {name(): 16})


def input_stats(d):
    x = np.asarray(draw(5, (64, d)))
    return js.calibration.InputStats(
        *map(jnp.asarray, (64.0, x.mean(0), (x * x).mean(0), x.var(0), x.T @ x / 64))
    )


@functools.cache
def stats():
    kernels = tuple((path, k.input, k.view) for path, k in trace().kernels.items())
    inputs = {k.input: input_stats(k.view.d_in) for k in trace().kernels.values()}
    return js.calibration.Statistics(inputs, kernels)


@functools.cache
def running():
    return js.calibration.update(js.calibration.init((), 8, gram=True), batch())


@functools.cache
def fisher():
    return js.curvature.block_fisher(example_grads(), block_size=8, damping=1e-2)


@functools.cache
def full_fisher():
    return js.curvature.mfac(example_grads(), damping=1e-2)


@functools.cache
def window():
    return js.curvature.window_init(params(), window=2, damping=1e-2)


@functools.cache
def gram():
    return input_stats(8).gram


@functools.cache
def factor():
    return js.curvature.factor_gram(gram(), rel_damping=0.01)


def matrix():
    return draw(6, (16, 8))


def schedule(**options):
    return js.prune_schedule(0.5, every=js.schedules.at(3), **options)


@functools.cache
def optimizer():
    return schedule().wrap(optax.sgd(0.1))


@functools.cache
def opt_state():
    return optimizer().init(params())


def moving():
    return {"sparsity": 0.5, "every": 2, "key": jax.random.key(0)}


@functools.cache
def explored_state():
    return js.transforms.set_(**moving(), track=True).init(params())


@functools.cache
def adapters():
    return js.masking.init_adapters(params(), key=jax.random.key(0), rank=2)


@functools.cache
def mask_logits():
    return js.masking.init_mask_logits(
        params(), pattern=js.NM(2, 4), key=jax.random.key(0)
    )


@functools.cache
def hesso():
    tx = js.penalties.hesso(
        optax.sgd(0.1), groups(), sparsity=0.5, begin=0, periods=1, duration=2
    )
    return tx.init(params())


def experts():
    return {"up": draw(7, (4, 3, 8)), "down": draw(8, (4, 8, 3))}


@functools.cache
def atomic():
    return js.contrib.atomic_init((4,), 8)


@functools.cache
def residual():
    """A trace of two residual blocks, with its parameters."""

    def run(params, x):
        for block in params:
            x = x + jnp.tanh(x @ block["up"]) @ block["down"]
        return x

    blocks = [{"up": draw(i, (8, 4)), "down": draw(i, (4, 8))} for i in (0, 1)]
    return js.trace(run, blocks, batch()), blocks


def blocks():
    return residual()[1]


def of_residual():
    return residual()[0]


def table():
    return js.report.table(params(), masks())


def rows(*shape):
    return draw(9, shape)


LABELS = np.array([0, 0, 1, 1])
AXES = js.Axes(input=(0,), output=(1,))

# name: its function's arguments by name; `*` holds what is passed without one.
CALLS = {
    "allocations.ecoflap": lambda: {
        "loss_fn": loss_fn,
        "params": params(),
        "batches": [batch()],
        "sparsity": 0.5,
        "key": key(),
    },
    "allocations.sensitivity": lambda: {
        "params": params(),
        "scores": scores(),
        "loss_fn": lambda params: 0.0,
        "sparsities": [0.5],
    },
    "allocations.from_global_scores": lambda: {"scores": scores(), "sparsity": 0.5},
    "allocations.round_to_weights": lambda: {
        "params": params(),
        "sparsities": sparsities(),
    },
    "allocations.erk": lambda: {"params": params(), "sparsity": 0.5},
    "allocations.uniform": lambda: {"params": params(), "sparsity": 0.5},
    "contrib.als": lambda: {
        "params": params(),
        "redundancy": {"up/kernel": 0.1, "down/kernel": 0.2},
        "sparsity": 0.5,
        "lower": 0.3,
        "upper": 0.7,
    },
    "allocations.arithmetic_progression": lambda: {
        "params": params(),
        "sparsity": 0.5,
        "difference": 0.1,
    },
    "allocations.dsa": lambda: {"scores": scores(), "sparsity": 0.5},
    "allocations.owl": lambda: {"scores": scores(), "sparsity": 0.5},
    "allocations.evolve": lambda: {
        "fitness": lambda levels, batch: levels["a"] ** 2,
        "sizes": {"a": 64, "b": 64},
        "sparsity": 0.5,
        "batches": [0],
        "key": key(),
        "levels": 2,
        "step": 4,
        "generations": 1,
        "offspring": 2,
        "stages": ((1, 1),),
    },
    "allocations.level_sparsities": lambda: {
        "sizes": {"a": 64, "b": 64},
        "sparsity": 0.5,
        "levels": 2,
        "step": 4,
    },
    "calibration.run": lambda: {
        "trace": trace(),
        "params": params(),
        "batches": [batch()],
    },
    "calibration.finalize": lambda: {"state": running()},
    "calibration.gradient_norms": lambda: {"grads": example_grads(), "order": 1},
    "calibration.init": lambda: {"batch": (), "d_in": 8, "gram": True},
    "calibration.merge": lambda: {"a": running(), "b": running()},
    "calibration.unseen": lambda: {"stats": stats()},
    "calibration.update": lambda: {"state": running(), "x": batch()},
    "curvature.greedy_scores": lambda: {"fisher": fisher(), "params": params()},
    "curvature.group_scores": lambda: {
        "fisher": js.curvature.block_fisher(
            example_grads(),
            block_size=8,
            damping=1e-2,
            pattern=js.Block((4, 1)),
            axes=AXES,
        ),
        "params": params(),
    },
    "curvature.inverse_blocks": lambda: {"fisher": fisher()},
    "curvature.block_estimator": lambda: {"block_size": 8},
    "curvature.block_fisher": lambda: {
        "grads": example_grads(),
        "block_size": 8,
        "damping": 1e-2,
    },
    "curvature.diagonal_estimator": lambda: {"where": "kernel$"},
    "curvature.diagonal_fisher": lambda: {"grads": example_grads(), "damping": 1e-2},
    "curvature.apart": lambda: {"fisher": fisher()},
    "curvature.check_covers": lambda: {"fisher": fisher(), "path": "up/kernel"},
    "curvature.damped_inverse": lambda: {"factor": factor()},
    "curvature.factor_gram": lambda: {"gram": gram(), "rel_damping": 0.01},
    "curvature.inverse_upper": lambda: {"factor": factor()},
    "curvature.kronecker_estimator": lambda: {"axes": AXES},
    "curvature.kronecker_fisher": lambda: {
        "grads": example_grads(),
        "damping": 1e-2,
        "axes": AXES,
    },
    "curvature.mfac": lambda: {"grads": example_grads(), "damping": 1e-2},
    "curvature.span_ihvp": lambda: {
        "fisher": full_fisher(),
        "coefficients": rows(EXAMPLES),
    },
    "curvature.window_init": lambda: {"params": params(), "window": 2, "damping": 1e-2},
    "curvature.window_ihvp": lambda: {"state": window(), "tree": grads()},
    "curvature.window_mask": lambda: {"state": window(), "masks": masks()},
    "curvature.window_update": lambda: {"state": window(), "grads": grads()},
    "curvature.window_update_ihvp": lambda: {"state": window(), "grads": grads()},
    "curvature.eliminate": lambda: {
        "fisher": fisher(),
        "params": params(),
        "removed": of_shapes(lambda s: np.zeros(s, bool)),
    },
    "curvature.ihvp": lambda: {"fisher": fisher(), "tree": grads()},
    "curvature.inverse_diagonal": lambda: {"fisher": fisher()},
    "curvature.restrict": lambda: {"fisher": fisher(), "masks": masks()},
    "curvature.collect_grads": lambda: {"stream": [example_grads()], "count": EXAMPLES},
    "curvature.per_example_grads": lambda: {
        "loss_fn": loss_fn,
        "params": params(),
        "batch": batch(),
    },
    "curvature.stream_grads": lambda: {
        "loss_fn": loss_fn,
        "params": params(),
        "batches": [batch()],
    },
    "curvature.check_one_damping": lambda: {"damping": 1e-2, "rel_damping": None},
    "losses.distill": lambda: {
        "student_logits": rows(2, 3),
        "teacher_logits": rows(2, 3),
        "temperature": 2.0,
        "hardness": 1.0,
    },
    "channels.obs_errors": lambda: {
        "groups": groups(),
        "params": params(),
        "stats": stats(),
    },
    "channels.obs_greedy": lambda: {
        "groups": groups(),
        "params": params(),
        "stats": stats(),
        "sparsity": 0.5,
    },
    "channels.obs_refit": lambda: {
        "groups": groups(),
        "params": params(),
        "stats": stats(),
        "drop": drop(),
    },
    "oneshot.layerwise": lambda: {
        "apply_fn": apply_fn,
        "params": params(),
        "batches": [batch()],
        "sparsity": 0.5,
    },
    "prune": lambda: {"params": params(), "sparsity": 0.5},
    "patterns.removed_count": lambda: {"sparsity": 0.5, "n": 8},
    "patterns.apply": lambda: {"params": params(), "masks": masks()},
    "patterns.check_masks": lambda: {"masks": masks(), "params": params()},
    "patterns.kept_count": lambda: {"mask": masks()["up"]["kernel"], "shape": (8, 16)},
    "patterns.pack": lambda: {"masks": masks()},
    "patterns.unpack": lambda: {"packed": js.patterns.pack(masks())},
    "patterns.masks": lambda: {"scores": scores(), "sparsity": 0.5},
    "patterns.union": lambda: {"*": (masks(), masks())},
    "patterns.intersection": lambda: {"*": (masks(), masks())},
    "patterns.overlap": lambda: {
        "first": masks(),
        "second": masks(),
        "params": params(),
    },
    "patterns.count": lambda: {"masks": masks(), "params": params()},
    "patterns.indices": lambda: {"masks": masks(), "params": params()},
    "patterns.transfer": lambda: {"masks": masks(), "params": params()},
    "patterns.sparsity_of": lambda: {"masks": masks(), "params": params()},
    "patterns.verify": lambda: {
        "masks": masks(),
        "params": params(),
        "pattern": js.NM(2, 4),
        "axes": AXES,
    },
    "NM": lambda: {"keep": 2, "of": 4},
    "Block": lambda: {"shape": (4, 4), "reduce": "mean", "scope": "layer"},
    "Balanced": lambda: {"shape": (4, 4), "reduce": "mean"},
    "formats.pack": lambda: {"params": params(), "masks": masks(), "axes": AXES},
    "formats.unpack": lambda: {"packed": packed()},
    "kernels.choose": lambda: {"packed": tiles(), "rows": 4},
    "kernels.dense": lambda: {"x": batch(), "packed": tiles()},
    "kernels.gathered": lambda: {"x": batch(), "packed": tiles()},
    "kernels.matmul": lambda: {"x": batch(), "packed": tiles()},
    "kernels.native": lambda: {"x": batch(), "packed": tiles()},
    "kernels.packed_apply": lambda: {"trace": trace()},
    "kernels.pallas": lambda: {"x": batch(), "packed": tiles()},
    "kernels.sparsify": lambda: {
        "trace": trace(),
        "params": params(),
        "masks": masks(),
    },
    "formats.sizes": lambda: {"params": params(), "masks": masks(), "axes": AXES},
    "report.format_table": lambda: {
        "sizes": js.formats.sizes(params(), masks(), axes=AXES)
    },
    "formats.values": lambda: {"packed": packed()},
    "formats.with_values": lambda: {
        "packed": packed(),
        "values": js.formats.values(packed()),
    },
    "Channel": lambda: {"axis": -1, "reduce": "mean", "scope": "layer"},
    "Unstructured": lambda: {"scope": "layer"},
    "Axes": lambda: {"input": (0,), "output": (1,), "batch": ()},
    "recipes.gmp": lambda: {"total_steps": 100},
    "recipes.one_shot": lambda: {"total_steps": 100},
    "recipes.obert_downstream": lambda: {"steps_per_epoch": 100},
    "recipes.obert_upstream": lambda: {"steps_per_epoch": 100},
    "schedules.at": lambda: {"*": (1, 2)},
    "schedules.every": lambda: {"interval": 2, "begin": 0, "end": 9},
    "schedules.rewinding": lambda: {
        "peak": 1e-2,
        "end": 1e-3,
        "at": [2, 4],
        "total_steps": 8,
    },
    "schedules.alternating": lambda: {
        "sparsity": 0.5,
        "begin": 0,
        "end": 8,
        "sparse": 2,
        "dense": 2,
    },
    "schedules.constant": lambda: {"sparsity": 0.5},
    "schedules.one_shot": lambda: {"sparsity": 0.5, "step": 3},
    "schedules.polynomial": lambda: {"final": 0.5, "begin": 0, "end": 8},
    "scores.bias_compensation": lambda: {
        "w": matrix(),
        "mean": rows(8),
        "kept": np.arange(8) > 3,
    },
    "scores.flap": lambda: {"params": params(), "stats": stats()},
    "scores.gblm": lambda: {
        "params": params(),
        "stats": stats(),
        "gradients": scores(),
    },
    "scores.gradient_norm": lambda: {"params": params(), "gradients": scores()},
    "scores.wanda": lambda: {"params": params(), "stats": stats()},
    "scores.grasp": lambda: {"loss_fn": loss_fn, "params": params(), "batch": batch()},
    "scores.snip": lambda: {"params": params(), "grads": grads()},
    "scores.taylor": lambda: {"params": params(), "grads": grads()},
    "scores.magnitude": lambda: {"params": params()},
    "scores.random": lambda: {"params": params(), "key": key()},
    "scores.obd": lambda: {"params": params(), "diagonal": inverse_diagonal()},
    "scores.obs": lambda: {"params": params(), "inverse_diagonal": inverse_diagonal()},
    "scores.as_score": lambda: {"score": js.scores.taylor},
    "scores.moving_average": lambda: {"score": js.scores.taylor, "decay": 0.9},
    "scores.synflow": lambda: {
        "apply_fn": apply_fn,
        "params": params(),
        "inputs": batch(),
    },
    "solvers.admm": lambda: {
        "w": matrix(),
        "gram": gram(),
        "sparsity": 0.5,
        "iterations": 1,
    },
    "solvers.alps": lambda: {
        "w": matrix(),
        "gram": gram(),
        "sparsity": 0.5,
        "iterations": 1,
    },
    "solvers.channel_errors": lambda: {"w": matrix(), "gram": gram()},
    "solvers.refit_channels": lambda: {
        "w": matrix(),
        "gram": gram(),
        "keep": np.arange(8) > 3,
    },
    "solvers.remove_channels": lambda: {"w": matrix(), "gram": gram(), "sparsity": 0.5},
    "solvers.sparsegpt": lambda: {"w": matrix(), "gram": gram(), "sparsity": 0.5},
    "solvers.exact_obs": lambda: {"w": matrix(), "gram": gram(), "sparsity": 0.5},
    "solvers.magnitude": lambda: {"w": matrix(), "gram": gram(), "sparsity": 0.5},
    "solvers.wanda": lambda: {"w": matrix(), "gram": gram(), "sparsity": 0.5},
    "solvers.obs": lambda: {"params": params(), "fisher": fisher(), "sparsity": 0.5},
    "solvers.refit": lambda: {
        "w": matrix(),
        "mask": np.asarray(matrix()) > 0,
        "gram": gram(),
    },
    "contrib.atomic_init": lambda: {"batch": (4,), "size": 8},
    "contrib.atomic_merge": lambda: {"a": atomic(), "b": atomic()},
    "contrib.atomic_scores": lambda: {"sums": atomic()},
    "contrib.atomic_update": lambda: {
        "sums": atomic(),
        "x": rows(4, 2, 8),
        "g": rows(4, 2, 3),
        "down": rows(4, 8, 3),
    },
    "contrib.atomic_update_ragged": lambda: {
        "sums": atomic(),
        "x": rows(4, 8),
        "g": rows(4, 3),
        "down": rows(4, 8, 3),
        "group_sizes": np.array([1, 1, 1, 1], np.int32),
    },
    "depth.residual_blocks": lambda: {"trace": of_residual()},
    "channels.drop_to_budget": lambda: {
        "groups": groups(),
        "scores": channel_scores(),
        "cost": js.channels.dropped_fraction,
        "budget": 1.0,
    },
    "channels.bn_scale": lambda: {
        "groups": groups(),
        "params": params(),
        "where": ".",
    },
    "channels.fpgm": lambda: {"groups": groups(), "params": params()},
    "channels.gate_scores": lambda: {
        "groups": groups(),
        "loss_fn": loss_fn,
        "params": params(),
        "batch": batch(),
    },
    "contrib.cluster_experts": lambda: {
        "distances": abs(np.arange(4.0)[:, None] - np.arange(4.0)),
        "clusters": 2,
    },
    "contrib.expert_distances": lambda: {"router": rows(4, 8)},
    "contrib.medoids": lambda: {"experts": experts(), "labels": LABELS},
    "contrib.merge_clusters": lambda: {
        "experts": experts(),
        "router": rows(4, 8),
        "labels": LABELS,
    },
    "narrowing.cost": lambda: {"trace": trace(), "drop": drop()},
    "depth.knapsack": lambda: {
        "losses": {"a": 1.0, "b": 2.0},
        "sizes": {"a": 10, "b": 20},
        "at_least": 10,
    },
    "depth.nm_gates": lambda: {
        "logits": rows(2, 2),
        "key": key(),
        "keep": 1,
        "of": 2,
        "temperature": 1.0,
    },
    "depth.nm_options": lambda: {"keep": 1, "of": 2},
    "channels.zero_indices": lambda: {"params": params(), "groups": groups()},
    "channels.flap_scores": lambda: {
        "groups": groups(),
        "params": params(),
        "stats": stats(),
    },
    "channels.flap_compensation": lambda: {
        "groups": groups(),
        "params": params(),
        "stats": stats(),
        "drop": drop(),
    },
    "contrib.gate_penalty": lambda: {
        "gates": {"a": jnp.ones(()), "b": jnp.ones(())},
        "costs": {"a": 1.0, "b": 2.0},
        "budget": 0.5,
    },
    "depth.gated": lambda: {"trace": of_residual()},
    "experts.group_experts": lambda: {
        "usage": np.arange(4.0),
        "similarity": np.eye(4),
        "groups": 2,
    },
    "experts.router_similarity": lambda: {"logits": rows(6, 4)},
    "coupling.groups": lambda: {"trace": trace()},
    "depth.block_similarity": lambda: {
        "trace": of_residual(),
        "params": blocks(),
        "batches": [batch()],
    },
    "depth.output_losses": lambda: {
        "trace": of_residual(),
        "params": blocks(),
        "batches": [batch()],
    },
    "experts.align_experts": lambda: {
        "experts": experts(),
        "to": np.array([0, 0, 2, 2]),
        "hidden": {"up": 2, "down": 1},
    },
    "experts.merge_experts": lambda: {"experts": experts(), "labels": LABELS},
    "experts.merge_gates": lambda: {"gates": rows(2, 4), "labels": LABELS},
    "narrowing.drop_masks": lambda: {"trace": trace(), "drop": drop()},
    "narrowing.narrow": lambda: {"trace": trace(), "params": params(), "drop": drop()},
    "narrowing.widen": lambda: {
        "trace": trace(),
        "params": js.narrowing.narrow(trace(), params(), drop()).params,
        "drop": drop(),
    },
    "channels.lamp": lambda: {"scores": channel_scores()},
    "channels.normalize_max": lambda: {"scores": channel_scores()},
    "channels.normalize_mean": lambda: {"scores": channel_scores()},
    "channels.normalize_norm": lambda: {"scores": channel_scores()},
    "channels.normalize_quantile": lambda: {"scores": channel_scores(), "q": 0.5},
    "channels.normalize_range": lambda: {"scores": channel_scores()},
    "channels.standardize": lambda: {"scores": channel_scores()},
    "channels.per_parameter": lambda: {
        "groups": groups(),
        "scores": channel_scores(),
        "params": params(),
    },
    "depth.remove_blocks": lambda: {
        "trace": of_residual(),
        "params": blocks(),
        "names": ["1"],
    },
    "depth.share_blocks": lambda: {
        "trace": of_residual(),
        "params": blocks(),
        "followers": {"1": "0"},
    },
    "channels.channel_scores": lambda: {"groups": groups(), "scores": scores()},
    "channels.dropped_fraction": lambda: {"drop": drop()},
    "channels.drop_lowest": lambda: {
        "groups": groups(),
        "scores": channel_scores(),
        "sparsity": 0.5,
    },
    "narrowing.narrow_like": lambda: {
        "trace": trace(),
        "tree": optax.adam(0.1).init(params()),
        "drop": drop(),
    },
    "trace": lambda: {"apply_fn": apply_fn, "params": params(), "*": (batch(),)},
    "tracing.retrace": lambda: {
        "trace_": trace(),
        "params": params(),
        "inputs": (batch(),),
    },
    "contrib.cric": lambda: {
        "loss_fn": loss_fn,
        "params": params(),
        "groups": groups(),
        "batches": [batch()],
        "sparsity": 0.5,
        "optimizer": optax.sgd(0.1),
        "steps": 1,
    },
    "enforce": lambda: {"tx": optax.chain(schedule(), optax.sgd(0.1))},
    "penalties.group_lasso": lambda: {"groups": groups(), "strength": 0.1},
    "penalties.group_norm_decay": lambda: {"groups": groups(), "strength": 0.1},
    "penalties.prox_group_lasso": lambda: {"groups": groups(), "strength": 0.1},
    "penalties.growing_regularization": lambda: {
        "groups": groups(),
        "increment": 0.1,
        "every": 2,
    },
    "penalties.dropped": lambda: {"opt_state": hesso()},
    "penalties.hesso": lambda: {
        "optimizer": optax.sgd(0.1),
        "groups": groups(),
        "sparsity": 0.5,
        "begin": 0,
        "periods": 1,
        "duration": 2,
    },
    "keep_sparse": lambda: {"masks": masks()},
    "transforms.mfac": lambda: {"learning_rate": 0.1, "window": 2},
    "transforms.scale_by_mfac": lambda: {"window": 2, "damping": 1e-3},
    "apply_updates": lambda: {
        "params": params(),
        "updates": grads(),
        "opt_state": opt_state(),
    },
    "init_sparse": lambda: {"tx": optimizer(), "params": params()},
    "prune_schedule": lambda: {
        "sparsity": js.schedules.polynomial(final=0.5, begin=0, end=8),
        "every": 2,
    },
    "assert_sparse": lambda: {"opt_state": opt_state(), "params": params()},
    "transforms.find_states": lambda: {"opt_state": opt_state()},
    "masks_of": lambda: {"opt_state": opt_state()},
    "straight_through": lambda: {"params": params(), "sparsity": 0.5},
    "contrib.wgsef_prox": lambda: {
        "groups": groups(),
        "sparsity": 0.5,
        "strength": 0.1,
    },
    "transforms.rigl": moving,
    "transforms.set_": moving,
    "transforms.snfs": lambda: {**moving(), "decay": 0.5},
    "transforms.static": lambda: {"sparsity": 0.5, "key": jax.random.key(0)},
    "transforms.drop_and_grow": lambda: {
        **moving(),
        "grow": js.scores.taylor,
        "drop_fraction": 0.5,
    },
    "transforms.explored": lambda: {"opt_state": explored_state()},
    "masking.cram": lambda: {"loss_fn": loss_fn, "sparsities": (0.5,), "rho": 0.1},
    "masking.init_scores": lambda: {"params": params()},
    "masking.masked_by_scores": lambda: {
        "params": params(),
        "scores": js.masking.init_scores(params()),
        "sparsity": 0.5,
    },
    "masking.soft_threshold": lambda: {
        "params": params(),
        "thresholds": {"up": {"kernel": draw(9, ())}},
    },
    "masking.init_mask_logits": lambda: {
        "params": params(),
        "pattern": js.NM(2, 4),
        "key": jax.random.key(0),
    },
    "masking.masked_by_logits": lambda: {
        "params": params(),
        "logits": mask_logits(),
        "pattern": js.NM(2, 4),
        "key": jax.random.key(0),
    },
    "masking.masks_of_logits": lambda: {
        "logits": mask_logits(),
        "params": params(),
        "pattern": js.NM(2, 4),
    },
    "calibration.batch_statistics": lambda: {
        "update": lambda stats, x: jax.tree.map(
            lambda s: 0.5 * s + 0.5 * x.mean(), stats
        ),
        "stats": {"up": np.zeros(2, np.float32)},
        "batches": [np.ones((4, 8), np.float32)],
    },
    "recipes.lottery_tickets": lambda: {
        "train": lambda params, masks, round: params,
        "params": params(),
        "rounds": 1,
        "rewind_to": params(),
        "fraction": 0.5,
    },
    "masking.init_adapters": lambda: {
        "params": params(),
        "key": jax.random.key(0),
        "rank": 2,
    },
    "masking.with_adapters": lambda: {"params": params(), "adapters": adapters()},
    "masking.adapter_importance": lambda: {
        "params": params(),
        "adapters": adapters(),
        "grads": adapters(),
    },
    "masking.bip": lambda: {"loss_fn": loss_fn, "sparsity": 0.5},
    "masking.init_low_rank": lambda: {
        "params": params(),
        "key": jax.random.key(0),
        "rank": 2,
    },
    "masking.masked_by_low_rank": lambda: {
        "params": params(),
        "factors": js.masking.init_low_rank(
            params(), key=jax.random.key(0), rank=2, where=r"up/kernel"
        ),
        "sparsity": 0.5,
    },
    "transforms.soft_shrink": lambda: {"sparsity": 0.5},
    "transforms.acdc": lambda: {
        "sparsity": 0.5,
        "begin": 1,
        "end": 6,
        "sparse": 2,
        "dense": 1,
    },
    "exchange.top_k": lambda: {"fraction": 0.1, "axis_name": "data", "workers": 2},
    "exchange.dgc": lambda: {"fraction": 0.1, "axis_name": "data", "workers": 2},
    "exchange.ef21": lambda: {"fraction": 0.1, "axis_name": "data", "workers": 2},
    "exchange.specs": lambda: {"opt_state": opt_state(), "axis_name": "data"},
    "exchange.largest": lambda: {"x": matrix(), "count": 3},
    "transforms.frugal": lambda: {
        "optimizer": optax.scale_by_adam(),
        "rest": optax.scale_by_sign(),
        "density": 0.5,
        "every": 2,
        "key": key(),
        "unit": -1,
    },
    "losses.jensen_shannon": lambda: {
        "student_logits": rows(2, 3),
        "teacher_logits": rows(2, 3),
    },
    "losses.square_head": lambda: {
        "student": [rows(2, 3, 4)],
        "teacher": [rows(2, 3, 4) + 1],
        "mask": np.ones((2, 3), bool),
        "eps": 0.1,
    },
    "recipes.gmp_star": lambda: {"steps_per_epoch": 100, "cuts": 7},
    "zeroth_order.coordinate_grads": lambda: {
        "loss_fn": loss_fn,
        "params": params(),
        "batch": batch(),
        "indices": of_shapes(lambda shape: np.array([0, 2], np.int32)),
        "mu": 5e-3,
    },
    "zeroth_order.random_grads": lambda: {
        "loss_fn": loss_fn,
        "params": params(),
        "batch": batch(),
        "key": key(),
        "count": 2,
        "mu": 5e-3,
    },
    "zeroth_order.grasp": lambda: {
        "loss_fn": loss_fn,
        "params": params(),
        "batch": batch(),
        "key": key(),
        "count": 2,
        "mu": 5e-3,
    },
    "contrib.guidance": lambda: {"params": params(), "clients": [params(), grads()]},
    "contrib.guidance_masks": lambda: {
        "scores": scores(),
        "threshold": 0.3,
        "axis": -1,
        "where": "kernel$",
    },
    "contrib.paser": lambda: {
        "embeddings": rows(6, 3),
        "divergences": np.arange(6.0),
        "costs": np.full(6, 9.0),
        "budget": 2,
        "clusters": 2,
        "key": key(),
        "concepts": ["ab", "c", "d", "e", "f", "g"],
    },
    "contrib.self_distilled": lambda: {
        "prompts": ["a", "b"],
        "targets": ["a", "b"],
        "generate": lambda prompts, targets: prompts,
        "check": lambda answer, target: answer == target,
    },
    "transforms.windowed_obs": lambda: {"window": 2, "damping": 1e-3},
    "tree.default_axes": lambda: {
        "path": "up/kernel",
        "leaf": params()["up"]["kernel"],
    },
    "tree.kernel_axes": lambda: {
        "path": "up/kernel",
        "leaf": params()["up"]["kernel"],
        "stated": {},
    },
    "tree.resolve_axes": lambda: {"params": params(), "axes": {"kernel": AXES}},
    "tree.default_where": lambda: {
        "path": "up/kernel",
        "leaf": params()["up"]["kernel"],
    },
    "tree.why_dense": lambda: {"path": "up/kernel", "leaf": params()["up"]["kernel"]},
    "tree.has_plain_name": lambda: {"path": "up/kernel"},
    "tree.leaves_with_paths": lambda: {"tree": params()},
    "tree.map_with_path": lambda: {"f": lambda path, x: path, "tree": params()},
    "tree.path_str": lambda: {"key_path": (jax.tree_util.DictKey("up"),)},
    "tree.keys_like": lambda: {"key": key(), "tree": params()},
    "tree.nearest": lambda: {
        "wanted": "up/kernal",
        "paths": ["up/kernel", "down/bias"],
    },
    "tree.select": lambda: {"params": params(), "where": "kernel$"},
    "tree.unwrap_variables": lambda: {"tree": params()},
    "tree.from_matrices": lambda: {
        "matrices": rows(16, 8),
        "view": js.tree.matrix_view((8, 16), AXES),
    },
    "tree.matrix_view": lambda: {"shape": (8, 16), "axes": AXES},
    "tree.to_matrices": lambda: {
        "w": rows(8, 16),
        "view": js.tree.matrix_view((8, 16), AXES),
    },
    "report.layer_table": lambda: {"info": {}},
    "report.mean_of_known": lambda: {"errors": np.array([0.5, np.nan])},
    "report.table": lambda: {"params": params(), "masks": masks()},
    "report.plot": lambda: {"table_or_tables": table()},
    "report.plot_errors": lambda: {"info": layer_info()},
    "report.plot_sensitivity": lambda: {"sensitivity": sensitivity()},
    "report.plot_sparsity": lambda: {"history": {0: {"up": 0.0}, 9: {"up": 0.5}}},
    "report.plot_tradeoff": lambda: {"runs": {"a": ([0], [1])}, "xlabel": "sparsity"},
    "report.plot_weights": lambda: {"before": params(), "after": params()},
    "report.progress": lambda: {"iterable": [1, 2]},
    "channels.scale_channels": lambda: {
        "groups": groups(),
        "params": params(),
        "gates": channel_gates(),
    },
    "channels.drop_closed": lambda: {"gates": channel_gates()},
    "narrowing.flops_share": lambda: {"trace": trace(), "gates": channel_gates()},
    "masking.init_width_logits": lambda: {
        "groups": groups(),
        "candidates": 4,
        "whole": 0.9,
    },
    "masking.width_gates": lambda: {
        "groups": groups(),
        "logits": width_logits(),
        "candidates": 4,
        "temperature": 1.0,
        "scores": channel_scores(),
    },
    "masking.soft_to_hard": lambda: {
        "apply_fn": apply_fn,
        "groups": groups(),
        "params": params(),
        "gates": both_gates(),
        "*": (batch(),),
    },
    "contrib.init_thresholds": lambda: {"groups": groups()},
    "contrib.threshold_gates": lambda: {
        "scores": channel_scores(),
        "thresholds": js.contrib.init_thresholds(groups()),
        "temperature": 0.1,
    },
    "contrib.init_hybrid": lambda: {"width": 8, "key": jax.random.key(0), "rank": 2},
    "contrib.hybrid": lambda: {
        "module": hybrid(),
        "x": batch(),
        "gate": np.ones(8, np.float32),
    },
    "contrib.hybrid_gate": lambda: {
        "mask": np.zeros(8, np.float32),
        "step": 3,
        "total_steps": 100,
        "frozen_from": 0.8,
    },
    "contrib.hybrid_loss": lambda: {
        "mask": np.zeros(8, np.float32),
        "modules": [hybrid(), hybrid()],
        "width": 4,
    },
    "contrib.fold_hybrid": lambda: {
        "module": hybrid(),
        "kernel": rows(16, 8),
        "gate": np.ones(8, np.float32),
    },
    "contrib.dead_neurons": lambda: {
        "trace": trace(),
        "params": params(),
        "batches": [batch()],
    },
    "contrib.activation_gains": lambda: {
        "trace": trace(),
        "params": params(),
        "batches": [batch()],
    },
    "contrib.activate": lambda: {
        "scores": scores(),
        "gains": grads(),
        "sparsity": 0.5,
        "pool": 0.1,
    },
    "adaptive.mass_targets": lambda: {"maps": rows(2, 3, 8), "mass": 0.9},
    "adaptive.init_filter_predictor": lambda: {
        "channels": 8,
        "filters": 4,
        "key": jax.random.key(0),
    },
    "adaptive.filter_logits": lambda: {
        "predictor": predictor(),
        "maps": rows(2, 3, 8),
        "pool": "max",
        "decoupled": True,
    },
    "adaptive.filter_gates": lambda: {"logits": rows(2, 4)},
    "adaptive.choose_exit": lambda: {
        "logits": [rows(2, 3), rows(2, 3)],
        "threshold": 0.9,
    },
    "adaptive.run_until_confident": lambda: {
        "stages": [lambda h: (h, h), lambda h: (h, 2 * h)],
        "x": rows(1, 3),
        "threshold": 0.9,
    },
    "adaptive.exit_threshold": lambda: {
        "logits": [rows(2, 3), rows(2, 3)],
        "costs": [1.0, 2.0],
        "budget": 1.5,
    },
}
