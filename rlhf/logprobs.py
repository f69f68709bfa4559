"""Log-probabilities of given responses under a model: which places of a padded micro-batch predict them, and reading
those and no others.

Shapes: B rows, T tokens of a padded row, N response tokens of all rows of a micro-batch laid end to end, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlhf.last_layer import last_layer_at
from rlhf.scoring import micro_batches


@dataclass(kw_only=True, slots=True)
class Rows:
    """A right-padded micro-batch: no mask is needed, since a causal model never looks right."""

    ids_BT: Tensor
    take_N: Tensor  # places in the flattened [B*T] that predict a response token
    targets_N: Tensor  # the tokens predicted there
    counts: list[int]  # response tokens of each row, in row order


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off inside, as it was outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def collate(prompts: Sequence[list[int]], responses: Sequence[list[int]], device: torch.device) -> Rows:
    """Prompt and response ids, joined and padded on the right. Token t of a row is predicted at place t - 1."""
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    padded: list[list[int]] = []
    take: list[int] = []
    targets: list[int] = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        padded.append(prompt + response + [0] * (longest - len(prompt) - len(response)))
        first = row * longest + len(prompt) - 1
        take.extend(range(first, first + len(response)))
        targets.extend(response)
    return Rows(
        ids_BT=torch.tensor(padded, device=device),
        take_N=torch.tensor(take, dtype=torch.long, device=device),
        targets_N=torch.tensor(targets, dtype=torch.long, device=device),
        counts=[len(response) for response in responses],
    )


def response_logits(model: Any, rows: Rows) -> Tensor:
    """logits_NV at the places that predict a response token, and nowhere else.

    The hidden states are picked in front of the output layer, so that what a model does behind it (soft caps, scales)
    still happens and no [B, T, V] tensor ever exists.
    """

    def pick(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTH = args[0]
        return (hidden_BTH.flatten(0, 1)[rows.take_N].unsqueeze(0),)

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        with last_layer_at(model, rows.take_N):
            logits: Tensor = model(input_ids=rows.ids_BT, use_cache=False).logits
    finally:
        handle.remove()
    return logits.squeeze(0)


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """log p(target) at `temperature`, at least in fp32."""
    return -functional.cross_entropy(_at(logits_NV, temperature), targets_N, reduction="none")


class _LogprobAndEntropy(torch.autograd.Function):
    """One softmax for both, kept for the backward pass: log_softmax and gather would write four tensors of its size."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logp_NV = logits_NV.log_softmax(-1)
        logp_N = logp_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
        p_NV = logp_NV.exp()
        # The clamp keeps 0 * log 0 at 0. It comes after `logp_N` was read.
        entropy_N = -torch.linalg.vecdot(p_NV, logp_NV.clamp_(min=-1e4))
        ctx.save_for_backward(p_NV, targets_N)
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _entropy: Tensor) -> tuple[Tensor, None]:
        p_NV, targets_N = ctx.saved_tensors
        grad_NV = p_NV * -grad_N.unsqueeze(1)
        return grad_NV.scatter_add_(1, targets_N.unsqueeze(1), grad_N.unsqueeze(1)), None


def logprob_and_entropy(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log p(target), entropy in nats) of each row at `temperature`, at least in fp32. The entropy has no gradient."""
    out: tuple[Tensor, Tensor] = _LogprobAndEntropy.apply(_at(logits_NV, temperature), targets_N)  # type: ignore[no-untyped-call]
    return out


def _at(logits_NV: Tensor, temperature: float) -> Tensor:
    return widen(logits_NV) if temperature == 1 else widen(logits_NV) / temperature


def widen(x: Tensor) -> Tensor:
    """At least fp32: half-precision logits are not good enough to take a softmax of."""
    return x if x.dtype == torch.float64 else x.float()


def sequence_logprobs(
    model: Any,
    prompts_ids: Sequence[list[int]],
    responses_ids: Sequence[list[int]],
    temperature: float = 1.0,
    micro_tokens: int = 8192,
) -> list[Tensor]:
    """Log-probabilities of the response tokens: a CPU tensor [response length] a row, in order, no gradient."""
    device = next(model.parameters()).device
    out: list[Tensor] = [torch.empty(0)] * len(prompts_ids)
    lengths = [len(p) + len(r) for p, r in zip(prompts_ids, responses_ids, strict=True)]
    with torch.no_grad(), evaluating(model):  # not inference mode: a caller may go on computing
        for cut in micro_batches(lengths, micro_tokens):
            rows = collate([prompts_ids[i] for i in cut], [responses_ids[i] for i in cut], device)
            logp_N = token_logprobs(response_logits(model, rows), rows.targets_N, temperature).cpu()
            for i, logp in zip(cut, torch.split(logp_N, rows.counts), strict=True):
                out[i] = logp.clone()
    return out
