"""The reward that PPO is paid by default: a reward model trained by stage=rm, or any folder of that kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.adapters import SharedBase
from rlhf.config import LaunchConfig, ModelConfig
from rlhf.models import load_reward_model, pick_device
from rlhf.render import Renderer, load_tokenizer
from rlhf.scoring import score_ids


class TrainedReward:
    """The score of a sequence classifier at the end token, raw: PPO normalises it.

    artifact: folder (or hub id) of the model, with its own tokenizer, which need not be the policy's.
    micro_tokens: tokens of one forward pass, padding included; it cannot change the result.
    device: auto, cpu or cuda.
    trust_remote_code: run code that the folder holds; PPO gives model.trust_remote_code.
    shared_base: given by PPO with LoRA. A reward model that is an adapter on this base is not loaded a second time.
    """

    def __init__(
        self, artifact: str, micro_tokens: int = 8192, device: str = "auto", trust_remote_code: bool = False,
        shared_base: SharedBase | None = None,
    ) -> None:  # fmt: skip
        config = ModelConfig(path=artifact, trust_remote_code=trust_remote_code)
        where = pick_device(LaunchConfig(device=device))
        self.micro_tokens = micro_tokens
        self.renderer = Renderer(load_tokenizer(artifact, config))
        shared = shared_base.scorer(artifact, where) if shared_base is not None else None
        self.model: Any = load_reward_model(artifact, config, where) if shared is None else shared

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """One reward a response. The prompt is `row["messages"]`, as the reward model was trained, not its text."""
        ids = [self.renderer.full_ids(row["messages"], text)[0] for row, text in zip(rows, responses, strict=True)]
        return score_ids(self.model, ids, self.micro_tokens)
