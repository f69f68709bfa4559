"""Any sequence classifier as the reward: toxicity, sentiment, a preference model with a head of its own.

    python -m rlhf stage=ppo reward=classifier reward.path=path reward.label=toxic reward.activation=softmax \\
        reward.scale=-1

It reads text with its own tokenizer, whatever the policy's is. docs/custom-reward.md has a worked example.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rlhf.classifier import Classifier, ClassifierSpec
from rlhf.errors import ConfigError


@dataclass(kw_only=True)
class ClassifierReward(ClassifierSpec):
    """`scale` times the classifier's score of each response.

    template: the text that is judged, with {response} and, if wanted, {prompt}.
    scale: -1 pays for the absence of the label.
    micro_tokens: tokens of one forward pass; device: auto, cpu or cuda; trust_remote_code: PPO gives that of the model.
    The other options are those of ClassifierSpec.
    """

    template: str = "{response}"
    scale: float = 1.0
    micro_tokens: int = 8192
    device: str = "auto"
    trust_remote_code: bool = False
    classifier: Classifier = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.classifier = Classifier(
            self, "reward", device=self.device, micro_tokens=self.micro_tokens, trust_remote_code=self.trust_remote_code
        )

    @classmethod
    def check_node(cls, arguments: Mapping[str, Any], key: str) -> None:
        """ConfigError for what is wrong in a node of the configuration, before anything is trained or loaded."""
        node = cls.__new__(cls)
        for item in fields(cls):
            if item.init:
                setattr(node, item.name, arguments.get(item.name, item.default))
        node.check(key)

    def check(self, key: str) -> int:
        """As that of ClassifierSpec, with the reward's own options."""
        scale = self.scale if isinstance(self.scale, int | float) else math.nan
        if isinstance(scale, bool) or not math.isfinite(scale) or scale == 0:
            raise ConfigError(f"{key}.scale={self.scale}: must be a number other than 0")
        _check_template(self.template, f"{key}.template")
        return super().check(key)

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """One number a response."""
        pairs = zip(prompts, responses, strict=True)
        texts = [self.template.format(prompt=prompt, response=response) for prompt, response in pairs]
        return [self.scale * score for score in self.classifier.score(texts)]


def _check_template(template: str, key: str) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{key}: {template!r}: {error}") from error
    names = [name for _, name, _, _ in parts if name is not None]
    plain = not any(how or convert for _, _, how, convert in parts)
    if not plain or not set(names) <= {"prompt", "response"} or "response" not in names:
        raise ConfigError(
            f"{key}: {template!r}: must hold {{response}}, may hold {{prompt}} and nothing else in braces"
        )  # fmt: skip
