"""The model of memory behind `do=plan`: bytes of each role on one rank for each engine, and of each stage's passes.

A role that trains t of its h weights holds, in float32: weights 4 h, gradients 4 t, Adam's two moments 8 t. Of N ranks
    single        each holds all of it
    ddp           too, and a second copy of the gradients, from which they are sent
    zero1         moments, and the float32 copy that the optimizer steps on: 12 t / N; weights and gradients whole
    zero2         gradients 4 t / N too
    zero3         weights 4 h / N too, which are stepped on: 8 t / N; up to `LIVE` weights at a time are gathered
    zero3_offload as zero3, with the optimizer's share in the machine's memory
A pass (activations, logits, and what the backward pass makes on its way) is not a formula: it is made on tensors
without data (rlhf.memory), forward and backward, at the largest shape that the configuration allows.

Shapes: B rows, T tokens, N places that are read, V vocabulary, D hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.config import Config
from rlhf.encoders import is_encoder
from rlhf.engine.deepspeed import BUCKET
from rlhf.kv_cache import BLOCK
from rlhf.last_layer import last_layer_at, trust_blocks
from rlhf.logprobs import logprob_and_entropy
from rlhf.lora import is_lora
from rlhf.packed import convenient
from rlhf.recorded import spanned
from rlhf.rollout import NOISE_BLOCK, NOISE_STEPS

FLOAT = 4  # bytes: weights are float32 also with model.dtype=bfloat16, where only the arithmetic is not
LIVE = 5 * BUCKET  # weights that ZeRO-3 gathers at a time while it trains, at most
HELDOUT_NUMBERS, HELDOUT_TOKENS = 1 << 24, 4096  # of logits, and of tokens at most, in a pass of stages.sft.measure


@dataclass(frozen=True, slots=True)
class Role:
    """A model in memory: its weights, how many of them are trained, and bytes by kind on one rank."""

    name: str
    held: int
    trained: int

    def weights(self, engine: str, ranks: int) -> float:
        return FLOAT * self.held / (ranks if engine.startswith("zero3") else 1)

    def gradients(self, engine: str, ranks: int) -> float:
        return FLOAT * self.trained / (ranks if engine.startswith(("zero2", "zero3")) else 1)

    def optimizer(self, engine: str, ranks: int) -> float:
        """Adam's moments, under ZeRO-1 and 2 with the copy of the weights that it steps on."""
        if engine == "zero3_offload":
            return 0.0
        copies = {"zero1": 3, "zero2": 3, "zero3": 2}.get(engine)
        return 2 * FLOAT * self.trained if copies is None else copies * FLOAT * self.trained / ranks

    def sent(self, engine: str) -> float:
        """Gradients on their way to other ranks."""
        if engine == "single":
            return 0.0
        return FLOAT * (min(self.trained, BUCKET) if engine.startswith("zero") else self.trained)

    def gathered(self, engine: str) -> float:
        """Weights of other ranks that a pass needs."""
        return FLOAT * min(self.held, LIVE) if engine.startswith("zero3") else 0.0

    @property
    def checkpoint(self) -> float:
        """The trained weights and Adam's moments, over all ranks."""
        return 3 * FLOAT * self.trained


# ---- passes


@dataclass(frozen=True, slots=True)
class Shapes:
    """The largest tensors that a pass may meet: `rows` of `tokens` each, `passes` before a step (two stand for more),
    and how many places are read (`take`)."""

    rows: int
    tokens: int
    passes: int = 1
    take: int = 0
    on_cpu: bool = True


