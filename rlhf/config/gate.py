"""What the gates measure and demand."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlhf.config.parts import require


class GateMode(Enum):
    enforce = "enforce"
    observe = "observe"


GRADES = ("smoke", "basic", "classifier", "guard")  # what a scorer may be trusted with, least first


@dataclass
class NoninferiorityConfig:
    """A paired comparison on the same prompts with the same seeds: the rate may not be that much above another's."""

    vs: list[str] = field(default_factory=list)  # sft, base, or names of gate.baselines; empty: no comparison
    margin: float | None = None  # a rate: .01 is one point; of lm_eval in the metric's own unit

    def check(self, key: str) -> None:
        if self.margin is None:
            require(not self.vs, f"{key}.margin", "must be given with `vs`: by how much the rate may be the higher")
        else:
            require(bool(self.vs), f"{key}.vs", "names what is compared with: sft, base, or a name of gate.baselines")
            require(self.margin > 0, f"{key}.margin", f"must be above 0, not {self.margin}")


@dataclass
class TaskConfig:
    """A task of lm-evaluation-harness, for checks of kind lm_eval."""

    name: str | None = None  # of a task, a tag or a group, or the path of a task's YAML file
    include_path: str | None = None  # folder of YAML files of your own, looked through before those of the harness
    filter: str | None = None  # whose answers are scored; null: the task's only one
    num_fewshot: int | None = None  # examples before each document; null: as many as the task says
    chat_template: bool = False  # whether documents are put into the model's chat template
    documents: int | None = None  # at most so many of each task, drawn with the gate's seed; null: all

    def check(self, key: str) -> None:
        alone = TaskConfig(name=self.name) == self
        require(self.name is not None or alone, f"{key}.name", "names the task that the other keys are about")
        for name, least in (("num_fewshot", 0), ("documents", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"{key}.{name}", f"must be at least {least}, not {value}")


@dataclass
class CheckConfig:
    """One check of a gate. It passes when the one-sided bound of its estimate keeps the limit."""

    kind: str = ""  # a name of rlhf.gates.checks; empty: the check's own id
    max: float | None = None  # the upper bound must not exceed it
    min: float | None = None  # the lower bound must not fall below it
    within: list[float] | None = None  # [low, high]: neither bound may lie outside
    noninferiority: NoninferiorityConfig = field(default_factory=NoninferiorityConfig)  # of a rate, with `max` or alone
    min_n: int = 1  # fewer samples are INCONCLUSIVE
    record_only: bool = False  # measured and reported, never decides
    waivable: bool = True  # false: no waiver lets a model pass that this check stopped
    where: dict[str, Any] = field(default_factory=dict)  # only the prompts whose tags have these values
    group_by: str | None = None  # the tag whose values are compared (group_gap)
    suite: str | None = None  # a shipped suite or a file, in the place of the held-out gate prompts
    suite_format: str | None = None  # of that file; None: what its first row looks like
    metric: str | None = None  # of rouge: rouge1, rouge2 or rougeL (null); of lm_eval: a metric of the task
    task: TaskConfig = field(default_factory=TaskConfig)  # of lm_eval
    subsets_required: list[str] = field(default_factory=list)  # of the rankings; without one the check is INVALID
    min_grade: str | None = None  # of the scorer: smoke, basic, classifier or guard; one below it is INVALID

    def check(self, key: str) -> None:
        limits = sum(limit is not None for limit in (self.max, self.min, self.within))
        alone = bool(self.noninferiority.vs) and not limits
        require(
            limits == (0 if self.record_only or alone else 1), key,
            "needs exactly one of `max`, `min` and `within` (or `noninferiority`), or `record_only: true` and none",
        )  # fmt: skip
        require(
            not (self.record_only and self.noninferiority.vs), f"{key}.noninferiority", "decides, record_only does not"
        )
        margin = self.noninferiority.margin
        require(
            margin is None or margin < 1 or self.task.name is not None, f"{key}.noninferiority.margin",
            f"must lie between 0 and 1, not {margin}",
        )  # fmt: skip
        low, high = self.within if self.within is not None and len(self.within) == 2 else (0.0, 0.0)
        require(self.within is None or low < high, f"{key}.within", f"must be [low, high], not {self.within}")
        require(
            self.min_grade is None or self.min_grade in GRADES, f"{key}.min_grade",
            f"must be one of {', '.join(GRADES)}, not {self.min_grade!r}",
        )  # fmt: skip


SCORER_OPTIONS = {
    "lexicon": ("lexicon",),
    "classifier": ("path", "revision", "label", "activation", "window", "stride"),
    "guard": ("path", "revision", "template", "safe_token", "unsafe_token", "min_mass"),
    "remote": ("url", "key_variable", "timeout", "attempts", "grade"),
}
NEEDED = {"lexicon": (), "classifier": ("path", "label", "activation"),
          "guard": ("path", "template", "safe_token", "unsafe_token"), "remote": ("url", "grade")}  # fmt: skip
REMOTE_GRADES = ("smoke", "basic", "classifier")  # nobody here can see what answers, so never `guard`


@dataclass
class ScorerConfig:
    kind: str = "lexicon"  # or classifier, guard, remote
    lexicon: str | None = None  # a file, one term a line; None: the list that the package ships
    path: str | None = None  # of a classifier or guard: a folder, or a hub id with `revision`
    revision: str | None = None  # a full commit hash of the hub
    label: Any = None  # the name or index of the label that says toxic
    activation: str | None = None  # sigmoid or softmax
    window: int | None = None  # tokens read at once; None: what the model takes, at most 512
    stride: int | None = None  # tokens from window to window; None: half a window
    template: str | None = None  # the guard's whole prompt, with {text} where the response goes
    safe_token: str | None = None  # what the guard answers first where the response is safe, one token
    unsafe_token: str | None = None  # likewise, where the response is unsafe
    min_mass: float | None = None  # probability that the two must have together; None: .5
    url: str | None = None  # POST {"texts"} -> {"scores"}
    key_variable: str | None = None  # environment variable that is sent as `Authorization: Bearer`
    timeout: float | None = None  # seconds for one attempt; None: 30
    attempts: int | None = None  # of one request, the first included; None: 5
    grade: str | None = None  # what you take the remote scorer for: smoke, basic or classifier
    canaries: str | None = None  # JSONL with `text` and `toxic`; None: those that the package ships
    min_sensitivity: float = 0.8  # lower bound that the scorer must show on the toxic canaries, else INVALID
    min_specificity: float = 0.8  # likewise, of the clean canaries

    def check(self, key: str) -> None:
        known = ", ".join(SCORER_OPTIONS)
        require(self.kind in SCORER_OPTIONS, f"{key}.kind", f"no scorer of kind {self.kind!r}; there are {known}")
        for name in dict.fromkeys(name for names in SCORER_OPTIONS.values() for name in names):
            owners = " or ".join(kind for kind, names in SCORER_OPTIONS.items() if name in names)
            foreign = name not in SCORER_OPTIONS[self.kind] and getattr(self, name) is not None
            require(not foreign, f"{key}.{name}", f"belongs to {key}.kind={owners}, and the kind is {self.kind}")
        lacking = [f"{key}.{name}" for name in NEEDED[self.kind] if getattr(self, name) is None]
        require(not lacking, ", ".join(lacking), f"must be given with {key}.kind={self.kind}")
        require(
            self.activation in (None, "sigmoid", "softmax"), f"{key}.activation",
            f"must be sigmoid or softmax, so that scores lie in [0, 1], not {self.activation!r}",
        )  # fmt: skip
        grades = ", ".join(REMOTE_GRADES)
        require(self.grade in (None, *REMOTE_GRADES), f"{key}.grade", f"must be one of {grades}, not {self.grade!r}")


@dataclass
class GateConfig:
    policy_id: str = "default"  # a name for the limits, shown in every verdict
    mode: GateMode = GateMode.enforce  # stop at a gate that fails, or run on and stamp what follows UNPROMOTED
    alpha: float = 0.05  # the chance that a model exactly at a limit passes that check
    prompts: int = 300  # held-out prompts that are sampled
    k: int = 1  # responses a prompt; a prompt counts as bad when any of its k is
    temperature: float = 1.0  # of the gate's samples
    max_new_tokens: int | None = None  # None: that of ppo
    refusal_patterns: list[str] = field(default_factory=list)  # regular expressions; a match is a refusal
    baselines: dict[str, str] = field(default_factory=dict)  # folders of further models to compare with, by name
    approvers: list[str] = field(default_factory=list)  # who may approve a waiver; empty: the policy accepts none
    waiver: str | None = None  # a file of waivers (docs/gates.md), for verdicts of this command that did not pass
    show_examples: bool = False  # print the worst responses with the verdict, not only how to find them
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    sft: dict[str, CheckConfig] = field(default_factory=dict)
    rm: dict[str, CheckConfig] = field(default_factory=dict)
    ppo: dict[str, CheckConfig] = field(default_factory=dict)

    def check(self, key: str) -> None:
        require(self.temperature > 0, f"{key}.temperature", f"must be positive, not {self.temperature}")
        require(0 < self.alpha < 0.5, f"{key}.alpha", f"must lie between 0 and .5, not {self.alpha}")
        require(self.prompts > 0 and self.k > 0, f"{key}.prompts", "gate.prompts and gate.k must be positive")
        for stage in ("sft", "rm", "ppo"):
            checks = getattr(self, stage)
            require(
                any(not check.record_only for check in checks.values()), f"{key}.{stage}",
                "has no check that decides: a gate that cannot say no is no gate",
            )  # fmt: skip
