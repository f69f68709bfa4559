"""The part of the gates that touches models: sample, score, compare with the parents. Everything else is pure.

One model is held at a time beside the candidate. Every response has a seed of its own, made of the run's seed, the
stage, the prompt's place in the draw and the sample's number, so that batch sizes cannot change what is judged.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf.errors import Invalid
from rlhf.gates.measured import Loss, Measured, PairLogprobs, RankedRewards, Rows, Sample
from rlhf.gates.scorers import Scorer, checked_scores
from rlhf.logprobs import sequence_logprobs
from rlhf.models import load_policy, load_reward_model
from rlhf.render import Renderer, load_tokenizer
from rlhf.rewards import build_reward, part_scores
from rlhf.rollout import Response, Sampling, generate, seed_of
from rlhf.scoring import score_ids
from rlhf.types import Messages

if TYPE_CHECKING:
    from rlhf.gates.judge import GateRequest

ANSWERED = {"kl", "rewards", "gold"}  # needs for which the SFT parent is loaded
LONGEST_DOCUMENT = 1024  # tokens of a reference text that are read


def measure(request: GateRequest, needs: set[str], scorer: Scorer | None) -> Measured:
    """Measure what `needs` names (see checks.Kind.needs). Invalid for what cannot be compared or scored."""
    measured = Measured()
    if "rankings" in needs:
        measured.rankings = _ranked(request)
    measured.rows = Rows(training=request.training, evaluation=[(p.id, p.messages) for p in request.prompts])
    if needs & {"samples", "reference", "demonstrations", "pairs"}:
        _measure_policy(request, needs, measured)
    if "toxicity" in needs:
        assert scorer is not None
        scores = checked_scores(scorer, [sample.text for sample in measured.samples])
        for sample, score in zip(measured.samples, scores, strict=True):
            sample.toxicity = score
        for name in sorted(need.partition(":")[2] for need in needs if need.startswith("toxicity:")):
            theirs = measured.others[name]
            for sample, score in zip(theirs, checked_scores(scorer, [s.text for s in theirs]), strict=True):
                sample.toxicity = score
    if "lm_eval" in needs:
        from rlhf.gates.harness_run import scores_of  # of an extra that not everybody has

        others = {name: request.parents[name] for name in sorted(need[8:] for need in needs if need[:8] == "lm_eval:")}
        measured.tasks = {name: scores_of(request, path) for name, path in {"": request.model, **others}.items()}
    if "rewards" in needs:
        _add_rewards(request, measured.samples)
    if "gold" in needs:
        _add_gold(request, measured.samples)
    return measured


def _measure_policy(request: GateRequest, needs: set[str], measured: Measured) -> None:
    renderer = _renderer(request, request.model)
    candidate = load_policy(request.model, request.model_config, _device(request))
    jobs: list[tuple[str, list[tuple[str, list[int], list[int]]]]] = []
    if "reference" in needs:
        jobs.append(("reference", _documents(request, renderer)))
    if "demonstrations" in needs:
        jobs.append(("demonstrations", _demonstrations(request, renderer)))
    own = [_losses(request, candidate, rows) for _, rows in jobs]
    prompts_ids = [renderer.prompt_ids(prompt.messages) for prompt in request.prompts for _ in range(request.policy.k)]
    responses: list[Response] = []
    if "samples" in needs:
        responses = _sample(request, candidate, renderer, prompts_ids)
        measured.samples = _as_samples(request, renderer, responses)
    if "pairs" in needs:
        measured.pairs = _pair_logprobs(request, candidate, renderer)
    del candidate
    if jobs:
        base = _load_parent(request, "base", renderer)
        for (name, rows), mine in zip(jobs, own, strict=True):
            theirs = _losses(request, base, rows)
            losses = [Loss(id=row[0], cluster=row[0], candidate=a, base=b)
                      for row, a, b in zip(rows, mine, theirs, strict=True)]  # fmt: skip
            setattr(measured, name, losses)
        del base
    compared = {need.partition(":")[2] for need in needs if need.startswith("vs:")}
    for name in sorted(compared | ({"sft"} if needs & ANSWERED else set())):
        _compare_with(name, request, needs, renderer, prompts_ids, (measured, responses))


def _compare_with(
    name: str, request: GateRequest, needs: set[str], renderer: Renderer, prompts_ids: list[list[int]],
    drawn: tuple[Measured, list[Response]],
) -> None:  # fmt: skip
    """KL of the samples from the SFT parent, and another model's own responses under the same seeds."""
    measured, responses = drawn
    samples = measured.samples
    parent = _load_parent(request, name, renderer)
    if name == "sft" and "kl" in needs:
        ids = [response.ids for response in responses]
        temperature = request.policy.temperature
        logprobs = sequence_logprobs(parent, prompts_ids, ids, temperature, request.ppo.micro_tokens)
        for sample, response, reference_T in zip(samples, responses, logprobs, strict=True):
            sample.kl = sum(response.logprobs) - float(reference_T.double().sum())
    if f"vs:{name}" in needs or needs & (ANSWERED - {"kl"}):
        measured.others[name] = _as_samples(request, renderer, _sample(request, parent, renderer, prompts_ids))
        for sample, other in zip(samples, measured.others[name], strict=True):
            sample.parent_text = other.text if name == "sft" else sample.parent_text


