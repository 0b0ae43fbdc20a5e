"""GMP*: gradual magnitude pruning of transformers, with oBERT's schedules."""

from jaxsparse import _checks
from jaxsparse._typing import Where
from jaxsparse.patterns import Pattern, Unstructured
from jaxsparse.recipes._recipe import Recipe
from jaxsparse.recipes._rewinding import BLOCK_KERNELS, check_training, gradual


def gmp_star(
    steps_per_epoch: int,
    *,
    final: float = 0.9,
    init: float = 0.7,
    epochs: float = 30,
    cuts: int = 7,
    learning_rate: tuple[float, float] = (8e-5, 8e-6),
    weight_decay: float = 0.0,
    temperature: float = 5.5,
    pattern: Pattern = Unstructured(scope="global"),
    where: Where = BLOCK_KERNELS,
) -> Recipe:
    """Return the recipe of well-tuned gradual magnitude pruning for a transformer.

    GMP* (Kurtic & Alistarh, 2022, arXiv:2210.06384) and the guidelines of Kurtic et al.
    (2023, arXiv:2312.13547), which make magnitude pruning work on the benchmark
    "Sparsity May Cry":

    - Prune the linear layers of the blocks alone, in one ranking over all of them.
      Embeddings, pooler, head, norms and biases stay dense; much of the failure that
      was reported came from pruning these too.
    - Couple the learning rate to the cuts: it falls in a line, and is rewound to its
      peak at each cut.
    - Let the first cut be large, `init`, and the others follow a cubic curve to
      `final`, so that most of the training repairs late and small cuts.
    - Learn from the dense, fine-tuned teacher alone, at a high temperature. Results
      depend on it as much as on the score: 5.5 here, 2.0 in `obert_downstream`.
    - Train longer for a higher sparsity, and recover at the end.

    Of 30 epochs 2 are dense, then come 7 cuts 4 epochs apart, from 2 to 26, and 4
    epochs of recovery; other lengths are scaled, and other numbers of cuts lie equally
    far apart between the same ends. Rates and times are those of oBERT's published
    recipe, which the papers share; tune the peak for each task.

    Score by second order with `jaxsparse.recipes.obert_downstream`, which is the same
    training.

    Args:
      steps_per_epoch: optimizer steps in an epoch.
      final: the sparsity in the end.
      init: the sparsity after the first cut.
      epochs: the length of the training.
      cuts: how many times to prune, at least 2.
      learning_rate: its peak and its end, in each cycle.
      weight_decay: the weight decay of AdamW.
      temperature: the temperature of the distillation.
      pattern: which weights are removed together, and which compete.
      where: which parameters are pruned; see `jaxsparse.tree.select`. By default
        kernels within numbered or stacked layers, by the names of Hugging Face's
        models, Linen, NNX and Equinox.

    Returns:
      A `Recipe` that scores by magnitude.

    Raises:
      TypeError: steps or cuts that are no integers.
      ValueError: a sparsity outside [0, 1), `final < init`, so few steps that two cuts
        fall into one.

    Example:
      >>> import jaxsparse as js
      >>> recipe = js.recipes.gmp_star(100, final=0.95)
      >>> recipe.every.steps
      (200, 600, 1000, 1400, 1800, 2200, 2600)
      >>> [round(float(recipe.sparsity(t)), 3) for t in (0, *recipe.every.steps)]
      [0.0, 0.7, 0.805, 0.876, 0.919, 0.941, 0.949, 0.95]
      >>> tx = recipe.optimizer()
      >>> def loss_fn(student_logits, teacher_logits):
      ...     return recipe.loss(student_logits, teacher_logits).mean()
    """
    check_training(steps_per_epoch, epochs, init, final, pattern)
    _checks.check_positive_int(cuts, name="cuts", least=2)
    _checks.check_number(least=0, weight_decay=weight_decay)
    _checks.check_number(above=0, temperature=temperature)
    _checks.check_where(where)
    times = [epochs * (2 + 24 * k / (cuts - 1)) / 30 for k in range(cuts)]
    return gradual(
        *(steps_per_epoch, epochs, times, times),
        sparsities=(init, final),
        learning_rate=learning_rate,
        pattern=pattern,
        weight_decay=weight_decay,
        temperature=temperature,
        where=where,
    )