def largest_shapes(cfg: Config, stage: str, ranks: int, responses: int = 1) -> Shapes:
    """Of a stage's training passes on one rank, at the longest rows. responses: of a ranking, which are in one loss.
    PPO's passes are cut by tokens, and of each row the response alone is read."""
    if stage == "ppo":
        tokens, mine = cfg.data.max_prompt_length + cfg.ppo.max_new_tokens, max(1, cfg.ppo.minibatch // ranks)
        rows = max(1, min(mine, cfg.ppo.micro_tokens // tokens))
        return Shapes(rows, tokens, min(2, -(-mine // rows)), rows * cfg.ppo.max_new_tokens)
    optim = getattr(cfg, stage).optim
    micro = min(optim.micro_batch, max(1, optim.batch // ranks))
    return Shapes(micro * responses, cfg.data.max_length, min(2, -(-optim.batch // (micro * ranks))))


def reading_shapes(cfg: Config, stage: str, config: Any) -> Shapes:
    """Of SFT's held-out loss, which reads all logits of a pass; of the first step of PPO's decoding, which reads one of
    each row."""
    if stage == "ppo":
        rows = min(cfg.ppo.batch, cfg.ppo.decode_group)
        return Shapes(rows, cfg.data.max_prompt_length, take=rows)
    tokens = min(HELDOUT_TOKENS, max(512, HELDOUT_NUMBERS // config.get_text_config().vocab_size))
    rows = max(1, tokens // cfg.data.max_length)
    return Shapes(rows, cfg.data.max_length, take=rows * cfg.data.max_length)


def loss_pass(model: Any, shapes: Shapes) -> None:
    """SFT's."""
    ids_BT = _ids(model, shapes)
    mask_BT = torch.ones_like(ids_BT)  # a mask is built from it, as for padded rows
    hidden_BTD = _body(model)(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    hidden_ND = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1])
    loss = Tiles.apply(hidden_ND, model.get_output_embeddings().weight, shapes.on_cpu)  # type: ignore[no-untyped-call]
    loss.backward()


class Tiles(torch.autograd.Function):
    """What TRL's output layer holds, without what it computes (trl/kernels/chunked_logprob.py of TRL 1.16): logits in
    tiles of 4,096 tokens and 32,768 places of the vocabulary, forward and again backward. A GPU's kernels work inside
    the tile, where the CPU makes copies of it; what is never written of a tile takes no memory on the CPU."""

    TOKENS, WIDTH = 4096, 32768
    COPIES = (3, 7)  # of numbers at once, forward and backward; beside them a mask

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, on_cpu: bool) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        ctx.on_cpu = on_cpu
        Tiles._hold(hidden_ND, weight_VD, on_cpu, Tiles.COPIES[0])
        return hidden_ND.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden_ND, weight_VD = ctx.saved_tensors
        grad_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_ND = torch.zeros_like(hidden_ND)
        Tiles._hold(hidden_ND, weight_VD, ctx.on_cpu, Tiles.COPIES[1])
        return grad_ND, grad_VD, None

    @staticmethod
    def _hold(hidden_ND: Tensor, weight_VD: Tensor, on_cpu: bool, copies: int) -> None:
        tokens, width = min(len(hidden_ND), Tiles.TOKENS), min(len(weight_VD), Tiles.WIDTH)
        tile = hidden_ND.new_empty(tokens, width if on_cpu else Tiles.WIDTH)
        if on_cpu:
            held = [tile.clone() for _ in range(copies)]
            held.append(tile > 0)


def score_pass(model: Any, shapes: Shapes) -> None:
    """A reward model's, which is read at the last token of each row. A decoder's head is too small to matter."""
    ids_BT = _ids(model, shapes)
    plain = model.get_base_model() if is_lora(model) else model
    if is_encoder(plain):
        out_BD = plain(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    else:
        out_BD = _read(model, ids_BT, shapes.rows)
    out_BD.sum().backward()


def policy_pass(model: Any, shapes: Shapes) -> None:
    """PPO's: log-probabilities of the places that are read, and nowhere else."""
    logits_NV = model.get_output_embeddings()(_read(model, _ids(model, shapes), shapes.take))
    logp_N, _ = logprob_and_entropy(logits_NV, torch.zeros(shapes.take, dtype=torch.long), 1.0)
    del logits_NV
    logp_N.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated


def reading_pass(model: Any, shapes: Shapes) -> None:
    """Without gradients: logits of `take` places, a copy of them and its softmax."""
    with torch.no_grad():
        ids_BT = torch.zeros(shapes.rows, shapes.tokens, dtype=torch.long)
        hidden_ND = _body(model)(input_ids=ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
        logits_NV = model.get_output_embeddings()(hidden_ND[: shapes.take])
        logits_NV.clone().log_softmax(-1)


def _read(model: Any, ids_BT: Tensor, places: int) -> Tensor:
    """hidden_ND of so many places: only there is the last layer whole."""
    body, take_N = _body(model), torch.zeros(places, dtype=torch.long)
    trust_blocks(body)
    with last_layer_at(body, take_N):
        hidden_BTD: Tensor = body(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD.flatten(0, 1)[take_N]


def _ids(model: Any, shapes: Shapes) -> Tensor:
    """ids_BT. With several passes before a step the last one finds the gradients of those before, and adds to them."""
    if shapes.passes > 1:
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
    return torch.zeros(shapes.rows, shapes.tokens, dtype=torch.long)


def _body(model: Any) -> Any:
    """The model without its output layer or head."""
    plain = model.get_base_model() if is_lora(model) else model
    return getattr(plain, plain.base_model_prefix)


# ---- decoding


def cache_bytes(config: Any, cfg: Config, *, recorded: bool) -> int:
    """PPO's key-value cache: keys and values of each layer and key-value head, for a decode group's longest rows.

    recorded: with the room that recorded steps ask for (`rlhf.recorded`).
    """
    config, shapes = config.get_text_config(), reading_shapes(cfg, "ppo", config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows, tokens = shapes.rows, shapes.tokens + cfg.ppo.max_new_tokens
    room = (convenient(rows), spanned(tokens)) if recorded else (rows, -(-tokens // BLOCK) * BLOCK)
    return int(2 * FLOAT * config.num_hidden_layers * heads * width * room[0] * room[1])


def noise_bytes(config: Any, cfg: Config) -> int:
    """The noise that a decode group's samples are chosen by: drawn in float64, stacked, and made as the logits are."""
    vocabulary = config.get_text_config().vocab_size
    numbers = reading_shapes(cfg, "ppo", config).rows * max(1, min(NOISE_STEPS, NOISE_BLOCK // vocabulary)) * vocabulary
    return int(numbers * (8 + 8 + FLOAT))
