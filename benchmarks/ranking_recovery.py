"""Rankings of a known utility, and how much of its held-out accuracy the ranking loss recovers.

    python benchmarks/ranking_recovery.py    the tables in docs/reward-models.md

The reward is linear in frozen features, so that the fit is convex and takes a second: what is tested is the loss, its
ties and its tie parameter, not a model. A response's utility is u = w x with x of 16 standard normal features and
u of deviation 1.5; an annotator sees v = u + Gumbel noise, so that P(i over j) = sigmoid(u_i - u_j).

Shapes: R prompts, K responses, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from rlhf.ranking_loss import RankingLoss
from rlhf.types import Prompt, Ranking

FEATURES, SPREAD, HELDOUT = 16, 1.5, 2000
T39 = 2.0227  # 97.5 % point of Student's t with 39 degrees of freedom
SEEDS = 40


@dataclass(kw_only=True)
class World:
    """One draw of a utility and of its annotator."""

    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        direction_F = torch.randn(FEATURES, generator=self.generator)
        self.weight_F = SPREAD * direction_F / direction_F.norm()

    def responses(self, prompts: int, k: int) -> tuple[Tensor, Tensor]:
        """Features x_RKF and utilities u_RK."""
        x_RKF = torch.randn(prompts, k, FEATURES, generator=self.generator)
        return x_RKF, x_RKF @ self.weight_F

    def seen(self, u_RK: Tensor) -> Tensor:
        """v_RK, what the annotator orders by: Gumbel noise is -log(-log(uniform))."""
        uniform = torch.rand(u_RK.shape, generator=self.generator).clamp(1e-7, 1 - 1e-7)
        return u_RK - torch.log(-torch.log(uniform))

    def rankings(self, u_RK: Tensor, ties: str = "none", share: float = 0.0) -> list[Ranking]:
        """ties: "davidson" and "threshold" for K = 2 (by Davidson's model; by |v_1 - v_2| below a threshold, as Rao
        and Kupper have it), "bins" for any K (v rounded to a coarse scale: neither's model). `share`: of pairs."""
        v_RK = self.seen(u_RK)
        if ties == "bins":
            v_RK = torch.floor(v_RK / self._width(v_RK, share))
        ranks = [[1 + sum(other > own for other in row) for own in row] for row in v_RK.tolist()]
        if ties == "threshold":
            gap_R = (v_RK[:, 0] - v_RK[:, 1]).abs()
            tied_R = gap_R < gap_R.quantile(share)
        elif ties == "davidson":
            half_R = (u_RK[:, 0] - u_RK[:, 1]).abs() / 2
            strict_R = half_R.exp() + (-half_R).exp()
            nu = _bisect(lambda nu: float((nu / (strict_R + nu)).mean()), share)
            tied_R = torch.rand(len(u_RK), generator=self.generator) < nu / (strict_R + nu)
        else:
            tied_R = torch.zeros(len(u_RK), dtype=torch.bool)
        prompt, texts = Prompt(messages=[]), [str(i) for i in range(u_RK.shape[1])]
        return [
            Ranking(prompt=prompt, responses=texts, ranks=[1, 1] if tied else [*row])
            for row, tied in zip(ranks, tied_R.tolist(), strict=True)
        ]

    def _width(self, v_RK: Tensor, share: float) -> float:
        pairs = list(combinations(range(v_RK.shape[1]), 2))

        def tied(width: float) -> float:
            place_RK = torch.floor(v_RK / width)
            return sum(float((place_RK[:, i] == place_RK[:, j]).float().mean()) for i, j in pairs) / len(pairs)

        return _bisect(tied, share)


def _bisect(rising: Callable[[float], float], target: float) -> float:
    """Where a rising function meets the target, between e^-7 and e^5."""
    low, high = -7.0, 5.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(math.exp(middle)) > target else (middle, high)
    return math.exp(low)


def fit(x_RKF: Tensor, rankings: list[Ranking], **options: str) -> tuple[Tensor, RankingLoss]:
    """The weights of least loss (with a trace of weight decay, for data that can be separated), and the loss."""
    loss = RankingLoss(rankings, **options)  # type: ignore[arg-type]
    weight_F = torch.zeros(FEATURES, requires_grad=True)
    targets = loss.targets(rankings)
    optimizer = torch.optim.LBFGS([weight_F, *loss.parameters()], max_iter=100, line_search_fn="strong_wolfe")

    def step() -> float:
        optimizer.zero_grad()
        value = loss((x_RKF @ weight_F).reshape(-1), targets) / len(rankings) + 1e-4 * weight_F.square().sum()
        value.backward()
        return float(value.detach())

    optimizer.step(step)
    return weight_F.detach(), loss


def accuracy(u_RK: Tensor, r_RK: Tensor) -> float:
    """The expected share of noisy strict verdicts that r orders as the annotator does: sigmoid(u_i - u_j) where
    r_i > r_j. With r = u it is the ceiling, the mean of sigmoid(|u_i - u_j|)."""
    found = []
    for i, j in combinations(range(u_RK.shape[1]), 2):
        sign_R = torch.sign(r_RK[:, i] - r_RK[:, j])
        found.append(torch.sigmoid(sign_R * (u_RK[:, i] - u_RK[:, j])).mean())
    return float(torch.stack(found).mean())


def recovered(seed: int, k: int, prompts: int, **options: str) -> float:
    """Held-out accuracy over its ceiling."""
    world = World(seed=seed)
    x_RKF, u_RK = world.responses(prompts, k)
    weight_F, _ = fit(x_RKF, world.rankings(u_RK), **options)
    x_RKF, u_RK = world.responses(HELDOUT, k)
    return accuracy(u_RK, x_RKF @ weight_F) / accuracy(u_RK, u_RK)


@dataclass(kw_only=True)
class Gain:
    """Davidson's accuracy less another treatment's, on the same rankings: the mean over the seeds and the ends of its
    95 % interval (paired, Student's t)."""

    mean: float
    low: float
    high: float
    accuracy: float  # the other's


def gain(ties: str, k: int, prompts: int, instead: str = "drop") -> Gain:
    """On rankings of which 30 % of the pairs tie."""
    gains, base = [], []
    for seed in range(SEEDS):
        world = World(seed=seed)
        x_RKF, u_RK = world.responses(prompts, k)
        rankings = world.rankings(u_RK, ties, 0.3)
        held_x, held_u = world.responses(HELDOUT, k)
        found = [accuracy(held_u, held_x @ fit(x_RKF, rankings, ties=kind)[0]) for kind in ("davidson", instead)]
        gains.append(found[0] - found[1])
        base.append(found[1])
    each = torch.tensor(gains, dtype=torch.float64)
    mean, half = float(each.mean()), T39 * float(each.std()) / SEEDS**0.5
    return Gain(mean=mean, low=mean - half, high=mean + half, accuracy=sum(base) / SEEDS)


def main() -> None:
    print("| K | prompts | loss | accuracy / ceiling, 10 seeds |\n|---|---|---|---|")
    for k, prompts in ((2, 600), (4, 200), (9, 60)):
        for options in ({}, {"loss": "plackett_luce", "ties": "drop"}):
            found = [recovered(seed, k, prompts, **options) for seed in range(10)]
            name = options.get("loss", "pairs")
            print(f"| {k} | {prompts} | `{name}` | {sum(found) / 10:.3f} ({min(found):.3f} to {max(found):.3f}) |")
    print("\n| 30 % ties by | K | prompts | against | its accuracy | gain (95 % interval) |\n|---|---|---|---|---|---|")
    for ties, k, prompts in (("davidson", 2, 200), ("threshold", 2, 200), ("bins", 4, 60)):
        for instead in ("drop", "half"):
            g = gain(ties, k, prompts, instead)
            interval = f"{g.mean:+.4f} ({g.low:+.4f} to {g.high:+.4f})"
            print(f"| {ties} | {k} | {prompts} | `{instead}` | {g.accuracy:.4f} | {interval} |")


if __name__ == "__main__":
    main()
