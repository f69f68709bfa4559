"""What an update can be told to do beside its simplest form, each against a number that follows from its definition."""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_tiny import config, context, early_letters, metrics, ppo_config, prompts
from safetensors.torch import load_file
from test_ppo_update import episodes_of, roles_of

from rlhf.artifacts import checkpoints
from rlhf.config import AlarmAction, AlarmConfig, Estimator, KlConfig, KlPlace, PtxConfig, check_all
from rlhf.data import DataReport, Loaded
from rlhf.engine.ppo import Replicas
from rlhf.errors import ConfigError, TrainingError
from rlhf.logprobs import sequence_logprobs
from rlhf.ppo.checkpoint import Progress, averaged, follow
from rlhf.ppo.engines import check_engine, checked_responses
from rlhf.ppo.evaluate import Evaluation, win_rate
from rlhf.ppo.ptx import Document, draw_documents, ptx_documents
from rlhf.ppo.update import Learner
from rlhf.ppo.watch import must_stop, note_alarm, note_evaluation
from rlhf.rewards import build_reward, holdout_node
from rlhf.rollout import Response, Sampling
from rlhf.types import Demonstration, Prompt
from stages import ppo

FUNCTION = "reward_models.function.FunctionReward"


def late_letters(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """What early_letters is not: pays for the letters n to z."""
    return sum(letter in "nopqrstuvwxyz" for letter in response) / 4


def rival_letters(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """Falls by what early_letters rises by."""
    return 1 - early_letters(prompt, response, row)


def demonstrations(n: int) -> Loaded[Demonstration]:
    said = {i: Prompt(messages=[{"role": "user", "content": f"say {i}"}], where=f"d:{i}") for i in range(1, n + 1)}
    rows = [Demonstration(prompt=prompt, response="ab " * i) for i, prompt in said.items()]
    return Loaded(train=rows, heldout=[], report=DataReport(key="data.demonstrations"))


def test_k3_in_the_loss_leaves_the_rewards_alone_and_pulls_as_its_derivative_says() -> None:
    """d/dlogp of coef * (exp(ref - logp) - 1 - (ref - logp)) is coef * (1 - exp(ref - logp)), here by the difference
    of two gradients of the policy's output layer: with and without the term."""
    cfg = ppo_config(kl=KlConfig(coef=0.7, place=KlPlace.loss), whiten_advantages=False)
    roles = roles_of("llama")
    with torch.no_grad():
        for p in roles.reference.parameters():
            p.mul_(1.1)
    episodes = episodes_of(roles, cfg)
    assert all(sum(e.rewards) == e.score for e in episodes)  # no KL among them
    grads = []
    for place in (KlPlace.loss, KlPlace.reward):
        learner = Learner(roles, ppo_config(kl=KlConfig(coef=0.7, place=place)), 0)
        learner.accumulate("policy", episodes, 1, defaultdict(float))
        grads.append(roles.policy.lm_head.weight.grad.clone())
        learner.clear()
    given, ids = [e.prompt_ids for e in episodes], [e.ids for e in episodes]
    with torch.enable_grad():
        logp = _logprobs_with_grad(roles.policy, given, ids, cfg.temperature)
        pull = 0.7 * (1 - (torch.cat([e.reference for e in episodes]) - logp.detach()).exp())
        (pull * logp).sum().div(len(logp)).backward()
    torch.testing.assert_close(grads[0] - grads[1], roles.policy.lm_head.weight.grad, rtol=1e-8, atol=1e-12)


def _logprobs_with_grad(policy: Any, given: list[list[int]], ids: list[list[int]], temperature: float) -> torch.Tensor:
    """One row at a time and the plain forward: slower than the product's way, and independent of it."""
    parts = []
    for prompt, response in zip(given, ids, strict=True):
        logits = policy(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        parts.append(logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)])
    return torch.cat(parts)


def test_ptx_adds_the_gradient_of_the_documents_mean_loss() -> None:
    roles = roles_of("gpt2")
    documents = [Document(name=str(i), given=[3] * (i + 1), ids=[4, 5 + i, 6][: i + 1]) for i in range(3)]
    cfg = ppo_config(ptx=PtxConfig(coef=2.5, batch=8), micro_tokens=7)
    learner = Learner(roles, cfg, 5, documents)
    sums: defaultdict[str, float] = defaultdict(float)
    learner._accumulate_ptx(2, 1, sums)
    got = roles.policy.transformer.wte.weight.grad.clone()
    learner.clear()
    drawn = draw_documents(documents, 5, 2, 1, 8)
    assert len({d.name for d in drawn}) > 1 and drawn != draw_documents(documents, 5, 2, 2, 8)
    nll = -_logprobs_with_grad(roles.policy, [d.given for d in drawn], [d.ids for d in drawn], 1.0).mean()
    (2.5 * nll).backward()
    torch.testing.assert_close(got, roles.policy.transformer.wte.weight.grad, rtol=1e-9, atol=1e-12)
    assert sums["policy/ptx_loss"] == pytest.approx(float(nll.detach()), rel=1e-12)


def test_ptx_texts_are_cut_so_that_each_token_is_predicted_once(tmp_path: Path, tiny_model: Path) -> None:
    given = context(tmp_path, tiny_model)
    given.data.pretraining = ["help me with this robot", "", "x"]
    documents = ptx_documents(given.data, given.renderer, 4)
    ids = [*given.renderer.tokenizer("help me with this robot")["input_ids"], given.renderer.eos_id]
    of_first = [d for d in documents if d.name == "text 1"]
    assert all(len(d.given) == 1 and len(d.given + d.ids) <= 4 for d in of_first) and len(of_first) > 1
    assert [of_first[0].given[0], *(i for d in of_first for i in d.ids)] == ids
    assert not [d for d in documents if d.name == "text 2"]  # an end token alone has nothing before it
    given.data.pretraining, given.data.demonstrations = [], demonstrations(2)
    full, start = given.renderer.full_ids([{"role": "user", "content": "say 2"}], "ab ab ")
    assert ptx_documents(given.data, given.renderer, 4)[1] == Document(name="d:2", given=full[:start], ids=full[start:])
    given.data.demonstrations = None
    with pytest.raises(ConfigError, match=r"data\.pretraining\.path"):
        ptx_documents(given.data, given.renderer, 4)


def test_a_policy_waits_for_its_critic(tmp_path: Path, tiny_model: Path) -> None:
    ppo.run(config(critic_warmup=2, eval_every=1), context(tmp_path, tiny_model))
    lines = metrics(tmp_path)
    assert [line["policy/steps"] for line in lines[1:]] == [0, 0, 4]
    assert [line["policy/learning_rate"] for line in lines[1:]] == [0, 0, 1e-2]
    assert "policy/loss" not in lines[2] and "policy/loss" in lines[3]
    assert abs(lines[2]["eval/kl"]) < 1e-4 < lines[3]["eval/kl"]
    assert lines[2]["critic/explained_variance"] != lines[1]["critic/explained_variance"] == 0


def test_the_average_is_what_is_evaluated_and_kept(tmp_path: Path, tiny_model: Path) -> None:
    ppo.run(config(ema=0.75, keep_checkpoints=9), context(tmp_path, tiny_model))
    expected = load_file(tiny_model / "model.safetensors")
    for update in (1, 2, 3):
        own = load_file(tmp_path / "checkpoints" / f"step-{update}" / "policy.safetensors")
        expected = {name: 0.75 * tensor + 0.25 * own[name] for name, tensor in expected.items() if name in own}
    kept = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-5, atol=1e-6)
    plain = tmp_path / "plain"
    ppo.run(config(), context(plain, tiny_model))
    assert metrics(plain)[3]["kl/mean"] == metrics(tmp_path)[3]["kl/mean"]  # the average is not what is trained
    assert metrics(plain)[3]["eval/kl"] > metrics(tmp_path)[3]["eval/kl"]


