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

    def take(self) -> tuple[Tensor, Tensor | None]:
        """The means over batches of X^T X and of X^T (Y - X), each [K, K] float32; the latter None if no Y was given.

        Without any batch the first is the identity. Gives its memory away: of no use afterwards.
        """
        if self.n_batches == 0:
            return torch.eye(self._sum.shape[0], device=self._sum.device), None
        hessian = self._sum.div_(self.n_batches)
        shift = None if self._shift is None else self._shift.div_(self.n_batches)
        self._sum, self._shift = hessian.new_empty((0, 0)), None
        return hessian, shift


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
    step = max(damping * float(diagonal.to(torch.float64).mean()), _LEAST_DAMPING)
    for attempt in range(1, _ATTEMPTS + 1):
        upper = _inverse_factor(hessian, perm, attempt * step)
        if upper is not None:
            return HessianFactor(perm, upper, attempt * step)
    raise CalibrationError(
        f"the second moments of {hessian.shape[0]} inputs are not positive, though {_ATTEMPTS * step:.3g} was added to "
        "each; calibrate with more, and more varied, text"
    )


def _inverse_factor(hessian: Tensor, perm: Tensor, damping: float) -> Tensor | None:
    """U, upper triangular, with inverse(H) = U^T U, H the Hessian in the order `perm`, damped; None if there is none.

    Read backwards, H is L L^T, and U is the inverse of L read backwards. Three matrices are held at a time, the Hessian
    included.
    """
    backwards = perm.flip(0)
    lower = hessian.index_select(0, backwards).index_select(1, backwards)
    lower.diagonal().add_(damping)
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if int(failed):
        return None
    inverse = torch.eye(len(lower), device=hessian.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    upper: Tensor = inverse.flip((0, 1))
    del inverse
    if not bool((upper.diagonal() > 0).all()) or not bool(torch.isfinite(upper.diagonal()).all()):
        return None
    return upper
