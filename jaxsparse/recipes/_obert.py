"""oBERT's trainings: what to prune, when, how far, and how fast to learn meanwhile."""

from typing import Any

from jaxsparse.patterns import Balanced, Block, Pattern, Unstructured
from jaxsparse.recipes._recipe import Recipe
from jaxsparse.recipes._rewinding import check_training, gradual


def obert_downstream(
    steps_per_epoch: int,
    *,
    final: float = 0.9,
    init: float = 0.7,
    epochs: float = 30,
    learning_rate: tuple[float, float] | None = None,
    pattern: Pattern = Unstructured(scope="global"),
) -> Recipe:
    """Return oBERT's recipe for gradual pruning while BERT learns a task.

    The recipe of the Optimal BERT Surgeon (Kurtic et al., 2022, arXiv:2203.07259,
    section 4.1 and appendix A.5) for 30 epochs: 2 epochs dense; then a cut every 4
    epochs, at 2, 6, ..., 26, the first to `init`, the rest along a cubic curve to
    `final`; 4 epochs of recovery. At each cut the learning rate is rewound to its peak.
    The student learns from its dense, fine-tuned teacher alone. The recipe prunes the
    linear layers of the blocks, in one ranking over all of them; embeddings, pooler,
    head, norms and biases stay dense.

    `epochs=10` is the paper's shorter training, which is not a scaled version of the
    longer one: 2 epochs dense, then two cuts per epoch, 13 from epoch 2 to 8, then 2
    epochs of recovery. The learning rate is rewound once, at epoch 8, and falls less
    far. Any other length scales the training of 30 epochs.

    The paper's score is that of the Optimal Brain Surgeon, and so is that of
    `recipe.optimizer()`: `js.transforms.windowed_obs` with the recipe's settings and
    `summed=True`, whose blocks of 50 are 4.3 GB for 10.6 million weights and 35 GB for
    the 85 million in the blocks of BERT-base (the 1,024 gradients themselves would be
    43 and 348 GB). Each gradient is that of a training step's batch, where the paper
    averages `examples_per_gradient`. `jaxsparse.recipes.gmp_star` is gradual magnitude
    pruning on the same schedules.

    The paper has other settings for GLUE (`learning_rate=(5e-5, 5e-6)`, in 10 epochs
    `(8e-5, 2e-5)`, and 16 examples per gradient), for students of 3 and 6 layers
    (`init=0.3`) and for the 4-block pattern, four weights along the inputs of a kernel
    `(in, out)` (`pattern=js.Block((4, 1), scope="global")`). Batches had 16 examples
    (SQuAD) and 32 (GLUE).

    Differs from SparseML's recipes: a cut between two steps is done in the nearest
    step, not in the next. The training of 10 epochs was not published as a recipe. Two
    points are our reading of table 9: its last cut is at epoch 8, and the learning rate
    falls from the first number to the second before and after it.

    Args:
      steps_per_epoch: optimizer steps in an epoch.
      final: the sparsity in the end.
      init: the sparsity after the first cut. A large one leaves more time to recover
        from the late ones.
      epochs: the length of the training.
      learning_rate: its peak and its end; those for SQuAD if left out, `(8e-5, 8e-6)`,
        in 10 epochs `(8e-5, 3e-5)`.
      pattern: unstructured or blocks, with the scope `"global"`. For blocks the Fisher
        has blocks of 32 weights, which 4 divides, otherwise of 50.

    Returns:
      A `Recipe`.

    Raises:
      TypeError: steps that are no integer.
      ValueError: a sparsity outside [0, 1), `final < init`, so few steps that two cuts
        fall into one.

    Example:
      >>> import optax, jaxsparse as js
      >>> recipe = js.recipes.obert_downstream(100, final=0.9)
      >>> recipe.every.steps
      (200, 600, 1000, 1400, 1800, 2200, 2600)
      >>> [round(float(recipe.sparsity(t)), 3) for t in (0, *recipe.every.steps)]
      [0.0, 0.7, 0.784, 0.841, 0.875, 0.893, 0.899, 0.9]
      >>> tx = recipe.optimizer()  # prunes by second order, AdamW
      >>> def loss_fn(student_logits, teacher_logits):
      ...     return recipe.loss(student_logits, teacher_logits).mean()
    """
    check_training(steps_per_epoch, epochs, init, final, pattern)
    if epochs == 10:
        cuts = [2 + k / 2 for k in range(13)]
        rewinds, rates = [8.0], (8e-5, 3e-5)
    else:
        cuts = [epochs * (2 + 4 * k) / 30 for k in range(7)]
        rewinds, rates = cuts, (8e-5, 8e-6)
    return gradual(
        *(steps_per_epoch, epochs, cuts, rewinds),
        sparsities=(init, final),
        learning_rate=rates if learning_rate is None else learning_rate,
        pattern=pattern,
        weight_decay=0.0,
        temperature=2.0,
        **_fisher(pattern, examples_per_gradient=8),
    )