def test_averaged_weights_are_put_in_and_taken_out() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(4.0)
    average = {"weight": torch.tensor([[0.0]])}
    follow(average, Replicas().weights(model), 0.75)
    assert average["weight"].item() == 1.0
    with averaged(Replicas(), model, average):
        assert model.weight.item() == 1.0
    assert model.weight.item() == 4.0 and Replicas().weights(model)["weight"].item() == 4.0


@pytest.mark.parametrize("estimator", [Estimator.rloo, Estimator.group_norm])
def test_without_a_critic_nothing_of_it_is_made_or_saved(
    tmp_path: Path, tiny_model: Path, estimator: Estimator
) -> None:
    loop = ppo.Loop(config(estimator=estimator, group=4, updates=8, learning_rate=0.03), context(tmp_path, tiny_model))
    assert loop.roles.critic is None
    loop.run()
    lines = metrics(tmp_path)
    assert not [key for line in lines for key in line if key.startswith("critic/") and key != "critic/returns"]
    assert not (checkpoints(tmp_path / "checkpoints")[-1] / "critic.safetensors").exists()
    assert lines[-1]["eval/win_rate"] > 0.5 and lines[-1]["eval/reward"] > lines[0]["eval/reward"]


def everything(**changes: Any) -> Any:
    """A run with all that has state: controller, average, texts, holdout, alarm, budget."""
    options = {
        "estimator": Estimator.rloo, "group": 2, "ema": 0.5, "ptx": PtxConfig(coef=0.5, batch=3), "dual_clip": 3.0,
        "kl": KlConfig(coef=0.1, target=0.01, horizon=20, budget=50.0), "eval_every": 1, "keep_checkpoints": 9,
        "holdout": {"_target_": FUNCTION, "function": "test_ppo_options.late_letters"},
        "alarm": AlarmConfig(action=AlarmAction.stop, patience=9), **changes,
    }  # fmt: skip
    return config(**options)


