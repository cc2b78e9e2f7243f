"""Weights that make up for what earlier layers have lost.

A quantised model gives a matrix inputs X, where the unquantised one gave Y. The products that are wanted are those of
Y: the weights W' = W + (W S^T) H^-1, with H the mean of X^T X and S that of X^T (Y - X), come nearest to them, and it
is these that are quantised.

Source: the closed form of least squares; asymmetric calibration as in GPTAQ (Li et al. 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHIFT_DAMPING = 0.5
"""Added to the diagonal of H, as a share of its mean: with little text S is noisy."""


def corrected_weights(weights: Sequence[Tensor], hessian: Tensor, shift: Tensor | None) -> list[Tensor]:
    """The weights to quantise, of matrices that read one input.

    Args:
        weights: each [out, in] float32.
        hessian: [in, in] float32, undamped.
        shift: [in, in] float32, or None: the weights as they are.
    """
    if shift is None:
        return list(weights)
    lower = hessian.clone()
    lower.diagonal().add_(SHIFT_DAMPING * float(hessian.diagonal().mean()))
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if int(failed):
        return list(weights)  # nothing can be said of the inputs; the plain weights are the best guess
    return [weight + torch.cholesky_solve(shift @ weight.T, lower).T for weight in weights]