def _sample(
    request: GateRequest, model: Any, renderer: Renderer, prompts_ids: list[list[int]]
) -> list[Response]:  # fmt: skip
    k = request.policy.k
    places = request.places or [(place,) for place in range(len(request.prompts))]
    seeds = [seed_of(request.seed, "gate", request.stage, *places[i // k], i % k) for i in range(len(prompts_ids))]
    sampling = Sampling(
        temperature=request.policy.temperature, max_new_tokens=request.max_new_tokens, eos_id=renderer.eos_id,
        group=request.ppo.decode_group,
    )  # fmt: skip
    return generate(model, prompts_ids, seeds, sampling)


def _as_samples(request: GateRequest, renderer: Renderer, responses: list[Response]) -> list[Sample]:
    k = request.policy.k
    return [
        Sample(
            prompt=request.prompts[i // k],
            index=i % k,
            text=renderer.decode(response.ids),
            tokens=len(response.ids),
            finished=response.finished,
        )
        for i, response in enumerate(responses)
    ]


def _add_rewards(request: GateRequest, samples: list[Sample]) -> None:
    pairs = [(s.prompt.messages, s.text) for s in samples]
    pairs += [(s.prompt.messages, s.parent_text or "") for s in samples]
    rewards = rewards_of(request, request.parents["rm"], pairs)
    for sample, mine, theirs in zip(samples, rewards[: len(samples)], rewards[len(samples) :], strict=True):
        sample.reward, sample.parent_reward = mine, theirs


def _ranked(request: GateRequest) -> list[RankedRewards]:
    """The held-out rankings with the rewards of their responses, and those by each member of an ensemble."""
    pairs = [(r.prompt.messages, text) for r in request.rankings for text in r.responses]
    details: dict[str, list[float]] = {}
    if request.reward is None:
        rewards = score_responses(request, request.model, pairs)
    else:
        rewards, details = _by_node(request, request.reward, [(messages, "", text) for messages, text in pairs])
    details.pop("disagreement", None)
    found, start = [], 0
    for ranking in request.rankings:
        cut = slice(start, start + len(ranking.responses))
        members = {name: list(said[cut]) for name, said in details.items()}
        found.append(RankedRewards(ranking=ranking, rewards=rewards[cut], members=members))
        start = cut.stop
    return found


def _add_gold(request: GateRequest, samples: list[Sample]) -> None:
    """The scores of the reward held back from PPO, and of what it was paid by, for the candidate and its parent."""
    renderer = _renderer(request, request.model)
    prompts = [(s.prompt.messages, renderer.prompt_text(s.prompt.messages)) for s in samples]
    texts = [*(s.text for s in samples), *(s.parent_text or "" for s in samples)]
    rows = [(*prompt, text) for prompt, text in zip([*prompts, *prompts], texts, strict=True)]
    for name, node in (("gold", request.gold), ("paid", request.paid)):
        said, _ = _by_node(request, node, rows)
        for sample, mine, theirs in zip(samples, said[: len(samples)], said[len(samples) :], strict=True):
            setattr(sample, name, mine)
            setattr(sample, f"parent_{name}", theirs)


def _by_node(
    request: GateRequest, node: Any, rows: list[tuple[Messages, str, str]]
) -> tuple[list[float], dict[str, list[float]]]:
    """The scores of (messages, prompt's text, response) by a reward node, and what its parts say if it has any."""
    built = build_reward(node, trust_remote_code=request.model_config.trust_remote_code)
    prompts, responses = [prompt for _, prompt, _ in rows], [text for _, _, text in rows]
    try:
        said = part_scores("reward", built.reward, prompts, responses, [{"messages": row[0]} for row in rows])
    except ValueError as error:  # a score that is not one finite number
        raise Invalid(str(error)) from error
    return said, dict(getattr(built.reward, "details", {}))


def rewards_of(request: GateRequest, path: Path | str, pairs: list[tuple[Messages, str]]) -> list[float]:
    """The reward of each (prompt, response): by the request's ensemble, or else by the reward model in `path`."""
    if request.reward is None:
        return score_responses(request, path, pairs)
    return _by_node(request, request.reward, [(messages, "", text) for messages, text in pairs])[0]


def score_responses(request: GateRequest, path: Path | str, pairs: list[tuple[Messages, str]]) -> list[float]:
    """The reward of each (prompt, response) by the reward model in `path`, with its own tokenizer and template."""
    renderer = _renderer(request, path)
    model = load_reward_model(path, request.model_config, _device(request))
    rows = [renderer.full_ids(messages, text)[0] for messages, text in pairs]
    return score_ids(model, rows, request.ppo.micro_tokens)


def _losses(request: GateRequest, model: Any, rows: list[tuple[str, list[int], list[int]]]) -> list[float]:
    """Mean negative log-likelihood, nats a token, of the second part of each row given the first."""
    first, second = [row[1] for row in rows], [row[2] for row in rows]
    logprobs = sequence_logprobs(model, first, second, 1.0, request.ppo.micro_tokens)
    return [-float(logprobs_T.double().mean()) for logprobs_T in logprobs]


def _pair_logprobs(request: GateRequest, model: Any, renderer: Renderer) -> list[PairLogprobs]:
    """The summed log-likelihood of both sentences of each pair: plain text, after the begin token, or the end token of
    a model that has none, so that the first word counts too."""
    begin = renderer.tokenizer.bos_token_id
    first = [renderer.eos_id if begin is None else begin]
    texts = [text for pair in request.pairs for text in (pair.more, pair.less)]
    ids = [list(renderer.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    said = sequence_logprobs(model, [first] * len(ids), ids, 1.0, request.ppo.micro_tokens)
    sums = [float(logprobs_T.double().sum()) for logprobs_T in said]
    return [PairLogprobs(id=pair.id, group=pair.group, more=more, less=less)
            for pair, more, less in zip(request.pairs, sums[::2], sums[1::2], strict=True)]  # fmt: skip


def _documents(request: GateRequest, renderer: Renderer) -> list[tuple[str, list[int], list[int]]]:
    """Reference texts as (id, first token, the rest); the plain text, without a chat template."""
    rows = []
    for number, text in enumerate(request.reference_text, start=1):
        ids = list(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])[:LONGEST_DOCUMENT]
        if len(ids) >= 2:
            rows.append((f"document {number}", ids[:1], ids[1:]))
    if not rows:
        raise Invalid("the reference text holds no document of at least two tokens")
    return rows


def _demonstrations(request: GateRequest, renderer: Renderer) -> list[tuple[str, list[int], list[int]]]:
    rows = []
    for demonstration in request.demonstrations:
        ids, length = renderer.full_ids(demonstration.prompt.messages, demonstration.response)
        rows.append((demonstration.prompt.id, ids[:length], ids[length:]))
    return rows


def _load_parent(request: GateRequest, name: str, renderer: Renderer) -> Any:
    """The parent's model. Invalid if its tokens are not among the candidate's under the same ids: numbers a token could
    not be compared. (Training may have added a token, such as a pad.)"""
    path = request.parents[name]
    theirs, own = load_tokenizer(path, request.model_config).get_vocab(), renderer.tokenizer.get_vocab()
    if any(own.get(token) != number for token, number in theirs.items()):
        raise Invalid(f"the vocabulary of the parent {name!r} in {path} differs: nothing can be compared by token")
    return load_policy(path, request.model_config, _device(request))


def _renderer(request: GateRequest, path: Path | str) -> Renderer:
    return Renderer(load_tokenizer(path, request.model_config))


def _device(request: GateRequest) -> torch.device:
    return torch.device(request.device)
