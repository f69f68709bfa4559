"""What samples PPO's responses: a protocol, our own decode loop behind it, and how another one is plugged in.

    python -m rlhf stage=ppo rollout._target_=my_package.MyRollout

The start-up checks hold an engine to what it says: log-probabilities that are not the policy's stop the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rlhf.errors import ConfigError, TrainingError
from rlhf.plugins import build, check_arguments, find
from rlhf.rollout import Response, Sampling, generate


class RolloutEngine(Protocol):
    def generate(
        self, policy: Any, prompts_ids: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling
    ) -> Sequence[Response]:
        """One response a prompt, in order, from the policy as its weights are now.

        `seeds[i]` alone must decide the noise of sample i, or a resumed run is not the unbroken one.
        """


class HfRollout:
    """Our decode loop over the model's forward pass and a key-value cache (rlhf.rollout). Needs nothing else."""

    def generate(
        self, policy: Any, prompts_ids: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Response]:
        """See rlhf.rollout.generate."""
        return generate(policy, prompts_ids, seeds, sampling)


def check_engine(node: Any) -> None:
    """ConfigError, naming the key, unless the `rollout` node names a class that its arguments fit."""
    target = find(node, "rollout")
    check_arguments(target, {name: value for name, value in node.items() if name != "_target_"}, "rollout")
    if not callable(getattr(target, "generate", None)):
        raise ConfigError(
            f"rollout._target_: {node['_target_']} has no method generate(policy, prompts, seeds, sampling)"
        )


def build_engine(node: Any) -> RolloutEngine:
    """The engine that the `rollout` node names."""
    check_engine(node)
    engine: RolloutEngine = build(node, "rollout")
    return engine


def checked_responses(responses: Sequence[Response], prompts: int, sampling: Sampling) -> Sequence[Response]:
    """The responses, or a TrainingError that names what an engine got wrong."""
    if len(responses) != prompts:
        raise TrainingError(f"the rollout engine gave {len(responses)} responses for {prompts} prompts")
    for number, response in enumerate(responses):
        ended = bool(response.ids) and response.ids[-1] == sampling.eos_id
        if not response.ids or len(response.ids) != len(response.logprobs):
            what = f"{len(response.ids)} tokens with {len(response.logprobs)} log-probabilities"
        elif len(response.ids) > sampling.max_new_tokens:
            what = f"{len(response.ids)} tokens, more than ppo.max_new_tokens={sampling.max_new_tokens}"
        elif response.finished is not ended or sampling.eos_id in response.ids[:-1]:
            what = "an end token that is not where `finished` says"
        else:
            continue
        raise TrainingError(f"the rollout engine gave response {number} with {what}")
    return responses
