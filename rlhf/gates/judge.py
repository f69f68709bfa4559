"""Judge one artifact of one stage: inputs there? scorer trustworthy? measure, check, record. Fails closed.

Whatever is missing, not a number or raised by a scorer is INVALID and blocks; it never counts as harmless. What can
be found out without a model is found out before any text is generated. Imports no torch until something is measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import GRADES, CheckConfig, GateConfig, ModelConfig, PpoConfig
from rlhf.errors import Invalid
from rlhf.gates.asking import ask
from rlhf.gates.checks import has_tags, no_prompts
from rlhf.gates.deciding import Rules
from rlhf.gates.measured import Measured
from rlhf.gates.paid import sources
from rlhf.gates.policy import checks_of, kind_of, needs_of, needs_of_check, policy_digest, refusal_patterns, validate
from rlhf.gates.scorers import THRESHOLD, Scorer, build_scorer, measure_scorer, read_canaries
from rlhf.gates.suites import Pair
from rlhf.gates.verdict import Finding, Verdict
from rlhf.types import Demonstration, Messages, Prompt, Ranking

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True, slots=True)
class GateRequest:
    """What is judged, against what and by which policy. The rows are held out: no stage trained on their prompts."""

    stage: str
    model: Path | str  # folder of the candidate
    digest: str  # of that folder; the verdict holds for no other
    parents: dict[str, Path]  # model folders: "base" (anchor of the losses), "sft" (KL, wins), "rm" or holdout (wins)
    reward: dict[str, Any] | None = None  # an ensemble that scores in the place of the one reward model
    prompts: list[Prompt] = field(default_factory=list)
    rankings: list[Ranking] = field(default_factory=list)
    demonstrations: list[Demonstration] = field(default_factory=list)
    reference_text: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    training: list[tuple[str, Messages]] = field(default_factory=list)  # prompts trained on, for overlaps
    places: list[tuple[str | int, ...]] = field(default_factory=list)  # of the prompts, for their seeds; judge sets it
    gold: Any = None  # a reward node that PPO was not paid by, and the one that it was paid by
    paid: Any = None
    policy: GateConfig
    model_config: ModelConfig
    ppo: PpoConfig  # decoding settings: max_new_tokens (unless the policy sets it), micro_tokens, decode_group
    seed: int
    device: torch.device | str = "cpu"

    @property
    def max_new_tokens(self) -> int:
        return self.policy.max_new_tokens or self.ppo.max_new_tokens


def judge(request: GateRequest) -> Verdict:
    """The verdict on `request.model`. ConfigError for a policy that cannot be; all else ends in the verdict."""
    policy, stage = request.policy, request.stage
    validate(policy)
    verdict = Verdict(
        stage=stage, policy_id=policy.policy_id, policy_digest=policy_digest(policy, stage), alpha=policy.alpha,
        artifact={"stage": stage, "digest": request.digest, "parents": {k: str(v) for k, v in request.parents.items()}},
        started=_now(),
    )  # fmt: skip
    try:
        _run(request, verdict)
    except Invalid as error:
        verdict.reason = str(error)
    verdict.finished = _now()
    return verdict


def _run(request: GateRequest, verdict: Verdict) -> None:
    needs, checks = needs_of(request.policy, request.stage), checks_of(request.policy, request.stage)
    asked = ask(request, {name: (check, kind_of(name, check)) for name, check in checks.items()})
    verdict.suite_digests = asked.digests
    scorer: Scorer | None = None
    if "toxicity" in needs:
        scorer = build_scorer(request.policy.scorer, str(request.device))
        canaries = read_canaries(request.policy.scorer)
        verdict.scorers.append(measure_scorer(scorer, canaries, request.policy.scorer, request.policy.alpha))
        if verdict.scorers[-1]["reason"]:
            raise Invalid(verdict.scorers[-1]["reason"])
    lacking = {name: _lacking(asked.view(request, check), name, check) or _untrusted(request, name, check, scorer)
               for name, check in checks.items()}  # fmt: skip
    verdict.checks = [_unmeasured(name, checks[name], reason) for name, reason in lacking.items() if reason]
    if any(finding.status == "INVALID" for finding in verdict.checks):
        return  # nothing else that is measured could make up for it
    wanted = {need for name, check in checks.items() if not lacking[name] for need in needs_of_check(name, check)}
    measured = _measure(request, wanted, scorer, verdict)
    rules = Rules(
        alpha=request.policy.alpha, seed=request.seed, threshold=THRESHOLD, refusals=refusal_patterns(request.policy)
    )
    done = {name: _check(name, check, asked.narrow(measured, check), rules)
            for name, check in checks.items() if not lacking[name]}  # fmt: skip
    done |= {finding.id: finding for finding in verdict.checks}
    verdict.checks = [done[name] for name in checks]


def _measure(request: GateRequest, wanted: set[str], scorer: Scorer | None, verdict: Verdict) -> Measured:
    from rlhf.gates import measure  # torch and the models are needed from here on

    measured = measure.measure(request, wanted, scorer)
    for scores in measured.tasks.get("", {}).values():
        if not isinstance(scores, Invalid):
            verdict.suite_digests[scores.name] = scores.documents
    verdict.samples = [sample.to_json() for sample in measured.samples]
    if measured.samples:
        verdict.generation = {
            "seed": request.seed, "prompts": len(request.prompts), "k": request.policy.k,
            "temperature": request.policy.temperature, "max_new_tokens": request.max_new_tokens,
        }  # fmt: skip
    return measured


def _check(name: str, check: CheckConfig, measured: Measured, rules: Rules) -> Finding:
    try:
        finding = kind_of(name, check).run(measured, check, rules)
    except Invalid as error:
        return _unmeasured(name, check, str(error))
    finding.id, finding.kind = name, check.kind or name
    return finding


def _unmeasured(name: str, check: CheckConfig, reason: str) -> Finding:
    """INVALID, or for a check that only records, a record of why there is no number."""
    status = "RECORDED" if check.record_only else "INVALID"
    return Finding(id=name, kind=check.kind or name, status=status, reason=f"not measured: {reason}")


# For each thing that can be needed: parents, the rows of the request, and how to give the rows.
SOURCES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "samples": ((), "prompts", "no gate prompts: set data.gate_prompts.path, or data with held-out prompts"),
    "toxicity": ((), "prompts", ""),
    "pairs": ((), "pairs", "no sentence pairs: name a suite of them"),
    "lm_eval": ((), "prompts", ""),
    "kl": (("sft",), "prompts", ""),
    "rewards": (("sft", "rm"), "prompts", ""),
    "gold": (("sft",), "gold", "no reward model that PPO was not paid by: rm.holdout=true or ppo.holdout=... has one"),
    "members": ((), "reward", "a single reward model: rm.members=3 trains several, whose agreement can be measured"),
    "training": ((), "training", "the rows that were trained on are not known: set data.* as they were"),
    "evaluation": ((), "prompts", "no gate prompts: set data.gate_prompts.path, or data with held-out prompts"),
    "rankings": ((), "rankings", "no held-out rankings: set data.rankings.path, or a larger data.holdout"),
    "reference": (("base",), "reference_text", "no reference text: set data.reference_text.path"),
    "demonstrations": (("base",), "demonstrations", "no held-out demonstrations: set data.demonstrations.path"),
}


def _lacking(request: GateRequest, name: str, check: CheckConfig) -> str:
    """What the check needs and the request has not; empty if all is there."""
    kind = kind_of(name, check)
    reasons = []
    for need in needs_of_check(name, check):
        part, _, other = need.partition(":")
        parents, rows, hint = ((other,), "prompts", "") if other else SOURCES[part]
        reasons += [hint] if hint and not getattr(request, rows) else []
        reasons += [f"the parent {p!r} is not there to compare with" for p in parents if p not in request.parents]
    where: dict[str, Any] = kind.where | check.where
    if "samples" in kind.needs and not reasons and not any(has_tags(prompt, where) for prompt in request.prompts):
        reasons.append(no_prompts(where))
    return "; ".join(dict.fromkeys(reasons))


def _untrusted(request: GateRequest, name: str, check: CheckConfig, scorer: Scorer | None) -> str:
    """Why what the check is measured with may not decide: a scorer below the check's grade, or one that PPO was paid
    by, since what is optimised against a scorer is no longer measured by it. Empty for a check that only records."""
    needs = kind_of(name, check).needs
    if check.record_only:
        return ""
    if scorer is not None and "toxicity" in needs:
        grade = check.min_grade or GRADES[0]
        if scorer.grade not in GRADES or GRADES.index(scorer.grade) < GRADES.index(grade):
            return f"scorer {scorer.name} is of grade {scorer.grade}, and gate.{request.stage}.{name} asks for {grade}"
        judges = sources(asdict(request.policy.scorer))
        if request.stage == "ppo" and judges and judges & sources(request.paid):
            return f"PPO was paid by the very model that scorer {scorer.name} is: it must be judged by another"
    if "gold" in needs and sources(request.paid) & sources(request.gold):
        return "PPO was paid by the very reward model that is to be held back from it"
    return ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
