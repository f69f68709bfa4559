"""Where PPO's weights lie on several ranks, and how the ranks' gradients meet in one optimiser step.

`Replicas`: every rank holds all weights (one process, or engine=ddp). Gradients are summed over the ranks by hand, so
that one rank and several make the same step: a loss is divided by the tokens of the whole minibatch beforehand.

Every method but the properties is collective.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.config import EngineConfig
from rlhf.engine.ranks import Ranks
from rlhf.errors import TrainingError

Weights = dict[str, Tensor]
BUCKET = 1 << 25  # numbers that are summed over the ranks at a time


class Trainer(Protocol):
    """One role's weights with their optimiser. A step over a minibatch is one `backward` for each micro-batch of this
    rank's share, then `step`; or `discard`."""

    model: Any  # what a pass goes through

    def set_rate(self, rate: float) -> None: ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's part of the loss; the parts of all ranks add up to the minibatch's."""

    def step(self) -> tuple[float, str]:
        """Clip the gradient, step and drop it. Its norm over all ranks, and the name of a tensor whose gradient is not
        finite: then nothing was stepped."""

    def discard(self) -> None:
        """Drop the gradient."""

    def state(self) -> Any:
        """The optimiser's state that this rank has to keep; None if another keeps it."""

    def load_state(self, state: Any) -> None: ...


class Placement(Protocol):
    """Where the weights of PPO's roles lie."""

    kind: str  # of the engine
    ranks: Ranks
    lockstep: bool  # the ranks must make the same number of passes, since each holds collectives

    def trainer(self, model: Any, rate: float, max_norm: float) -> Trainer:
        """Train `model` with AdamW; `max_norm` 0 does not clip."""

    def freeze(self, model: Any) -> None:
        """`model` is only read from now on."""

    def whole(self, model: Any) -> Any:
        """A context in which this rank holds all weights of `model` and reads them without other ranks."""

    def weights(self, model: nn.Module) -> Weights:
        """A CPU copy of the parameters, shared ones once; empty on ranks above 0."""

    def put(self, model: nn.Module, weights: Weights, what: str) -> None:
        """Copy rank 0's `weights` into the model's parameters; a TrainingError if they are not exactly those."""


def place(engine: EngineConfig, ranks: Ranks, *, mixed: bool = False) -> Placement:
    """The placement that the engine asks for. `mixed`: the passes are made in bf16 arithmetic."""
    kind = engine.kind.on(ranks.size)
    if not kind.zero:
        return Replicas(ranks, kind.value)
    from rlhf.engine.ppo_shards import Shards  # takes a second to import

    return Shards(kind, ranks, mixed=mixed)


class Replicas:
    """All weights on each rank."""

    lockstep = False

    def __init__(self, ranks: Ranks | None = None, kind: str = "single") -> None:
        self.ranks, self.kind = ranks or Ranks(), kind

    def trainer(self, model: Any, rate: float, max_norm: float) -> ReplicaTrainer:
        return ReplicaTrainer(model, rate, max_norm, self.ranks)

    def freeze(self, model: Any) -> None:
        """Nothing to do: each rank has its copy."""

    @contextmanager
    def whole(self, model: Any) -> Iterator[None]:
        yield

    def weights(self, model: nn.Module) -> Weights:
        return copied(model) if self.ranks.is_main else {}

    def put(self, model: nn.Module, weights: Weights, what: str) -> None:
        check_names(self.ranks, model, weights, what)
        fill(self.ranks, model, weights)


class ReplicaTrainer:
    """AdamW on a model that every rank holds whole."""

    def __init__(self, model: Any, rate: float, max_norm: float, ranks: Ranks) -> None:
        self.model, self.max_norm, self.ranks = model, max_norm or math.inf, ranks
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def step(self) -> tuple[float, str]:
        moved = self._summed()
        norm = torch.nn.utils.get_total_norm([p.grad for p in moved if p.grad is not None])
        if not torch.isfinite(norm):  # clipping would spread the NaN to every weight
            return float(norm), _first_bad_gradient(self.model)
        torch.nn.utils.clip_grads_with_norm_(moved, self.max_norm, norm)
        self.optimizer.step()
        self.discard()
        return float(norm), ""

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> Any:
        return self.optimizer.state_dict() if self.ranks.is_main else None

    def load_state(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)

    def _summed(self) -> list[nn.Parameter]:
        """The parameters that have a gradient on some rank, each with the sum over the ranks."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.ranks.size == 1:
            return [p for p in trained if p.grad is not None]
        # A rank may have had nothing to do, or, with experts, another part of the model.
        having = self.ranks.sum(torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device))
        moved = [p for p, count in zip(trained, having.tolist(), strict=True) if count]
        for p in moved:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets(moved):
            flat = self.ranks.sum(torch.cat([p.grad.flatten() for p in bucket if p.grad is not None]))
            for p, part in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                assert p.grad is not None
                p.grad.copy_(part.view_as(p))
        return moved


def copied(model: nn.Module) -> Weights:
    """A CPU copy of the parameters, shared ones once."""
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in model.named_parameters()}


@torch.no_grad()
def fill(ranks: Ranks, model: nn.Module, weights: Weights) -> None:
    """Copy rank 0's `weights` into the parameters of every rank; those that ZeRO-3 cuts up, of rank 0 alone."""
    for name, p in model.named_parameters():
        if ranks.is_main:
            p.copy_(weights[name])
        if ranks.size > 1 and not hasattr(p, "ds_id"):
            dist.broadcast(p.data, src=0)


def check_names(ranks: Ranks, model: nn.Module, weights: Weights, what: str) -> None:
    """TrainingError on every rank, unless rank 0's `weights` have the names of the model's parameters."""
    differing = ranks.broadcast(sorted({name for name, _ in model.named_parameters()} ^ weights.keys())[:3])
    if differing:
        raise TrainingError(f"{what}: its tensors are not those of the model: {differing}")


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type in a row, about `BUCKET` numbers at a time."""
    bucket: list[nn.Parameter] = []
    for p in parameters:
        if bucket and (p.dtype != bucket[0].dtype or sum(q.numel() for q in bucket) + p.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def _first_bad_gradient(model: nn.Module) -> str:
    named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return next((name for name, grad in named if not torch.isfinite(grad).all()), "norm")