@pytest.mark.parametrize("changes", [{}, {"estimator": Estimator.gae, "critic_warmup": 1}])
def test_all_of_it_resumes_bit_for_bit(tmp_path: Path, tiny_model: Path, changes: dict[str, Any]) -> None:
    given = context(tmp_path / "a", tiny_model)
    given.data.demonstrations = demonstrations(5)
    ppo.run(everything(**changes), given)
    coefs = [line["kl/coef"] for line in metrics(tmp_path / "a")[1:]]
    assert coefs[0] == 0.1 and len(set(coefs)) > 1
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "model")
    for path in checkpoints(tmp_path / "b" / "checkpoints")[1:]:
        shutil.rmtree(path)
    again = context(tmp_path / "b", tiny_model)
    again.data.demonstrations = demonstrations(5)
    ppo.run(everything(**changes), again)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    ours, theirs = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("a", "b"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_holdout_is_watched_and_not_paid(tmp_path: Path, tiny_model: Path) -> None:
    node = {"_target_": FUNCTION, "function": "test_ppo_options.late_letters"}
    ppo.run(config(holdout=node), context(tmp_path / "with", tiny_model))
    ppo.run(config(), context(tmp_path / "without", tiny_model))
    for a, b in zip(metrics(tmp_path / "with"), metrics(tmp_path / "without"), strict=True):
        watched = {"eval/holdout", "eval/holdout_fall", "eval/alarm", "eval/win_rate"}
        assert {k: v for k, v in a.items() if k not in watched} == {k: v for k, v in b.items() if k not in watched}
        assert ("eval/reward" in a) == ("eval/holdout" in a)


def test_the_parts_of_a_reward_are_logged(tmp_path: Path, tiny_model: Path) -> None:
    parts = {
        "early": {"_target_": FUNCTION, "function": "ppo_tiny.early_letters", "weight": 1.0},
        "late": {"_target_": FUNCTION, "function": "test_ppo_options.late_letters", "weight": -2.0},
    }
    cfg = config(updates=1)
    cfg.reward = {"_target_": "reward_models.weighted.WeightedSum", "parts": parts}
    ppo.run(cfg, context(tmp_path, tiny_model))
    line = metrics(tmp_path)[1]
    assert line["reward/mean"] == pytest.approx(line["reward/parts/early"] - 2 * line["reward/parts/late"])
    assert line["reward/parts/late"] > 0


def judged(rewards: list[float], holdout: list[float], kl: float = 0.0) -> Evaluation:
    return Evaluation(metrics={"eval/kl": kl}, rows=[], rewards=rewards, holdout=holdout)


def test_the_alarm_counts_evaluations_with_more_reward_and_surely_less_holdout() -> None:
    """Four prompts. The peak is the second look. Third: reward up, holdout down by about 1 everywhere: alarm. Fourth:
    down by 1 on two prompts, up by .5 on two: not sure. Fifth: down, but so is the reward. Then two in a row."""
    cfg = ppo_config(alarm=AlarmConfig(action=AlarmAction.stop, patience=2))
    policy, progress = torch.nn.Linear(1, 1), Progress()
    looks = [
        ([0, 0, 0, 0], [0, 0, 0, 0]), ([1, 1, 1, 1], [2, 2, 2, 2]), ([2, 2, 2, 2], [1.0, 1.1, 0.9, 1.0]),
        ([2, 2, 2, 2], [1, 1, 2.5, 2.5]), ([0, 0, 0, 0], [1.0, 1.1, 0.9, 1.0]), ([3, 3, 3, 3], [1.0, 1.1, 0.9, 1.0]),
        ([3, 3, 3, 3], [0.5, 0.4, 0.6, 0.5]),
    ]  # fmt: skip
    alarms, stops = [], []
    for step, (rewards, holdout) in enumerate(looks):
        policy.weight.data.fill_(step)
        found = judged([float(r) for r in rewards], [float(h) for h in holdout])
        note_evaluation(progress, found, step, lambda: Replicas().weights(policy), cfg)
        alarms.append(progress.alarms)
        stops.append(must_stop(progress, cfg))
    assert alarms == [0, 0, 1, 0, 0, 1, 2]
    assert stops == [None] * 6 + ["over_optimisation"]
    assert progress.best_step == 1 and progress.best is not None and progress.best["weight"].item() == 1
    assert progress.best_reward == 2.0  # the best is chosen by the holdout
    warned = ppo_config(alarm=AlarmConfig(action=AlarmAction.warn, patience=2))
    assert must_stop(progress, warned) is None


def test_the_alarm_does_not_fall_for_the_luck_of_the_highest_evaluation() -> None:
    """Second look: the prompts at even places are lucky, +1 each. Third: their luck is gone, nothing else. A fall from
    the highest look would be (1, 0, 1, 0, ...), mean .5 with a standard error of .19, and would ring. By halves: the
    even places stood highest at the second look, where the odd ones have not fallen from; the odd at the first, from
    which the even ones have not fallen. Fourth: all of them fall by 1."""
    progress, alarm = Progress(), AlarmConfig()
    falls = []
    for step, holdout in enumerate(([0.0] * 8, [1.0, 0.0] * 4, [0.0] * 8, [-1.0, -1.1, -0.9, -1.0] * 2)):
        found = judged([float(step)] * 8, holdout)
        note_alarm(progress, found, alarm)
        falls.append((found.metrics["eval/holdout_fall"], found.metrics["eval/alarm"]))
    assert falls[:3] == [(0, 0), (-0.5, 0), (0, 0)]
    assert falls[3] == (pytest.approx(1.0), 1)


def test_over_optimisation_stops_a_run_at_the_best_holdout(tmp_path: Path, tiny_model: Path) -> None:
    """What helps the reward hurts the holdout by as much."""
    node = {"_target_": FUNCTION, "function": "test_ppo_options.rival_letters"}
    cfg = config(
        updates=12, batch=16, minibatch=8, learning_rate=0.03, eval_every=1, eval_prompts=32, kl=KlConfig(coef=0.0),
        holdout=node, alarm=AlarmConfig(action=AlarmAction.stop, patience=1), max_new_tokens=12,
    )  # fmt: skip
    given = context(tmp_path, tiny_model)
    assert given.data.prompts is not None
    given.data.prompts.heldout = prompts(32, 5)
    result = ppo.run(cfg, given)
    lines = metrics(tmp_path)
    assert result.stop_reason == "over_optimisation" and result.updates < 12
    assert result.extra["best_step"] == max(lines, key=lambda line: line["eval/holdout"])["step"]
    assert lines[-1]["eval/reward"] > lines[0]["eval/reward"] and lines[-1]["eval/holdout_fall"] > 0
    best = tmp_path / "best"
    shutil.copytree(tmp_path / "model", best)
    if result.extra["best_step"] == 0:
        start, kept = load_file(tiny_model / "model.safetensors"), load_file(best / "model.safetensors")
        assert all(torch.equal(start[name], tensor) for name, tensor in kept.items())


def test_ties_count_half_in_a_win_rate() -> None:
    assert win_rate([1, 2, 3, 4], [0, 2, 4, 4]) == (1 + 0.5 + 0 + 0.5) / 4


def test_the_first_checks_need_no_critic() -> None:
    roles = roles_of("llama")
    roles.critic = None
    cfg = ppo_config(estimator=Estimator.gae)
    assert all(not e.values.any() for e in episodes_of(roles, cfg))
    logp = sequence_logprobs(roles.policy, [[3, 4]], [[5]])
    assert logp[0].shape == (1,) and copy.deepcopy(roles.policy) is not roles.policy


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"estimator": Estimator.rloo}, "ppo.group"),
        ({"estimator": Estimator.rloo, "group": 2, "gamma": 0.9}, "ppo.gamma"),
        ({"estimator": Estimator.group_norm, "group": 2, "critic_warmup": 1}, "ppo.critic_warmup"),
        ({"group": 3}, "ppo.group=3 does not divide ppo.batch=8: ppo.group=2"),
        ({"critic_warmup": 3}, "ppo.critic_warmup"),
        ({"dual_clip": 1.1}, "ppo.dual_clip"),
        ({"ema": 1.0}, "ppo.ema"),
        ({"kl": KlConfig(coef=0.0, target=6.0)}, "ppo.kl.coef"),
        ({"ptx": PtxConfig(coef=-1.0)}, "ppo.ptx.coef"),
        ({"alarm": AlarmConfig(alpha=0.7)}, "ppo.alarm.alpha"),
    ],
)
def test_combinations_that_cannot_work_name_the_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        check_all(ppo_config(**changes), "ppo")


