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
def inverse_diagonal():
    return jax.tree.map(lambda g: abs(g[0]) + 1, example_grads())


@functools.cache
def masks():
    full = lambda shape: jax.device_put(np.indices(shape).sum(0) % 2 == 0)
    one = lambda shape: full(shape) if len(shape) > 1 else jax.device_put(np.array(True))
    return of_shapes(one)


def sparsities():
    return of_shapes(lambda shape: 0.5 if len(shape) > 1 else 0.0)


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
    return js.structured.groups(trace()).prunable


@functools.cache
def name():
    (found,) = groups()
    return found


def channel_scores():
    return {name(): draw(4, (16,)) ** 2}


def drop():
    return js.structured.Drop({name(): np.array([1, 3])}, {name(): 16})


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


@functools.cache
def hesso():
    tx = js.transforms.hesso(
        optax.sgd(0.1), groups(), sparsity=0.5, begin=0, periods=1, duration=2
    )
    return tx.init(params())


def experts():
    return {"up": draw(7, (4, 3, 8)), "down": draw(8, (4, 8, 3))}


@functools.cache
def atomic():
    return js.structured.atomic_init((4,), 8)


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
    "allocations.ecoflap": lambda: dict(
        loss_fn=loss_fn, params=params(), batches=[batch()], sparsity=0.5, key=key()
    ),
    "allocations.global_": lambda: dict(scores=scores(), sparsity=0.5),
    "allocations.round_to_weights": lambda: dict(
        params=params(), sparsities=sparsities()
    ),
    "allocations.erk": lambda: dict(params=params(), sparsity=0.5),
    "allocations.uniform": lambda: dict(params=params(), sparsity=0.5),
    "allocations.als": lambda: dict(
        params=params(),
        redundancy={"up/kernel": 0.1, "down/kernel": 0.2},
        sparsity=0.5,
        lower=0.3,
        upper=0.7,
    ),
    "allocations.arithmetic_progression": lambda: dict(
        params=params(), sparsity=0.5, difference=0.1
    ),
    "allocations.dsa": lambda: dict(scores=scores(), sparsity=0.5),
    "allocations.owl": lambda: dict(scores=scores(), sparsity=0.5),
    "allocations.evolve": lambda: dict(
        fitness=lambda levels, batch: levels["a"] ** 2,
        sizes={"a": 64, "b": 64},
        sparsity=0.5,
        batches=[0],
        key=key(),
        levels=2,
        step=4,
        generations=1,
        offspring=2,
        stages=((1, 1),),
    ),
    "allocations.level_sparsities": lambda: dict(
        sizes={"a": 64, "b": 64}, sparsity=0.5, levels=2, step=4
    ),
    "calibration.run": lambda: dict(trace=trace(), params=params(), batches=[batch()]),
    "calibration.finalize": lambda: dict(state=running()),
    "calibration.gradient_norms": lambda: dict(grads=example_grads(), order=1),
    "calibration.init": lambda: dict(batch=(), d_in=8, gram=True),
    "calibration.merge": lambda: dict(a=running(), b=running()),
    "calibration.unseen": lambda: dict(stats=stats()),
    "calibration.update": lambda: dict(state=running(), x=batch()),
    "curvature.greedy_scores": lambda: dict(fisher=fisher(), params=params()),
    "curvature.group_scores": lambda: dict(
        fisher=js.curvature.block_fisher(
            example_grads(),
            block_size=8,
            damping=1e-2,
            pattern=js.Block((4, 1)),
            axes=AXES,
        ),
        params=params(),
    ),
    "curvature.inverse_blocks": lambda: dict(fisher=fisher()),
    "curvature.block_estimator": lambda: dict(block_size=8),
    "curvature.block_fisher": lambda: dict(
        grads=example_grads(), block_size=8, damping=1e-2
    ),
    "curvature.diagonal_estimator": lambda: dict(where="kernel$"),
    "curvature.diagonal_fisher": lambda: dict(grads=example_grads(), damping=1e-2),
    "curvature.check_covers": lambda: dict(fisher=fisher(), path="up/kernel"),
    "curvature.damped_inverse": lambda: dict(factor=factor()),
    "curvature.factor_gram": lambda: dict(gram=gram(), rel_damping=0.01),
    "curvature.inverse_upper": lambda: dict(factor=factor()),
    "curvature.kronecker_estimator": lambda: dict(axes=AXES),
    "curvature.kronecker_fisher": lambda: dict(
        grads=example_grads(), damping=1e-2, axes=AXES
    ),
    "curvature.mfac": lambda: dict(grads=example_grads(), damping=1e-2),
    "curvature.span_ihvp": lambda: dict(
        fisher=full_fisher(), coefficients=rows(EXAMPLES)
    ),
    "curvature.window_init": lambda: dict(params=params(), window=2, damping=1e-2),
    "curvature.window_ihvp": lambda: dict(state=window(), tree=grads()),
    "curvature.window_mask": lambda: dict(state=window(), masks=masks()),
    "curvature.window_update": lambda: dict(state=window(), grads=grads()),
    "curvature.window_update_ihvp": lambda: dict(state=window(), grads=grads()),
    "curvature.eliminate": lambda: dict(
        fisher=fisher(), params=params(), removed=of_shapes(lambda s: np.zeros(s, bool))
    ),
    "curvature.ihvp": lambda: dict(fisher=fisher(), tree=grads()),
    "curvature.inverse_diagonal": lambda: dict(fisher=fisher()),
    "curvature.restrict": lambda: dict(fisher=fisher(), masks=masks()),
    "curvature.collect_grads": lambda: dict(stream=[example_grads()], count=EXAMPLES),
    "curvature.per_example_grads": lambda: dict(
        loss_fn=loss_fn, params=params(), batch=batch()
    ),
    "curvature.stream_grads": lambda: dict(
        loss_fn=loss_fn, params=params(), batches=[batch()]
    ),
    "curvature.check_one_damping": lambda: dict(damping=1e-2, rel_damping=None),
    "losses.distill": lambda: dict(
        student_logits=rows(2, 3),
        teacher_logits=rows(2, 3),
        temperature=2.0,
        hardness=1.0,
    ),
    "oneshot.channel_errors": lambda: dict(
        groups=groups(), params=params(), stats=stats()
    ),
    "oneshot.greedy_channels": lambda: dict(
        groups=groups(), params=params(), stats=stats(), sparsity=0.5
    ),
    "oneshot.refit_channels": lambda: dict(
        groups=groups(), params=params(), stats=stats(), drop=drop()
    ),
    "oneshot.layerwise": lambda: dict(
        apply_fn=apply_fn, params=params(), batches=[batch()], sparsity=0.5
    ),
    "prune": lambda: dict(params=params(), sparsity=0.5),
    "patterns.removed_count": lambda: dict(sparsity=0.5, n=8),
    "patterns.apply": lambda: dict(params=params(), masks=masks()),
    "patterns.check_masks": lambda: dict(masks=masks(), params=params()),
    "patterns.kept_count": lambda: dict(mask=masks()["up"]["kernel"], shape=(8, 16)),
    "patterns.pack": lambda: dict(masks=masks()),
    "patterns.unpack": lambda: dict(packed=js.patterns.pack(masks())),
    "patterns.masks": lambda: dict(scores=scores(), sparsity=0.5),
    "patterns.sparsity_of": lambda: dict(masks=masks(), params=params()),
    "patterns.verify": lambda: dict(
        masks=masks(), params=params(), pattern=js.NM(2, 4), axes=AXES
    ),
    "NM": lambda: dict(keep=2, of=4),
    "Block": lambda: dict(shape=(4, 4), reduce="mean", scope="layer"),
    "Channel": lambda: dict(axis=-1, reduce="mean", scope="layer"),
    "Unstructured": lambda: dict(scope="layer"),
    "Axes": lambda: dict(input=(0,), output=(1,), batch=()),
    "recipes.obert_downstream": lambda: dict(steps_per_epoch=100),
    "recipes.obert_upstream": lambda: dict(steps_per_epoch=100),
    "schedules.at": lambda: {"*": (1, 2)},
    "schedules.every": lambda: dict(interval=2, begin=0, end=9),
    "schedules.rewinding": lambda: dict(peak=1e-2, end=1e-3, at=[2, 4], total_steps=8),
    "schedules.alternating": lambda: dict(
        sparsity=0.5, begin=0, end=8, sparse=2, dense=2
    ),
    "schedules.constant": lambda: dict(sparsity=0.5),
    "schedules.one_shot": lambda: dict(sparsity=0.5, step=3),
    "schedules.polynomial": lambda: dict(final=0.5, begin=0, end=8),
    "scores.bias_compensation": lambda: dict(
        w=matrix(), mean=rows(8), kept=np.arange(8) > 3
    ),
    "scores.flap": lambda: dict(params=params(), stats=stats()),
    "scores.gblm": lambda: dict(params=params(), stats=stats(), gradients=scores()),
    "scores.gradient_norm": lambda: dict(params=params(), gradients=scores()),
    "scores.wanda": lambda: dict(params=params(), stats=stats()),
    "scores.grasp": lambda: dict(loss_fn=loss_fn, params=params(), batch=batch()),
    "scores.snip": lambda: dict(params=params(), grads=grads()),
    "scores.taylor": lambda: dict(params=params(), grads=grads()),
    "scores.magnitude": lambda: dict(params=params()),
    "scores.random": lambda: dict(params=params(), key=key()),
    "scores.obd": lambda: dict(params=params(), diagonal=inverse_diagonal()),
    "scores.obs": lambda: dict(params=params(), inverse_diagonal=inverse_diagonal()),
    "scores.as_score": lambda: dict(score=js.scores.taylor),
    "scores.moving_average": lambda: dict(score=js.scores.taylor, decay=0.9),
    "scores.synflow": lambda: dict(
        apply_fn=apply_fn, params=params(), inputs=batch()
    ),
    "solvers.admm": lambda: dict(w=matrix(), gram=gram(), sparsity=0.5, iterations=1),
    "solvers.alps": lambda: dict(w=matrix(), gram=gram(), sparsity=0.5, iterations=1),
    "solvers.channel_errors": lambda: dict(w=matrix(), gram=gram()),
    "solvers.refit_channels": lambda: dict(
        w=matrix(), gram=gram(), keep=np.arange(8) > 3
    ),
    "solvers.remove_channels": lambda: dict(w=matrix(), gram=gram(), sparsity=0.5),
    "solvers.sparsegpt": lambda: dict(w=matrix(), gram=gram(), sparsity=0.5),
    "solvers.exact_obs": lambda: dict(w=matrix(), gram=gram(), sparsity=0.5),
    "solvers.magnitude": lambda: dict(w=matrix(), gram=gram(), sparsity=0.5),
    "solvers.wanda": lambda: dict(w=matrix(), gram=gram(), sparsity=0.5),
    "solvers.obs": lambda: dict(params=params(), fisher=fisher(), sparsity=0.5),
    "solvers.refit": lambda: dict(
        w=matrix(), mask=np.asarray(matrix()) > 0, gram=gram()
    ),
    "structured.atomic_init": lambda: dict(batch=(4,), size=8),
    "structured.atomic_merge": lambda: dict(a=atomic(), b=atomic()),
    "structured.atomic_scores": lambda: dict(sums=atomic()),
    "structured.atomic_update": lambda: dict(
        sums=atomic(), x=rows(4, 2, 8), g=rows(4, 2, 3), down=rows(4, 8, 3)
    ),
    "structured.atomic_update_ragged": lambda: dict(
        sums=atomic(),
        x=rows(4, 8),
        g=rows(4, 3),
        down=rows(4, 8, 3),
        group_sizes=np.array([1, 1, 1, 1], np.int32),
    ),
    "structured.blocks": lambda: dict(trace=of_residual()),
    "structured.select_to": lambda: dict(
        groups=groups(),
        scores=channel_scores(),
        cost=js.structured.dropped_fraction,
        budget=1.0,
    ),
    "structured.bn_scale": lambda: dict(groups=groups(), params=params(), where="."),
    "structured.fpgm": lambda: dict(groups=groups(), params=params()),
    "structured.gate_scores": lambda: dict(
        groups=groups(), loss_fn=loss_fn, params=params(), batch=batch()
    ),
    "structured.cluster_experts": lambda: dict(
        distances=abs(np.arange(4.0)[:, None] - np.arange(4.0)), clusters=2
    ),
    "structured.expert_distances": lambda: dict(router=rows(4, 8)),
    "structured.medoids": lambda: dict(experts=experts(), labels=LABELS),
    "structured.merge_clusters": lambda: dict(
        experts=experts(), router=rows(4, 8), labels=LABELS
    ),
    "structured.cost": lambda: dict(trace=trace(), drop=drop()),
    "structured.knapsack": lambda: dict(
        losses={"a": 1.0, "b": 2.0}, sizes={"a": 10, "b": 20}, at_least=10
    ),
    "structured.nm_gates": lambda: dict(
        logits=rows(2, 2), key=key(), keep=1, of=2, temperature=1.0
    ),
    "structured.nm_options": lambda: dict(keep=1, of=2),
    "structured.zero_indices": lambda: dict(params=params(), groups=groups()),
    "structured.flap": lambda: dict(groups=groups(), params=params(), stats=stats()),
    "structured.flap_compensation": lambda: dict(
        groups=groups(), params=params(), stats=stats(), drop=drop()
    ),
    "structured.gate_penalty": lambda: dict(
        gates={"a": jnp.ones(()), "b": jnp.ones(())},
        costs={"a": 1.0, "b": 2.0},
        budget=0.5,
    ),
    "structured.gated": lambda: dict(trace=of_residual()),
    "structured.group_experts": lambda: dict(
        usage=np.arange(4.0), similarity=np.eye(4), groups=2
    ),
    "structured.router_similarity": lambda: dict(logits=rows(6, 4)),
    "structured.groups": lambda: dict(trace=trace()),
    "structured.block_similarity": lambda: dict(
        trace=of_residual(), params=blocks(), batches=[batch()]
    ),
    "structured.output_losses": lambda: dict(
        trace=of_residual(), params=blocks(), batches=[batch()]
    ),
    "structured.align_experts": lambda: dict(
        experts=experts(), to=np.array([0, 0, 2, 2]), hidden={"up": 2, "down": 1}
    ),
    "structured.merge_experts": lambda: dict(experts=experts(), labels=LABELS),
    "structured.merge_gates": lambda: dict(gates=rows(2, 4), labels=LABELS),
    "structured.masks": lambda: dict(trace=trace(), drop=drop()),
    "structured.narrow": lambda: dict(trace=trace(), params=params(), drop=drop()),
    "structured.widen": lambda: dict(
        trace=trace(),
        params=js.structured.narrow(trace(), params(), drop()).params,
        drop=drop(),
    ),
    "structured.lamp": lambda: dict(scores=channel_scores()),
    "structured.normalize_max": lambda: dict(scores=channel_scores()),
    "structured.normalize_mean": lambda: dict(scores=channel_scores()),
    "structured.normalize_norm": lambda: dict(scores=channel_scores()),
    "structured.normalize_range": lambda: dict(scores=channel_scores()),
    "structured.standardize": lambda: dict(scores=channel_scores()),
    "structured.per_parameter": lambda: dict(
        groups=groups(), scores=channel_scores(), params=params()
    ),
    "structured.remove_blocks": lambda: dict(
        trace=of_residual(), params=blocks(), names=["1"]
    ),
    "structured.share_blocks": lambda: dict(
        trace=of_residual(), params=blocks(), followers={"1": "0"}
    ),
    "structured.group_scores": lambda: dict(groups=groups(), scores=scores()),
    "structured.dropped_fraction": lambda: dict(drop=drop()),
    "structured.select": lambda: dict(
        groups=groups(), scores=channel_scores(), sparsity=0.5
    ),
    "structured.narrow_like": lambda: dict(
        trace=trace(), tree=optax.adam(0.1).init(params()), drop=drop()
    ),
    "trace": lambda: {"apply_fn": apply_fn, "params": params(), "*": (batch(),)},
    "tracing.retrace": lambda: dict(
        trace_=trace(), params=params(), inputs=(batch(),)
    ),
    "transforms.cric": lambda: dict(
        loss_fn=loss_fn,
        params=params(),
        groups=groups(),
        batches=[batch()],
        sparsity=0.5,
        optimizer=optax.sgd(0.1),
        steps=1,
    ),
    "enforce": lambda: dict(tx=optax.chain(schedule(), optax.sgd(0.1))),
    "transforms.group_lasso": lambda: dict(groups=groups(), strength=0.1),
    "transforms.group_norm_decay": lambda: dict(groups=groups(), strength=0.1),
    "transforms.prox_group_lasso": lambda: dict(groups=groups(), strength=0.1),
    "transforms.growing_regularization": lambda: dict(
        groups=groups(), increment=0.1, every=2
    ),
    "transforms.dropped": lambda: dict(opt_state=hesso()),
    "transforms.hesso": lambda: dict(
        optimizer=optax.sgd(0.1),
        groups=groups(),
        sparsity=0.5,
        begin=0,
        periods=1,
        duration=2,
    ),
    "keep_sparse": lambda: dict(masks=masks()),
    "transforms.mfac": lambda: dict(learning_rate=0.1, window=2),
    "transforms.scale_by_mfac": lambda: dict(window=2, damping=1e-3),
    "apply_updates": lambda: dict(
        params=params(), updates=grads(), opt_state=opt_state()
    ),
    "init_sparse": lambda: dict(tx=optimizer(), params=params()),
    "prune_schedule": lambda: dict(
        sparsity=js.schedules.polynomial(final=0.5, begin=0, end=8), every=2
    ),
    "check": lambda: dict(opt_state=opt_state(), params=params()),
    "transforms.find_states": lambda: dict(opt_state=opt_state()),
    "masks_of": lambda: dict(opt_state=opt_state()),
    "straight_through": lambda: dict(params=params(), sparsity=0.5),
    "transforms.wgsef_prox": lambda: dict(
        groups=groups(), sparsity=0.5, strength=0.1
    ),
    "transforms.windowed_obs": lambda: dict(window=2, damping=1e-3),
    "tree.default_axes": lambda: dict(path="up/kernel", leaf=params()["up"]["kernel"]),
    "tree.kernel_axes": lambda: dict(
        path="up/kernel", leaf=params()["up"]["kernel"], stated={}
    ),
    "tree.resolve_axes": lambda: dict(params=params(), axes={"kernel": AXES}),
    "tree.default_where": lambda: dict(path="up/kernel", leaf=params()["up"]["kernel"]),
    "tree.why_dense": lambda: dict(path="up/kernel", leaf=params()["up"]["kernel"]),
    "tree.has_plain_name": lambda: dict(path="up/kernel"),
    "tree.leaves_with_paths": lambda: dict(tree=params()),
    "tree.map_with_path": lambda: {"f": lambda path, x: path, "tree": params()},
    "tree.path_str": lambda: dict(key_path=(jax.tree_util.DictKey("up"),)),
    "tree.keys_like": lambda: dict(key=key(), tree=params()),
    "tree.nearest": lambda: dict(wanted="up/kernal", paths=["up/kernel", "down/bias"]),
    "tree.select": lambda: dict(params=params(), where="kernel$"),
    "tree.unwrap_variables": lambda: dict(tree=params()),
    "tree.from_matrices": lambda: dict(
        matrices=rows(16, 8), view=js.tree.matrix_view((8, 16), AXES)
    ),
    "tree.matrix_view": lambda: dict(shape=(8, 16), axes=AXES),
    "tree.to_matrices": lambda: dict(
        w=rows(8, 16), view=js.tree.matrix_view((8, 16), AXES)
    ),
    "report.layer_table": lambda: dict(info={}),
    "report.mean_of_known": lambda: dict(errors=np.array([0.5, np.nan])),
    "report.table": lambda: dict(params=params(), masks=masks()),
    "report.plot": lambda: dict(table_or_tables=table()),
    "report.progress": lambda: dict(iterable=[1, 2]),
}
