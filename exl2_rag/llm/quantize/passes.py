"""The two passes of a conversion over the layers: measuring, and quantising. Each goes on where a job has stopped."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exl2_rag.errors import ConversionError
from exl2_rag.llm.checkpoint import exl2_format
from exl2_rag.llm.layers.linear import LinearSpec
from exl2_rag.llm.models import tensor_names
from exl2_rag.llm.quantize.blocks import PART_NAMES, STAGES, FloatLayer, FloatModel, PartName
from exl2_rag.llm.quantize.candidates import HEAD_PLANS
from exl2_rag.llm.quantize.gptq import QuantisedMatrix, ScaleSearch, quantise_matrix, unweighted
from exl2_rag.llm.quantize.hessian import InputMoments, factorise
from exl2_rag.llm.quantize.job import Job
from exl2_rag.llm.quantize.measure import PartMeasurer, block_name, token_divergence
from exl2_rag.llm.quantize.measurement import Measurement, Slot, option_from_json, option_to_json
from exl2_rag.llm.quantize.options import ConversionOptions
from exl2_rag.llm.quantize.refine import corrected_weights
from exl2_rag.llm.quantize.rtn import QuantisationPlan
from exl2_rag.llm.quantize.scales import search_scales_weighted
from exl2_rag.llm.quantize.states import HiddenStates

PROBE_ROWS = 4
"""Rows on which it is measured what a block matters to the model's output."""

SAVE_INTERVAL_S = 120.0
_LEAST_DIVERGENCE = 1e-9
_LEAST_ERROR = 1e-12

Progress = Callable[[str, int, int], None]
"""Told (stage, blocks done, blocks in all)."""


@dataclass(frozen=True, slots=True)
class BlockReport:
    """What became of one block.

    Attributes:
        bits_per_weight: on disk, tables included.
        error: norm of the difference of the block's output from what the unquantised model has there, as a share of the
            norm; it holds what earlier blocks lost too.
    """

    block: str
    bits_per_weight: float
    error: float


@dataclass(frozen=True, slots=True)
class QualityReport:
    """How the quantised model does on the calibration rows beside the unquantised one.

    Attributes:
        divergence: mean Kullback-Leibler divergence of the next token, nats.
        agreement: share of tokens with the same first choice.
    """

    perplexity_before: float
    perplexity_after: float
    divergence: float
    agreement: float


def all_parts(n_layers: int) -> list[tuple[int, PartName]]:
    """Every block in order."""
    return list(itertools.product(range(n_layers), PART_NAMES))


def embedded(model: FloatModel, ids: Tensor, job: Job, name: str) -> HiddenStates:
    """The hidden states of rows of token ids [R, T] before the first layer."""
    states = HiddenStates(ids.shape[0], ids.shape[1], model.config.hidden_size, spill=job.spill_file(name))
    for index, row in enumerate(ids):
        states.store(index, model.embed(row))
    return states


# --- measuring -----------------------------------------------------------------------------------------------------


