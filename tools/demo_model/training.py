"""The training loop: one worker per core, gradients averaged between them, a time budget, checkpoints to go on from.

Time is counted in processor time of a worker, so that a budget buys the same training on a busy machine; on a free one
it is the time on the clock.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tools.demo_model.batches import Batch, bucketed, collate
from tools.demo_model.examples import Mix, RowSource
from tools.demo_model.model import Llama


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train."""

    minutes: float = 30.0
    tokens_per_batch: int = 4096  # of one worker
    rows_per_pool: int = 128
    matrix_rate: float = 1.3e-3
    other_rate: float = 4e-4
    muon: bool = True
    warmup: float = 0.02
    final_rate: float = 0.05
    max_steps: int | None = None
    checkpoint_seconds: float = 120.0
    print_seconds: float = 15.0


@torch.no_grad()
def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of [N, R, C] updates, roughly, by the Newton-Schulz iteration of Muon.

    In float32: processors without bfloat16 units are far slower in bfloat16. Source: Jordan et al., "Muon".
    """
    x = update.mT if update.size(-2) > update.size(-1) else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if update.size(-2) > update.size(-1) else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, matrices of one size together."""

    def __init__(self, matrices: list[torch.nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            sizes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    sizes.setdefault(p.shape, []).append(p)
            for shape, parameters in sizes.items():
                updates = []
                for p in parameters:
                    if "velocity" not in self.state[p]:
                        self.state[p]["velocity"] = torch.zeros_like(p)
                    velocity = self.state[p]["velocity"]
                    velocity.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(velocity, group["momentum"]))
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for p, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                    p.sub_(update, alpha=scale)


def loss_of(model: Llama, batch: Batch, *, declining: int) -> tuple[Tensor, dict[str, float]]:
    """The loss per question of a batch, and figures of its decisions. `declining`: the token that declines."""
    hidden = model(batch.tokens, batch.positions, batch.mask).flatten(0, 1)
    decided = batch.choices[:, 0] >= 0
    options_of = batch.choices[decided]
    options = torch.einsum("mc,mxc->mx", hidden[batch.predictor[decided]], model.embed_tokens(options_of.clamp(min=0)))
    options = options.masked_fill(options_of < 0, -math.inf)
    place = (options_of == batch.target[decided, None]).int().argmax(dim=1, keepdim=True)
    at_target = options.gather(1, place)[:, 0]
    losses = torch.zeros(len(batch.target)).masked_scatter(decided, torch.logsumexp(options, dim=-1) - at_target)
    figures: dict[str, float] = {}
    if not decided.all():
        places, place_of = torch.unique(batch.predictor[~decided], return_inverse=True)
        logits = model.head(hidden[places])
        open_losses = torch.logsumexp(logits, dim=-1)[place_of] - logits[place_of, batch.target[~decided]]
        losses = losses.masked_scatter(~decided, open_losses)
        figures["open_loss"] = float(open_losses.detach().mean())
    loss = (losses * batch.weight).sum() / batch.n_questions
    with torch.no_grad():
        right = (options.max(dim=-1).values <= at_target).float()
        first = (options_of == declining).any(dim=1)
        text = batch.in_text[decided]
        figures["loss"] = float(loss)
        for name, which in (("decline_right", first), ("quote_right", ~first & ~text), ("text_right", text)):
            if which.any():
                figures[name] = float(right[which].mean())
    return loss, figures


@dataclass(slots=True)
class Progress:
    """Where training stands. `seconds` of processor time of a worker, `clock_seconds` as they passed."""

    step: int = 0
    seconds: float = 0.0
    clock_seconds: float = 0.0
    tokens: int = 0
    questions: int = 0


@dataclass(frozen=True, slots=True)
class Worker:
    """Which of how many workers this is."""

    rank: int = 0
    count: int = 1

    def average(self, tensors: list[Tensor]) -> None:
        """Replace the tensors by their mean over all workers."""
        if self.count > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            flat /= self.count
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))