def obert_upstream(
    steps_per_epoch: int,
    *,
    final: float = 0.9,
    init: float = 0.7,
    epochs: float = 3,
    learning_rate: tuple[float, float] = (5e-4, 5e-6),
    pattern: Pattern = Unstructured(scope="global"),
) -> Recipe:
    """Return oBERT's recipe for gradual pruning while BERT is pre-trained.

    The upstream recipe of the Optimal BERT Surgeon (Kurtic et al., 2022,
    arXiv:2203.07259, section 4.2 and appendix A.6): 3 epochs of masked language
    modeling with a dense teacher, from a dense, pre-trained student; a cut and a
    rewound learning rate every quarter of an epoch, 12 from the first step to 2.75
    epochs. Other lengths are scaled. The batch size was 256.

    Afterwards a task is learned with the masks as they are: in the paper 8 epochs with
    `js.keep_sparse(masks)`, a learning rate that falls linearly from 1.5e-4 to 1.5e-6,
    and distillation at temperature 5.5, hardness 1.

    The paper's table 10 has a rewind every half epoch; its section 4.2 and the recipes
    published with SparseML rewind at each cut, and so does this one.

    The first cut is in step 0. With a score that needs no gradients,
    `jaxsparse.init_sparse` makes this cut before the first step.

    Args:
      steps_per_epoch: optimizer steps in an epoch.
      final: the sparsity in the end.
      init: the sparsity after the first cut.
      epochs: the length of the training.
      learning_rate: its peak and its end.
      pattern: as for `obert_downstream`.

    Returns:
      A `Recipe`.

    Raises:
      TypeError: steps that are no integer.
      ValueError: a sparsity outside [0, 1), `final < init`, so few steps that two cuts
        fall into one.

    Example:
      >>> import jaxsparse as js
      >>> recipe = js.recipes.obert_upstream(1000, final=0.97)
      >>> recipe.every.steps[:3], recipe.every.last(), recipe.total_steps
      ((0, 250, 500), 2750, 3000)
      >>> recipe.temperature, recipe.hardness, recipe.examples_per_gradient
      (5.5, 1.0, 16)
    """
    check_training(steps_per_epoch, epochs, init, final, pattern)
    cuts = [epochs * k / 12 for k in range(12)]
    return gradual(
        *(steps_per_epoch, epochs, cuts, cuts),
        sparsities=(init, final),
        learning_rate=learning_rate,
        pattern=pattern,
        weight_decay=0.01,
        temperature=5.5,
        **_fisher(pattern, examples_per_gradient=16),
    )


def _fisher(pattern: Pattern, *, examples_per_gradient: int) -> dict[str, Any]:
    """The settings of the score."""
    return {
        "block_size": 32 if isinstance(pattern, Block | Balanced) else 50,
        "damping": 1e-7,
        "gradients": 1024,
        "examples_per_gradient": examples_per_gradient,
    }