def test_a_holdout_is_a_node_or_a_folder() -> None:
    node = {"_target_": "ppo_tiny.nothing"}
    assert holdout_node(None) is None and holdout_node(node) is node
    assert holdout_node("runs/x/rm/model")["artifact"] == "runs/x/rm/model"
    with pytest.raises(ConfigError, match=r"ppo\.holdout\._target_"):
        build_reward(node, key="ppo.holdout")


def test_a_holdout_that_fails_stops_the_run(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_ppo_options.late_letters", lambda *_: float("inf"))
    node = {"_target_": FUNCTION, "function": "test_ppo_options.late_letters"}
    with pytest.raises(TrainingError, match="the score is inf"):
        ppo.run(config(holdout=node), context(tmp_path, tiny_model))


class Parrot:
    """A rollout engine of a user's: says the same letters to everyone, at a probability that it makes up."""

    def __init__(self, logprob: float = 0.0, cut: bool = False) -> None:
        self.logprob, self.cut = logprob, cut

    def generate(
        self, policy: Any, prompts_ids: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Response]:
        ids = [5, 6] if self.cut else [5, 6, sampling.eos_id]
        told = sequence_logprobs(policy, prompts_ids, [ids] * len(seeds), sampling.temperature)
        return [Response(ids=ids, logprobs=[x + self.logprob for x in t.tolist()], finished=True) for t in told]


def with_engine(folder: Path, model: Path, **arguments: Any) -> Any:
    cfg = config(updates=1)
    cfg.rollout = {"_target_": "test_ppo_options.Parrot", **arguments}
    return ppo.run(cfg, context(folder, model))


def test_another_rollout_engine_can_join(tmp_path: Path, tiny_model: Path) -> None:
    with_engine(tmp_path, tiny_model)
    assert metrics(tmp_path)[1]["rollout/length"] == 3


def test_an_engine_is_held_to_what_it_says(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(TrainingError, match=r"KL\(policy, reference\) == 0"):
        with_engine(tmp_path / "a", tiny_model, logprob=0.01)
    with pytest.raises(TrainingError, match="response 0 with an end token that is not where"):
        with_engine(tmp_path / "b", tiny_model, cut=True)
    with pytest.raises(ConfigError, match=r"rollout\.logprop.*did you mean logprob"):
        with_engine(tmp_path / "c", tiny_model, logprop=0.01)
    with pytest.raises(ConfigError, match=r"rollout\._target_.*no method generate"):
        check_engine({"_target_": "rlhf.types.Prompt", "messages": []})


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (Response(ids=[], logprobs=[], finished=False), "0 tokens with 0"),
        (Response(ids=[3, 4], logprobs=[0.0], finished=False), "2 tokens with 1"),
        (Response(ids=[3] * 5, logprobs=[0.0] * 5, finished=False), "5 tokens, more than"),
        (Response(ids=[3, 1, 3], logprobs=[0.0] * 3, finished=False), "end token"),
    ],
)
def test_a_malformed_response_is_named(response: Response, message: str) -> None:
    good = Response(ids=[3, 1], logprobs=[0.0, 0.0], finished=True)
    sampling = Sampling(1.0, 4, 1)
    assert checked_responses([good, good], 2, sampling) == [good, good]
    with pytest.raises(TrainingError, match=f"response 1 with .*{message}"):
        checked_responses([good, response], 2, sampling)
    with pytest.raises(TrainingError, match="1 responses for 2 prompts"):
        checked_responses([good], 2, sampling)