def measure_model(
    model: FloatModel, ids: Tensor, options: ConversionOptions, job: Job, progress: Progress
) -> Measurement:
    """Measure all blocks on rows [R, T] of token ids.

    Raises:
        CalibrationError: see `PartMeasurer.measure`.
    """
    measurer = PartMeasurer(model, method=options.method, bits=options.bits)
    parts = all_parts(model.n_layers)
    states = [model.embed(row) for row in ids]
    n_probes = min(PROBE_ROWS, len(states)) if options.method == "refined" else 0
    probed: dict[str, list[Tensor]] = {}
    found: dict[str, tuple[tuple[Slot, ...], float]] = {}
    layer: FloatLayer | None = None
    for done, (index, part) in enumerate(parts):
        progress("measure", done, len(parts))
        if layer is None or layer.index != index:
            layer = model.layer(index)
        block = block_name(index, part)
        name = Job.measured_name(block)
        before = [hidden.clone() for hidden in states[:n_probes]]
        probe = measurer.probe_weights(layer, part) if n_probes else {}
        if job.has(name):
            data = job.read_json(name)
            slots = tuple(Slot(block, tuple(option_from_json(one, "error") for one in of)) for of in data["slots"])
            found[block] = (slots, float(data["probe_error"]))
            measurer.run(layer, part, states, {})
        else:
            measured, states = measurer.measure(layer, part, states, probe)
            found[block] = (measured.slots, measured.probe_error)
            options_json = [[option_to_json(option) for option in slot.options] for slot in measured.slots]
            job.write_json(name, {"slots": options_json, "probe_error": measured.probe_error})
        for hidden in probed.values():
            measurer.run(layer, part, hidden, {})
        if n_probes:
            measurer.run(layer, part, before, probe)
            probed[block] = before
    progress("measure", len(parts), len(parts))
    sensitivities = _sensitivities(model, states[:n_probes], probed, found) if n_probes else {}
    return Measurement(
        tuple(
            replace(slot, sensitivity=sensitivities.get(block, 1.0))
            for block, (slots, _) in found.items()
            for slot in slots
        )
    )


def _sensitivities(
    model: FloatModel,
    states: Sequence[Tensor],
    probed: Mapping[str, Sequence[Tensor]],
    found: Mapping[str, tuple[tuple[Slot, ...], float]],
) -> dict[str, float]:
    """What an error of 1 in each block's output costs in divergence of the model's output."""
    head = model.head_weight().to(torch.float32)
    right = [model.final_norm(hidden) @ head.T for hidden in states]
    result = {}
    for block, rows in probed.items():
        divergences = [
            token_divergence(wanted, model.final_norm(hidden) @ head.T)
            for wanted, hidden in zip(right, rows, strict=True)
        ]
        mean = max(_LEAST_DIVERGENCE, sum(divergences) / len(divergences))
        result[block] = mean / max(_LEAST_ERROR, found[block][1])
    return result


# --- quantising ----------------------------------------------------------------------------------------------------


