"""What calibration knows about the inputs of a matrix: their second moments, and the factor that GPTQ works with.

Matrices that read the same input (q, k and v; gate and up) share one of these, and with it the order of their rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.errors import CalibrationError

DAMPING = 0.12
_LEAST_DAMPING = 1e-5
_ATTEMPTS = 10


class InputMoments:
    """Sums X^T X over batches of inputs X, and on request X^T Y with what stands for X in the unquantised model.

    Args:
        in_features: K.
        device: where the sums are kept.
    """

    def __init__(self, in_features: int, device: torch.device | None = None) -> None:
        self._sum = torch.zeros((in_features, in_features), dtype=torch.float32, device=device)
        self._shift: Tensor | None = None
        self.n_batches = 0

    def add(self, x: Tensor, unquantised: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            x: [T, K] floating point.
            unquantised: [T, K] the same inputs in the unquantised model.

        Raises:
            CalibrationError: an input is not finite.
        """
        x = x.to(torch.float32)
        product = x.T @ x
        if not bool(torch.isfinite(product.diagonal()).all()):
            raise CalibrationError(
                "calibration met activations that are not finite: the weights are damaged, or need more range than "
                "float32 has"
            )
        self._sum += product
        self.n_batches += 1
        if unquantised is not None:
            if self._shift is None:
                self._shift = torch.zeros_like(self._sum)
            self._shift += x.T @ (unquantised.to(torch.float32) - x)

    def hessian(self) -> Tensor:
        """[K, K] float32: the mean of X^T X over batches; the identity without any."""
        if self.n_batches == 0:
            return torch.eye(self._sum.shape[0], device=self._sum.device)
        return self._sum / self.n_batches

    def shift(self) -> Tensor | None:
        """[K, K] float32: the mean of X^T (Y - X), or None if no Y was given."""
        return None if self._shift is None else self._shift / self.n_batches


@dataclass(frozen=True, slots=True)
class HessianFactor:
    """A damped Hessian in stored order, factorised.

    Attributes:
        perm: [K] int64; stored row r holds input feature perm[r]. Features that matter most come first.
        upper: [K, K] float32, U with inverse(H) = U^T U, upper triangular.
        damping: what was added to the diagonal.
    """

    perm: Tensor
    upper: Tensor
    damping: float

    @property
    def invperm(self) -> Tensor:
        """[K] int32: the stored row of each input feature."""
        return torch.argsort(self.perm).to(torch.int32)

    @property
    def row_weights(self) -> Tensor:
        """[K] float32: what the square of an error in a stored row costs once later rows have made up for it."""
        return self.upper.diagonal().square().reciprocal()


def factorise(hessian: Tensor, *, damping: float = DAMPING) -> HessianFactor:
    """Order, damp and invert a Hessian [K, K].

    Args:
        damping: added to the diagonal, as a share of its mean; again and again while the matrix is not positive.

    Raises:
        CalibrationError: it cannot be factorised.
    """
    diagonal = hessian.diagonal()
    perm = torch.argsort(diagonal, descending=True, stable=True)
    ordered = hessian[perm][:, perm].to(torch.float32).clone()
    step = max(damping * float(diagonal.to(torch.float64).mean()), _LEAST_DAMPING)
    for attempt in range(1, _ATTEMPTS + 1):
        ordered.diagonal().add_(step)
        upper = _inverse_factor(ordered)
        if upper is not None:
            return HessianFactor(perm, upper, attempt * step)
    raise CalibrationError(
        f"the second moments of {hessian.shape[0]} inputs are not positive, though {_ATTEMPTS * step:.3g} was added to "
        "each; calibrate with more, and more varied, text"
    )


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """U, upper triangular, with inverse(hessian) = U^T U; None if there is none.

    With hessian = R R^T, R upper triangular, U is the inverse of R. R is the lower factor of the matrix read backwards.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip((0, 1)))
    if int(failed):
        return None
    factor = lower.flip((0, 1))
    del lower
    upper: Tensor = torch.linalg.solve_triangular(factor, torch.eye(len(factor), device=factor.device), upper=True)
    if not bool((upper.diagonal() > 0).all()) or not bool(torch.isfinite(upper).all()):
        return None
    return upper