class Trainer:
    """Trains a model on rows until its time is used up."""

    def __init__(
        self,
        model: Llama,
        source: RowSource,
        plan: Plan,
        *,
        pad: int,
        directory: Path,
        schedule: Callable[[float], Mix],
        worker: Worker | None = None,
    ) -> None:
        self.model, self.source, self.plan, self.worker = model, source, plan, worker or Worker()
        self.pad, self.directory, self.schedule = pad, directory, schedule
        self.progress, self.curve = Progress(), list[dict[str, float]]()
        inner = [p for p in model.layers.parameters() if p.ndim == 2]
        known = {id(p) for p in inner}
        self.parameters = list(model.parameters())
        rest = [p for p in self.parameters if id(p) not in known]
        betas = (0.9, 0.98)
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(inner, lr=plan.matrix_rate)
            if plan.muon
            else torch.optim.AdamW(inner, lr=plan.matrix_rate, betas=betas, weight_decay=0.0),
            torch.optim.AdamW(rest, lr=plan.other_rate, betas=betas, weight_decay=0.0),
        ]
        self.rates = [plan.matrix_rate, plan.other_rate]

    def run(self, *, on_check: Callable[[], None] | None = None, check_seconds: float = math.inf) -> None:
        """Train to the end of the plan. `on_check` is called now and then by the first worker."""
        progress, plan = self.progress, self.plan
        saved = checked = printed = progress.seconds
        gathered: dict[str, list[float]] = {}
        seed = 1000 * progress.step + self.worker.rank
        self.source.rng.seed(seed)
        batches = self._batches(random.Random(seed))
        while self._share() < 1:
            busy, clock = time.process_time(), time.perf_counter()
            for key, value in self._step(next(batches)).items():
                gathered.setdefault(key, []).append(value)
            spent = torch.tensor([time.process_time() - busy, time.perf_counter() - clock])
            self.worker.average([spent])
            progress.seconds += float(spent[0])
            progress.clock_seconds += float(spent[1])
            if self.worker.rank:
                continue
            if progress.seconds - printed > plan.print_seconds or self._share() >= 1:
                printed = progress.seconds
                self._report({key: round(sum(values) / len(values), 4) for key, values in gathered.items()})
                gathered = {}
            if progress.seconds - saved > plan.checkpoint_seconds:
                saved = progress.seconds
                self.save()
            if on_check and progress.seconds - checked > check_seconds:
                checked = progress.seconds
                on_check()
        if not self.worker.rank:
            self.save()

    def _batches(self, rng: random.Random) -> Iterator[Batch]:
        while True:
            self.source.mix = self.schedule(self._share())
            pool = self.source.rows(self.plan.rows_per_pool)
            for rows in bucketed(pool, tokens_per_batch=self.plan.tokens_per_batch, rng=rng):
                yield collate(rows, pad=self.pad)

    def _share(self) -> float:
        by_time = self.progress.seconds / (60 * self.plan.minutes)
        by_step = self.progress.step / self.plan.max_steps if self.plan.max_steps else 0.0
        return min(1.0, max(by_time, by_step))

    def _rate_factor(self) -> float:
        share, plan = self._share(), self.plan
        if share < plan.warmup:
            return max(0.05, share / plan.warmup)
        along = (share - plan.warmup) / (1 - plan.warmup)
        return plan.final_rate + (1 - plan.final_rate) * min(1.0, 1.6 * (1 - along))

    def _step(self, batch: Batch) -> dict[str, float]:
        factor = self._rate_factor()
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        loss, figures = loss_of(self.model, batch, declining=self.source.codec.declining[0])
        loss.backward()
        self.worker.average([p.grad for p in self.parameters if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.parameters, 5.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += batch.n_tokens * self.worker.count
        self.progress.questions += batch.n_questions * self.worker.count
        return figures

    def _report(self, figures: dict[str, float]) -> None:
        progress = self.progress
        rate = progress.tokens / max(progress.clock_seconds, 1e-9)
        left = max(0.0, 60 * self.plan.minutes - progress.seconds)
        self.curve.append({"step": progress.step, "seconds": round(progress.seconds, 1), **figures})
        shown = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(
            f"step {progress.step:5d}  {progress.questions:7d} questions  {rate:6.0f} tokens/s  {shown}  "
            f"{left / 60:4.1f} min left (clock {progress.clock_seconds / 60:.1f})",
            flush=True,
        )

    def save(self) -> None:
        """Write a checkpoint to go on from, and the loss curve."""
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / "checkpoint.tmp"
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
            "curve": self.curve,
        }
        torch.save(state, temporary)
        temporary.replace(self.directory / "checkpoint.pt")
        rows = ",\n".join(json.dumps(row) for row in self.curve)
        (self.directory / "loss_curve.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")

    def resume(self) -> bool:
        """Go on from the checkpoint in the directory, if there is one."""
        path = self.directory / "checkpoint.pt"
        if not path.is_file():
            return False
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress, self.curve = Progress(**state["progress"]), state["curve"]
        return True