class Quantiser:
    """Quantises the blocks of a model one after the other, each on what the quantised blocks before it give.

    Args:
        model: reads the layers.
        ids: [R, T] calibration rows.
        plans: by key of the matrix.
        options: the method and the head's bits.
        job: where finished matrices go.
    """

    def __init__(
        self,
        model: FloatModel,
        ids: Tensor,
        plans: Mapping[str, QuantisationPlan],
        options: ConversionOptions,
        job: Job,
    ) -> None:
        self._model = model
        self._ids = ids
        self._plans = plans
        self._options = options
        self._job = job
        self._run = model.part_run()
        self._refined = options.method == "refined"
        self._search: ScaleSearch = search_scales_weighted if self._refined else unweighted
        self._right = embedded(model, ids, job, "right")
        self._lossy = embedded(model, ids, job, "lossy")

    def blocks(self, progress: Progress) -> Iterator[BlockReport]:
        """Quantise all blocks; each is on disk when it is reported."""
        parts = all_parts(self._model.n_layers)
        n_finished = sum(1 for _ in itertools.takewhile(self._is_finished, parts))
        first = self._restore(n_finished)
        saved = time.monotonic()
        layer: FloatLayer | None = None
        for done, (index, part) in enumerate(parts):
            if done < first:
                yield self._job_report(index, part)
                continue
            progress("quantise", done, len(parts))
            if layer is None or layer.index != index:
                layer = self._model.layer(index)
            name = f"reports/{block_name(index, part)}.json"
            if done < n_finished:
                self._advance(layer, part, self._finished_weights(index, part))
                yield self._job_report(index, part)
                continue
            made = self._quantise_part(layer, part)
            for short, matrix in made.items():
                key = self._specs(index, part)[short].key
                self._job.write_tensors(Job.matrix_name(key), matrix.parts | self._bias(layer, part, short))
            error = self._advance(layer, part, {short: matrix.weight for short, matrix in made.items()})
            bits = sum(_disk_bits(matrix) for matrix in made.values()) / sum(
                _elements(matrix) for matrix in made.values()
            )
            self._job.write_json(name, {"bits_per_weight": bits, "error": error})
            if time.monotonic() - saved > SAVE_INTERVAL_S:
                states = {"right": self._right.tensor, "lossy": self._lossy.tensor}
                self._job.save_states("quantise", done + 1, states)
                saved = time.monotonic()
            yield self._job_report(index, part)
        progress("quantise", len(parts), len(parts))

    def head(self) -> QualityReport:
        """Quantise the head, and compare both models on the calibration rows."""
        weight = self._model.head_weight().to(torch.float32)
        device = self._model.device
        name = Job.matrix_name(tensor_names.HEAD_KEY)
        if self._job.has(name):
            parts = self._job.read_tensors(name)
            made = exl2_format.decode(parts, tensor_names.HEAD_KEY, prescale=1.0)[:, : weight.shape[0]].T
        else:
            moments = InputMoments(weight.shape[1], weight.device)
            for index in range(self._lossy.n_rows):
                moments.add(self._model.final_norm(self._lossy.row(index, device)))
            plan = HEAD_PLANS[self._options.head_bits]
            matrix = quantise_matrix(weight, factorise(moments.take()[0]), plan, search=self._search)
            self._job.write_tensors(name, matrix.parts)
            made = matrix.weight
        return self._compare(weight, made.to(device, torch.float32))

    def _compare(self, head: Tensor, lossy_head: Tensor) -> QualityReport:
        device = self._model.device
        before = after = divergence = agreement = 0.0
        n_tokens = n_next = 0
        for index in range(self._right.n_rows):
            right = self._model.final_norm(self._right.row(index, device)) @ head.T
            lossy = self._model.final_norm(self._lossy.row(index, device)) @ lossy_head.T
            right, lossy = right.double().log_softmax(-1), lossy.double().log_softmax(-1)
            divergence += float((right.exp() * (right - lossy)).sum())
            agreement += float((right.argmax(-1) == lossy.argmax(-1)).sum())
            following = self._ids[index, 1:, None].to(device)
            before -= float(right[:-1].gather(-1, following).sum())
            after -= float(lossy[:-1].gather(-1, following).sum())
            n_tokens, n_next = n_tokens + len(right), n_next + len(following)
        return QualityReport(
            perplexity_before=float(torch.tensor(before / n_next).exp()),
            perplexity_after=float(torch.tensor(after / n_next).exp()),
            divergence=divergence / n_tokens,
            agreement=agreement / n_tokens,
        )

    def _quantise_part(self, layer: FloatLayer, part: PartName) -> dict[str, QuantisedMatrix]:
        specs = self._specs(layer.index, part)
        made: dict[str, QuantisedMatrix] = {}
        # "reference" sees the inputs of all matrices before any of them is quantised.
        steps = [[stage] for stage in STAGES[part]] if self._refined else [list(STAGES[part])]
        for step in steps:
            moments = self._observe(layer, part, [stage[0] for stage in step], made)
            for stage in step:
                hessian, shift = moments.pop(stage[0]).take()
                weights = corrected_weights([layer.matrices(part)[short].weight for short in stage], hessian, shift)
                del shift  # each of these has gigabytes for the widest inputs
                factor = factorise(hessian)
                del hessian
                for short, weight in zip(stage, weights, strict=True):
                    plan = self._plans[specs[short].key]
                    made[short] = quantise_matrix(weight, factor, plan, search=self._search)
        return made

    def _observe(
        self, layer: FloatLayer, part: PartName, names: Sequence[str], made: Mapping[str, QuantisedMatrix]
    ) -> dict[str, InputMoments]:
        """Moments of the inputs of some matrices, with those quantised so far in place."""
        device = self._model.device
        matrices = layer.matrices(part)
        moments = {name: InputMoments(matrices[name].weight.shape[1], device) for name in names}
        weights = {short: matrix.weight for short, matrix in made.items()}
        for index in range(self._lossy.n_rows):
            right: dict[str, Tensor] = {}
            if self._refined:
                with layer.listening(part, {name: _keep(right, name) for name in names}):
                    layer.run(part, self._right.row(index, device), self._run)
            lossy: dict[str, Tensor] = {}
            with layer.exchanged(part, weights), layer.listening(part, {name: _keep(lossy, name) for name in names}):
                layer.run(part, self._lossy.row(index, device), self._run)
            for name in names:
                moments[name].add(lossy[name], right.get(name))
        return moments

    def _advance(self, layer: FloatLayer, part: PartName, weights: Mapping[str, Tensor]) -> float:
        """Run a part on all states, quantised and not; returns the relative error of the outputs."""
        device = self._model.device
        errors = 0.0
        for index in range(self._right.n_rows):
            right, lossy = self._right.row(index, device), self._lossy.row(index, device)
            layer.run(part, right, self._run)
            with layer.exchanged(part, weights):
                layer.run(part, lossy, self._run)
            self._right.store(index, right)
            self._lossy.store(index, lossy)
            errors += float((lossy - right).double().norm() / right.double().norm())
        return errors / self._right.n_rows

    def _restore(self, n_finished: int) -> int:
        """Take up states that were kept; returns after how many blocks they are."""
        kept = self._job.load_states("quantise", n_finished)
        if kept is None:
            return 0
        done, states = kept
        if any(
            states[name].shape != one.tensor.shape for name, one in (("right", self._right), ("lossy", self._lossy))
        ):
            raise ConversionError(f"{self._job.directory} keeps hidden states of another size; start afresh")
        self._right.tensor.copy_(states["right"])
        self._lossy.tensor.copy_(states["lossy"])
        return done

    def _is_finished(self, place: tuple[int, PartName]) -> bool:
        index, part = place
        keys = [spec.key for spec in self._specs(index, part).values()]
        has_report = self._job.has(f"reports/{block_name(index, part)}.json")
        return has_report and all(self._job.has(Job.matrix_name(key)) for key in keys)

    def _finished_weights(self, index: int, part: PartName) -> dict[str, Tensor]:
        result = {}
        for short, spec in self._specs(index, part).items():
            parts = self._job.read_tensors(Job.matrix_name(spec.key))
            parts.pop("bias", None)
            result[short] = exl2_format.decode(parts, spec.key, prescale=1.0)[:, : spec.out_features].T.contiguous()
        return result

    def _job_report(self, index: int, part: PartName) -> BlockReport:
        block = block_name(index, part)
        return BlockReport(block, **self._job.read_json(f"reports/{block}.json"))

    def _bias(self, layer: FloatLayer, part: PartName, short: str) -> dict[str, Tensor]:
        matrix = layer.matrices(part)[short]
        if matrix.bias is None:
            return {}
        padded_bias = torch.zeros(-(-len(matrix.bias) // 32) * 32, dtype=torch.float16)
        padded_bias[: len(matrix.bias)] = matrix.bias.to("cpu", torch.float16)
        return {"bias": padded_bias}

    def _specs(self, index: int, part: PartName) -> dict[str, LinearSpec]:
        return block_specs(self._model, index, part)


def block_specs(model: FloatModel, index: int, part: PartName) -> dict[str, LinearSpec]:
    """Keys and sizes of a part's matrices by their short names."""
    specs = tensor_names.attention_specs if part == "self_attn" else tensor_names.mlp_specs
    return specs(model.config, index)


def _keep(into: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def keep(x: Tensor) -> None:
        into[name] = x

    return keep


def _elements(matrix: QuantisedMatrix) -> int:
    return matrix.parts["q_invperm"].shape[0] * matrix.parts["q_weight"].shape[1]


def _disk_bits(matrix: QuantisedMatrix) -> int:
    return 8 * sum(part.nbytes for part in matrix.parts.values())
