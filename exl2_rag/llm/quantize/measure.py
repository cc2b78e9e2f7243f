"""Measures what layouts cost: the first pass of a conversion, over the unquantised model.

For every block each candidate is quantised, put in place and run; its error is that of the block's output. What an
error in a block matters to the whole model is measured too ("refined"): from each block on a copy of the hidden states
goes along in which that block was coarse, and at the end its distribution over tokens is compared with the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.errors import CalibrationError
from exl2_rag.llm.quantize.blocks import STAGES, FloatLayer, FloatModel, PartName, PartRun
from exl2_rag.llm.quantize.candidates import matrix_plans, reference_rows
from exl2_rag.llm.quantize.gptq import quantise_matrix, unweighted
from exl2_rag.llm.quantize.hessian import HessianFactor, InputMoments, factorise
from exl2_rag.llm.quantize.measurement import LEAST_ERROR, MeasuredOption, Slot
from exl2_rag.llm.quantize.rtn import QuantisationPlan, padded
from exl2_rag.llm.quantize.scales import search_scales_weighted

PROBE = QuantisationPlan((3,), (1.0,), (64,))
"""How coarse a block is made to see what it matters."""

_LEAST_ACCURACY = 0.1


@dataclass(frozen=True, slots=True)
class PartMeasurement:
    """What was found of one part of a layer.

    Attributes:
        slots: without sensitivities.
        probe_error: of the part's output when all its matrices are rounded as `PROBE` says; 0 without a probe.
    """

    slots: tuple[Slot, ...]
    probe_error: float


def block_name(layer: int, part: PartName) -> str:
    """How files name a part of a layer."""
    return f"model.layers.{layer}.{part}"


class PartMeasurer:
    """Measures the parts of a model's layers on rows of hidden states.

    Args:
        model: reads the layers.
        method: "refined" or "reference".
        bits: the average that is aimed at; "refined" measures layouts near it.
    """

    def __init__(self, model: FloatModel, *, method: str, bits: float) -> None:
        self._run: PartRun = model.part_run()
        self._method = method
        self._bits = bits

    def measure(
        self, layer: FloatLayer, part: PartName, states: Sequence[Tensor], probe: Mapping[str, Tensor]
    ) -> tuple[PartMeasurement, list[Tensor]]:
        """Measure one part.

        Args:
            layer: the layer.
            part: which of its parts.
            states: [T, C] float32 for each row, what comes into the part; left as they are.
            probe: the part's matrices as `probe_weights` gives them; empty where sensitivities are not asked for.

        Returns:
            What was found, and what comes out of the part for each row.

        Raises:
            CalibrationError: activations are not finite, or no layout keeps anything of the block's output.
        """
        wanted, factors = self._observe(layer, part, states)
        error_of = self._error_of(layer, part, states, wanted)
        search = self._refined_slots if self._method == "refined" else self._reference_slots
        slots = search(layer, part, factors, error_of)
        best = min(option.error for slot in slots for option in slot.options)
        if self._method == "reference" and best > 1 - _LEAST_ACCURACY:
            raise CalibrationError(
                f"{block_name(layer.index, part)} cannot be quantised: its best layout has an error of {best:.2f}; the "
                "weights are damaged, or the calibration text is nothing like what the model reads"
            )
        return PartMeasurement(slots, error_of(probe) if probe else 0.0), wanted

    def probe_weights(self, layer: FloatLayer, part: PartName) -> dict[str, Tensor]:
        """The part's matrices, rounded coarsely."""
        result = {}
        for name, matrix in layer.matrices(part).items():
            identity = _identity_factor(matrix.weight.shape[1], matrix.weight.device)
            result[name] = quantise_matrix(matrix.weight, identity, PROBE, feedback=False).weight
        return result

    def run(self, layer: FloatLayer, part: PartName, states: Sequence[Tensor], weights: Mapping[str, Tensor]) -> None:
        """Apply a part to states in place, with other weights for some matrices."""
        with layer.exchanged(part, weights):
            for hidden in states:
                layer.run(part, hidden, self._run)

    def _observe(
        self, layer: FloatLayer, part: PartName, states: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, HessianFactor]]:
        """The part's outputs, and the factor of each matrix's inputs."""
        moments = {
            stage[0]: InputMoments(layer.matrices(part)[stage[0]].weight.shape[1], states[0].device)
            for stage in STAGES[part]
        }
        wanted = [hidden.clone() for hidden in states]
        with layer.listening(part, {name: one.add for name, one in moments.items()}):
            self.run(layer, part, wanted, {})
        factors = {name: factorise(one.take()[0]) for name, one in moments.items()}
        return wanted, {name: factors[stage[0]] for stage in STAGES[part] for name in stage}

    def _error_of(
        self, layer: FloatLayer, part: PartName, states: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> Callable[[Mapping[str, Tensor]], float]:
        """A function from exchanged weights to the error of the output, its mean over rows.

        "reference": the norm of the difference as a share of the norm; "refined": its square, which adds up over
        matrices.
        """
        power = 2 if self._method == "refined" else 1

        def error(weights: Mapping[str, Tensor]) -> float:
            found = [hidden.clone() for hidden in states]
            self.run(layer, part, found, weights)
            shares = [
                float((one - right).double().norm() / right.double().norm()) ** power
                for one, right in zip(found, wanted, strict=True)
            ]
            return sum(shares) / len(shares)

        return error

    def _refined_slots(
        self,
        layer: FloatLayer,
        part: PartName,
        factors: Mapping[str, HessianFactor],
        error_of: Callable[[Mapping[str, Tensor]], float],
    ) -> tuple[Slot, ...]:
        """A slot for each matrix."""
        slots = []
        for name, matrix in layer.matrices(part).items():
            options = []
            for plan in matrix_plans(self._bits, *reversed(matrix.weight.shape)):
                made = quantise_matrix(matrix.weight, factors[name], plan, search=search_scales_weighted)
                options.append(
                    MeasuredOption({name: plan}, _bits_of(matrix.weight, plan), error_of({name: made.weight}))
                )
            slots.append(_slot(layer, part, options))
        return tuple(slots)

    def _reference_slots(
        self,
        layer: FloatLayer,
        part: PartName,
        factors: Mapping[str, HessianFactor],
        error_of: Callable[[Mapping[str, Tensor]], float],
    ) -> tuple[Slot, ...]:
        """One slot with the rows of ExLlamaV2's table."""
        matrices = layer.matrices(part)
        made: dict[tuple[str, QuantisationPlan], Tensor] = {}
        options = []
        for row in reference_rows()[part]:
            for name, plan in row.items():
                if (name, plan) not in made:
                    made[name, plan] = quantise_matrix(
                        matrices[name].weight, factors[name], plan, search=unweighted
                    ).weight
            error = error_of({name: made[name, plan] for name, plan in row.items()})
            total_bits = sum(_bits_of(matrices[name].weight, plan) for name, plan in row.items())
            options.append(MeasuredOption(row, total_bits, max(LEAST_ERROR, error)))
        return (_slot(layer, part, options, keep_order=True),)


def token_divergence(right: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats of two sets of logits [T, V], a row a token."""
    right, other = right.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((right.exp() * (right - other)).sum(-1).mean())


def _slot(layer: FloatLayer, part: PartName, options: list[MeasuredOption], *, keep_order: bool = False) -> Slot:
    ordered = options if keep_order else sorted(options, key=lambda option: option.total_bits)
    return Slot(block_name(layer.index, part), tuple(ordered))


def _bits_of(weight: Tensor, plan: QuantisationPlan) -> int:
    return plan.total_bits(weight.shape[1], padded(weight.shape[0]))


def _identity_factor(in_features: int, device: torch.device) -> HessianFactor:
    eye = torch.eye(in_features, device=device)
    return HessianFactor(torch.arange(in_features, device=device), eye, 0.0)
