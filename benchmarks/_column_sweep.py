"""Layer-wise pruning in torch, to be timed against: a sweep column by column.

Written from the formulas, and in the shape in which SparseGPT (arXiv:2301.00774) and
Wanda (arXiv:2306.11695) run: the inverse by two Cholesky factorisations, one column
after another in blocks, thresholds by a sort. `w` is `[d_out, d_in]`; nothing of the
arguments is overwritten. torch is needed by the benchmarks alone.
"""

import torch

Tensor = torch.Tensor


def inverse_factor(gram: Tensor, rel_damping: float = 0.01) -> Tensor:
    """The upper `U` with `(G + damping I)^-1 = U^T U`."""
    h = gram.clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += rel_damping * diagonal.mean()
    h = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(h, upper=True)


def sparsegpt(
    w: Tensor,
    gram: Tensor,
    sparsity: float,
    nm: tuple[int, int] | None = None,
    *,
    upper: Tensor | None = None,
    block: int = 128,
) -> Tensor:
    """The pruned weights; `nm = (keep, of)`, or None for single weights."""
    w = w.clone()
    d_in = w.shape[1]
    dead = gram.diagonal() == 0
    w[:, dead] = 0
    upper = inverse_factor(gram) if upper is None else upper
    for start in range(0, d_in, block):
        end = min(start + block, d_in)
        part = w[:, start:end].clone()
        new, errors = torch.zeros_like(part), torch.zeros_like(part)
        u = upper[start:end, start:end]
        pivots = u.diagonal()
        gone = torch.zeros_like(part, dtype=torch.bool)
        if nm is None:
            score = (part / pivots) ** 2
            order = score.flatten().sort().values
            gone = score < order[round(order.numel() * sparsity)]
        for i in range(end - start):
            if nm is not None and i % nm[1] == 0:
                keep, of = nm
                score = (part[:, i : i + of] / pivots[i : i + of]) ** 2
                worst = score.topk(of - keep, dim=1, largest=False).indices
                gone.scatter_(1, i + worst, True)
            column = part[:, i]
            q = column.clone()
            q[gone[:, i]] = 0
            error = (column - q) / pivots[i]
            part[:, i:] -= error.unsqueeze(1) @ u[i, i:].unsqueeze(0)
            new[:, i], errors[:, i] = q, error
        w[:, start:end] = new
        w[:, end:] -= errors @ upper[start:end, end:]
    return w


def wanda(
    w: Tensor, norms: Tensor, sparsity: float, nm: tuple[int, int] | None = None
) -> Tensor:
    """The pruned weights: `|w_ij| norm_j`, each row by itself."""
    w = w.clone()
    score = w.abs() * norms
    if nm is None:
        count = int(w.shape[1] * sparsity)
        worst = score.sort(dim=1, stable=True).indices[:, :count]
        return w.scatter_(1, worst, 0)
    gone = torch.zeros_like(score, dtype=torch.bool)
    keep, of = nm
    for i in range(0, w.shape[1], of):
        worst = score[:, i : i + of].topk(of - keep, dim=1, largest=False).indices
        gone.scatter_(1, i + worst, True)
    w[gone] = 0
    return w
