"""What is read is what the whole model gives, gradients included; the rest of the last layer is not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_toys import roles_of
from test_rollout import make
from torch import nn
from transformers import LlamaForSequenceClassification

from rlhf.last_layer import last_layer_at
from rlhf.models import enable_activation_checkpointing
from rlhf.ppo.roles import remove_dropout
from rlhf.scoring import pad_right, read_scores

IDS_BT = torch.tensor([[3, 4, 5, 6, 7], [9, 2, 8, 0, 0]])
TAKE_N = torch.tensor([1, 4, 7])


def hidden_at(body: Any, *, picked: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The hidden states at TAKE_N and the gradients of a loss on them."""
    if picked:
        with last_layer_at(body, TAKE_N):
            hidden_BTD = body(input_ids=IDS_BT, use_cache=False).last_hidden_state
    else:
        hidden_BTD = body(input_ids=IDS_BT, use_cache=False).last_hidden_state
    read_ND = hidden_BTD.flatten(0, 1)[TAKE_N]
    (read_ND * torch.arange(read_ND.numel()).reshape(read_ND.shape).cos()).sum().backward()
    grads = [p.grad.clone() for p in body.parameters() if p.grad is not None]
    body.zero_grad(set_to_none=True)
    return read_ND.detach(), grads


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_the_whole_layer(kind: str, checkpointing: bool) -> None:
    body = make(kind).base_model
    remove_dropout(body)
    if checkpointing:
        enable_activation_checkpointing(body)
        body.train()
    (whole, whole_grads), (some, some_grads) = hidden_at(body, picked=False), hidden_at(body, picked=True)
    torch.testing.assert_close(some, whole, rtol=1e-12, atol=1e-14)
    assert len(whole_grads) == len(some_grads) > 10
    for a, b in zip(some_grads, whole_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("kind", "names"), [("llama", ["mlp", "o_proj", "q_proj"]), ("gpt2", ["mlp"])])
def test_the_blocks_run_at_the_places_that_are_read(kind: str, names: list[str]) -> None:
    body = make(kind).base_model
    seen: dict[str, list[int]] = {}
    for name, module in body.named_modules():
        if (last := name.rsplit(".", 1)[-1]) in names:
            module.register_forward_hook(lambda _m, args, _o, n=last: seen.setdefault(n, []).append(args[0].shape[1]))
    for _ in range(2):  # the first time the model is tried on a row of its own, too
        seen.clear()
        with last_layer_at(body, TAKE_N):
            body(input_ids=IDS_BT, use_cache=False)
    assert sorted(seen) == names
    for counts in seen.values():
        assert counts[:-1] == [5] * (len(counts) - 1) and counts[-1] == len(TAKE_N)


def test_an_adapted_layer_is_picked_from_too() -> None:
    policy = roles_of("llama").policy
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1)
    whole = policy(input_ids=IDS_BT, use_cache=False).logits.flatten(0, 1)[TAKE_N]
    inner_mlp = policy.inner.base_model.layers[-1].mlp
    shapes: list[int] = []
    with last_layer_at(policy, TAKE_N):
        pass  # the model is tried on a row of its own
    inner_mlp.register_forward_hook(lambda _m, args, _o: shapes.append(args[0].shape[1]))
    with last_layer_at(policy, TAKE_N):
        some = policy(input_ids=IDS_BT, use_cache=False).logits.flatten(0, 1)[TAKE_N]
    torch.testing.assert_close(some, whole, rtol=1e-12, atol=1e-14)
    assert shapes == [3]


def test_a_small_vocabulary_is_no_reason_to_run_it_whole() -> None:
    body = make("llama").base_model
    body.set_input_embeddings(nn.Embedding(3, 16, dtype=torch.float64))
    counts: list[int] = []
    with last_layer_at(body, torch.tensor([1])):
        body.layers[-1].mlp.register_forward_hook(lambda _m, args, _o: counts.append(args[0].shape[1]))
        body(input_ids=torch.tensor([[0, 1, 2]]), use_cache=False)
    assert counts == [1]


class Neighbours(nn.Module):
    """A feed-forward block that is none: it looks one place to the left."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.up(x_BTD + torch.roll(x_BTD, 1, dims=1))
        return out


def test_a_block_that_looks_at_its_neighbours_runs_whole() -> None:
    body = make("llama").base_model
    body.layers[-1].mlp = Neighbours(16)
    whole, _ = hidden_at(body, picked=False)
    some, _ = hidden_at(body, picked=True)
    torch.testing.assert_close(some, whole, rtol=1e-12, atol=1e-14)


def test_scores_are_those_of_the_whole_model() -> None:
    config = make("llama").config
    config.num_labels, config.pad_token_id = 1, 0
    model = LlamaForSequenceClassification(config).double().eval()
    rows = [[3, 4, 5, 6, 7], [9, 2, 8], [5]]
    alone = [float(model(input_ids=torch.tensor([row]), use_cache=False).logits) for row in rows]
    with torch.no_grad():
        together = read_scores(model, *pad_right(rows, 0, torch.device("cpu")))
    assert together.tolist() == pytest.approx(alone, rel=1e-6)
