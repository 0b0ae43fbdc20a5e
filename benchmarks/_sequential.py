"""The sequential recursions of second-order pruning in torch, to be timed against.

Written from the formulas, and in the shape in which M-FAC (arXiv:2107.03356) and
SparseML (oBERT, arXiv:2203.07259) run them: one gradient after another, all blocks at
once, in place. `F = damping * I + G^T G / m`; everything keeps the dtype that it gets.
Call `torch.set_num_threads` before, and where torch and XLA share cores let neither
spin on more of them than there are. torch is needed by the benchmarks alone.
"""

from typing import NamedTuple

import torch

Tensor = torch.Tensor


# Block Fisher: an explicit inverse for each block, [nb, B, B].


def block_init(nb: int, size: int, damping: float, dtype=torch.float32) -> Tensor:
    """`I / damping` for each block."""
    eye = torch.eye(size, dtype=dtype) / damping
    return eye.unsqueeze(0).repeat(nb, 1, 1)


def block_add(inverse: Tensor, g: Tensor, m: int) -> None:
    """Adds one of `m` gradients, [nb, B]: `H -= v v^T / (m + g.v)` with `v = H g`."""
    v = torch.einsum("bij,bj->bi", inverse, g)
    v /= (m + torch.einsum("bi,bi->b", g, v)).sqrt().unsqueeze(1)
    inverse.baddbmm_(v.unsqueeze(2), v.unsqueeze(1), alpha=-1)


def block_inverse(grads: Tensor, size: int, damping: float) -> Tensor:
    """The inverse of every block from all gradients, [m, d]; `size` divides d."""
    m, d = grads.shape
    inverse = block_init(d // size, size, damping, grads.dtype)
    for g in grads:
        block_add(inverse, g.reshape(-1, size), m)
    return inverse


def block_mul(inverse: Tensor, x: Tensor) -> Tensor:
    """`F^-1 x`, [d]."""
    nb, size, _ = inverse.shape
    return torch.bmm(inverse, x.reshape(nb, size, 1)).flatten()


def block_diagonal(inverse: Tensor) -> Tensor:
    """The diagonal of `F^-1`, [d]."""
    return inverse.diagonal(dim1=1, dim2=2).flatten()


# Static M-FAC: m vectors for each block, [nb, m, b].


class Static(NamedTuple):
    """`F^-1 = I / damping - sum_i v_i v_i^T / D_i` in each block."""

    vectors: Tensor  # v, [nb, m, b]
    denominators: Tensor  # D, [nb, m]
    damping: float


def static_init(
    grads: Tensor, damping: float, *, perbatch: int | None = None
) -> Static:
    """The recursion over the m gradients of each block, [nb, m, b].

    `perbatch` blocks at a time, or all. The reference overwrites its input; this
    writes beside it, which costs no copy.
    """
    vectors = torch.empty_like(grads)
    denominators = grads.new_empty(grads.shape[:2])
    step = perbatch or len(grads)
    for at in range(0, len(grads), step):
        part = slice(at, at + step)
        _static_part(grads[part], vectors[part], denominators[part], damping)
    return Static(vectors, denominators, damping)


def _static_part(grads: Tensor, vectors: Tensor, denominators: Tensor, damping):
    m = grads.shape[1]
    for i in range(m):
        g, before = grads[:, i], vectors[:, :i]
        v = g / damping
        if i:
            along = torch.bmm(before, g.unsqueeze(2)).squeeze(2) / denominators[:, :i]
            v -= torch.bmm(along.unsqueeze(1), before).squeeze(1)
        vectors[:, i] = v
        denominators[:, i] = m + (g * v).sum(1)


def static_mul(static: Static, x: Tensor) -> Tensor:
    """`F^-1 x`, [d]."""
    v, denominators, damping = static
    x = x.reshape(len(v), -1)
    along = torch.bmm(v, x.unsqueeze(2)).squeeze(2) / denominators
    return (x / damping - torch.bmm(along.unsqueeze(1), v).squeeze(1)).flatten()


def static_diagonal(static: Static) -> Tensor:
    """The diagonal of `F^-1`, [d], one vector after another as the reference does."""
    v, denominators, damping = static
    out = torch.full_like(v[:, 0], 1 / damping)
    for i in range(v.shape[1]):
        out -= v[:, i] ** 2 / denominators[:, i : i + 1]
    return out.flatten()


# Dynamic M-FAC: a ring buffer.


class Window:
    """The last m gradients [m, d], their inner products, and an LU of these.

    The matrix is `m I + G G^T / damping = L U`; `D = diag(U)`, and
    `coefficients = L^-1 / damping` turns gradients into the vectors of the static form.
    """

    def __init__(self, m: int, d: int, damping: float, dtype=torch.float32):
        self.grads = torch.zeros((m, d), dtype=dtype)
        self.dots = torch.zeros((m, m), dtype=dtype)
        self.eye = torch.eye(m, dtype=dtype)
        self.last, self.damping = 0, damping

    def update_mul(self, g: Tensor) -> Tensor:
        """Replaces the oldest gradient by `g`, then `F^-1 g`: two passes over G."""
        self.grads[self.last] = g
        along = self.grads @ g
        self.dots[self.last] = along
        self.dots[:, self.last] = along
        self.last = (self.last + 1) % len(self.grads)
        self._factorise()
        return self._mul(g, along)

    def _factorise(self) -> None:
        # torch has no LU without pivots on the CPU. With a Cholesky factor C it is
        # L = C / diag(C) and U = diag(C) C^T: half the work of an LU. The reference
        # also finds L^-1 row by row in a Python loop, and substitutes in one. All of
        # this flatters the reference.
        m = len(self.dots)
        factor = torch.linalg.cholesky(m * self.eye + self.dots / self.damping)
        pivots = factor.diagonal()
        self.denominators = pivots**2
        self.coefficients = (
            torch.linalg.solve_triangular(
                factor / pivots, self.eye, upper=False, unitriangular=True
            )
            / self.damping
        )

    def _mul(self, x: Tensor, along: Tensor) -> Tensor:
        by_vector = self.coefficients @ along
        weights = (by_vector / self.denominators) @ self.coefficients
        return x / self.damping - weights @ self.grads
