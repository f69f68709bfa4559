"""What must hold in PPO whatever the model, the padding, the cut and the reward: the whole, not its parts.

Beside these: test_rollout and test_ppo_update (parts), test_ppo_loop (the stage), test_ppo_optimum, test_ppo_kills.
"""

from __future__ import annotations

import copy
import functools
import http.server
import json
import math
import shutil
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_tiny import config, context, early_letters, metrics, ppo_config
from safetensors.torch import load_file
from test_ppo_loop import assert_same_run
from test_ppo_update import roles_of
from test_rollout import EOS, make
from transformers import AutoTokenizer, GenerationConfig

from reward_models.trained import TrainedReward
from rlhf.artifacts import checkpoints, is_intact
from rlhf.config import ModelConfig
from rlhf.errors import TrainingError
from rlhf.logprobs import sequence_logprobs
from rlhf.models import load_reward_model, save_model
from rlhf.ppo.checks import check_first_rollout
from rlhf.ppo.episodes import Episode, compare, estimate
from rlhf.ppo.roles import Roles
from rlhf.ppo.update import Learner
from rlhf.render import load_tokenizer
from rlhf.rollout import Sampling, generate, seed_of
from rlhf.tracking import read_lines
from rlhf.types import Prompt
from stages import ppo

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2"])
PROMPTS = [[3, 4, 5], [7] * 9, [2, 3, 0, 0, 6], [9], [12, 2, 8, 8], [4, 1, 6], [5, 5], [10, 11, 2, 3, 4, 0, 7]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "ppo"
    ppo.run(config(), context(folder, tiny_model))
    return folder


def episodes_of(roles: Roles, dtype: torch.dtype) -> list[Episode]:
    """Eight scored episodes of prompts of different lengths, as PPO makes them."""
    cfg = ppo_config(temperature=0.8, micro_tokens=4096)
    sampled = generate(roles.policy, PROMPTS, list(range(8)), Sampling(0.8, 7, EOS))
    episodes = [
        Episode(
            prompt=Prompt(messages=[], id=f"row {i}"), prompt_ids=ids, ids=r.ids, finished=r.finished, text="",
            logp=torch.tensor(r.logprobs, dtype=dtype), score=(-1.0) ** i * (1 + i / 4),
        )
        for i, (ids, r) in enumerate(zip(PROMPTS, sampled, strict=True))
    ]  # fmt: skip
    compare(episodes, roles, cfg, 1)
    estimate(episodes, cfg, cfg.kl.coef)
    return episodes


def in_dtype(roles: Roles, dtype: torch.dtype) -> Roles:
    for model in (roles.policy, roles.reference, roles.critic):
        assert model is not None
        model.to(dtype)
    return roles


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@functools.cache
def three_updates(
    kind: str, dtype: torch.dtype, micro_tokens: int, *, checkpointing: bool = False
) -> list[dict[str, float]]:
    """The metrics of three updates on given episodes, the same however they are cut."""
    episodes = episodes_of(in_dtype(roles_of(kind), dtype), dtype)
    cfg = ppo_config(
        micro_tokens=micro_tokens, temperature=0.8, minibatch=8, learning_rate=1e-3, critic_learning_rate=1e-3
    )
    learner = Learner(in_dtype(roles_of(kind, checkpointing=checkpointing), dtype), cfg, 0)
    return [learner.learn(episodes, update) for update in (1, 2, 3)]


@KINDS
@pytest.mark.parametrize(("micro_tokens", "checkpointing"), [(1, False), (30, False), (4096, True)])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_three_updates_do_not_depend_on_the_cut(
    kind: str, micro_tokens: int, checkpointing: bool, dtype: torch.dtype, rel: float
) -> None:
    """Eight micro-batches of one, one of eight, and recomputed activations."""
    whole = three_updates(kind, dtype, 4096)
    cut = three_updates(kind, dtype, micro_tokens, checkpointing=checkpointing)
    assert whole[0]["policy/ratio_error_max"] > 1e-3 < abs(whole[2]["policy/loss"])
    assert whole[2]["critic/loss"] < whole[0]["critic/loss"]
    for a, b in zip(cut, whole, strict=True):
        for name in ("policy/loss", "critic/loss"):
            # A policy loss is a sum of terms of size 1 that nearly cancel: the error is one of the terms.
            assert a[name] == pytest.approx(b[name], rel=rel, abs=rel / 10), name


def responses_of(model: Any, group: int) -> list[tuple[list[int], list[float]]]:
    prompts = [[2 + (i * 7 + j * j) % 11 for j in range(1 + i % 9)] for i in range(256)]
    seeds = [seed_of(3, i) for i in range(256)]
    return [(r.ids, r.logprobs) for r in generate(model, prompts, seeds, Sampling(1.0, 16, EOS, group))]


@KINDS
def test_regrouped_rollouts_are_the_same_responses(kind: str) -> None:
    """256 sequences in groups of 256, 37 and 16: all equal in float64, at least 99 % of them in fp32."""
    model = make(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.div_(2)  # long responses: with the scale of `make` most end at once
    for dtype, least in ((torch.float64, 256), (torch.float32, 254)):
        model.to(dtype)
        together = responses_of(model, 256)
        assert len({tuple(ids) for ids, _ in together}) > 200 and sum(len(ids) for ids, _ in together) > 1500
        for group in (37, 16):
            regrouped = responses_of(model, group)
            same = [(a, b) for a, b in zip(together, regrouped, strict=True) if a[0] == b[0]]
            assert len(same) >= least
            if dtype is torch.float64:
                assert all(a[1] == pytest.approx(b[1], abs=1e-9) for a, b in same)


@KINDS
@pytest.mark.parametrize("micro_tokens", [1, 40, 4096])
def test_the_first_ratio_is_one_in_fp32(kind: str, micro_tokens: int) -> None:
    """Sampled with left padding and a cache, retold with right padding and without: |ratio - 1| <= 1e-4."""
    roles = in_dtype(roles_of(kind), torch.float32)
    episodes = episodes_of(roles, torch.float32)
    retold = sequence_logprobs(roles.policy, PROMPTS, [e.ids for e in episodes], 0.8, micro_tokens)
    for episode, logp in zip(episodes, retold, strict=True):
        assert logp.dtype == torch.float32
        assert float((logp - episode.logp).expm1().abs().max()) <= 1e-4
        assert float((episode.logp - episode.reference).expm1().abs().max()) <= 1e-4


def test_half_precision_has_limits_of_its_own() -> None:
    """bf16: a mean of |ratio - 1| up to .01 and a 99th percentile up to .1 are its rounding, more is a fault."""
    roles = roles_of("llama")
    start = episodes_of(roles, torch.float64)
    tokens = sum(len(e.ids) for e in start)

    def check(size: float, share: float) -> None:
        """Errors of `size` on this share of the tokens."""
        episodes = copy.deepcopy(start)
        log_ratio = torch.zeros(tokens, dtype=torch.float64)
        log_ratio[: round(share * tokens)] = math.log1p(size)
        for episode, part in zip(episodes, log_ratio.split([len(e.ids) for e in episodes]), strict=True):
            episode.reference = episode.logp - part
        with torch.autocast("cpu", torch.bfloat16):  # no minibatch: the policy's own rounding is not the subject
            check_first_rollout(roles.policy, episodes, [], ppo_config(temperature=0.8))

    check(9e-3, 1.0)
    check(0.2, 1 / tokens)  # the largest is above the percentile
    with pytest.raises(TrainingError, match=r"KL\(policy, reference\) == 0.*mean 0\.011"):
        check(1.1e-2, 1.0)
    with pytest.raises(TrainingError, match=r"99th percentile 0\.11"):
        check(0.11, 0.08)


def test_the_pad_token_and_the_generation_config_do_not_matter(tmp_path: Path, plain: Path, tiny_model: Path) -> None:
    """Pad equal to end, and filters in the model's own generation_config: the same run to the last bit."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    told = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**told, "pad_token_id": told["eos_token_id"]}), encoding="utf-8")
    filters = {"do_sample": True, "top_k": 1, "top_p": 0.1, "repetition_penalty": 9.0, "min_new_tokens": 5}
    GenerationConfig(**filters).save_pretrained(model)
    ppo.run(config(), context(tmp_path / "ppo", model))
    assert_same_run(tmp_path / "ppo", plain)


def test_a_learning_rate_of_zero_leaves_the_weights(tmp_path: Path, plain: Path, tiny_model: Path) -> None:
    """Three updates in which only the critic learns: ratio and KL stay, and so does every weight."""
    ppo.run(config(learning_rate=0.0), context(tmp_path, tiny_model))
    lines = metrics(tmp_path)
    assert len(lines) == 4
    for line in lines[1:]:
        assert line["policy/ratio_error_max"] <= 1e-4 and abs(line["kl/mean"]) <= 1e-4
        assert line["critic/grad_norm"] > 0 and line["policy/grad_norm"] > 0
    kept = weights_in(tmp_path / "model")
    start = weights_in(tiny_model)
    assert all(torch.equal(start[name], tensor) for name, tensor in kept.items())
    assert not all(torch.equal(start[name], tensor) for name, tensor in weights_in(plain / "model").items())


def test_truncation_is_judged_on_the_response_alone() -> None:
    """Prompts that hold the end token, in the middle and last, neither end a response nor count as its end."""
    model = make("gpt2")
    prompts = [[EOS], [3, EOS, EOS], [EOS, 4, 5]] * 8
    out = generate(model, prompts, [seed_of(9, i) for i in range(24)], Sampling(2.0, 4, EOS))
    assert {r.finished for r in out} == {True, False}
    for response in out:
        assert response.finished == (EOS in response.ids)
        assert response.finished or len(response.ids) == 4


class Remote:
    """A reward behind HTTP, as a user would write one."""

    def __init__(self, url: str) -> None:
        self.url = url

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        body = json.dumps({"prompts": prompts, "responses": responses}).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url, body), timeout=30) as answer:
            scores: list[float] = json.load(answer)
        return scores


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = [early_letters(p, r, {}) for p, r in zip(asked["prompts"], asked["responses"], strict=True)]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(scores).encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_a_reward_behind_http_is_the_function_it_calls(
    tmp_path: Path, plain: Path, tiny_model: Path, server: str
) -> None:
    cfg = config()
    cfg.reward = {"_target_": "test_ppo_holds.Remote", "url": server}
    ppo.run(cfg, context(tmp_path, tiny_model))
    assert_same_run(tmp_path, plain)


def test_a_model_with_another_tokenizer_scores_what_it_scores_alone(tmp_path: Path, tiny_model: Path) -> None:
    """A reward model that knows the policy's letters under other ids."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    core = json.loads((base / "tokenizer.json").read_text())
    letters = sorted(token for token in core["model"]["vocab"] if len(token) == 1)
    ids = [core["model"]["vocab"][token] for token in letters]
    core["model"]["vocab"] |= dict(zip(letters, ids[7:] + ids[:7], strict=True))
    (base / "tokenizer.json").write_text(json.dumps(core))
    model = load_reward_model(base, ModelConfig(), torch.device("cpu"), init_head=True)
    with torch.no_grad():
        model.score.weight.mul_(50)
    save_model(model, load_tokenizer(base, ModelConfig()), tmp_path / "rm")
    cfg = config(learning_rate=0.0, eval_prompts=4)
    cfg.reward = {"_target_": "reward_models.trained.TrainedReward", "artifact": str(tmp_path / "rm")}
    ppo.run(cfg, context(tmp_path / "ppo", tiny_model))
    rows = read_lines(tmp_path / "ppo" / "samples.jsonl")
    assert len({row["reward"] for row in rows}) > 2
    alone = TrainedReward(str(tmp_path / "rm"))
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        assert row["reward"] == pytest.approx(
            alone.score([""], [row["response"]], [{"messages": messages}])[0], abs=1e-5
        )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("gradient", r"policy gradient model\.layers\.1\.mlp\.up_proj\.weight is not finite in update 2, rows .*\w \d"),
        ("value", r"rollout values is not finite in update 2, rows .*\w \d"),
    ],
)
def test_the_first_number_that_is_not_finite_stops_the_run(
    tmp_path: Path, tiny_model: Path, spoil: str, message: str
) -> None:
    """It names tensor, update and rows; the checkpoint of update 1 and its line stay, and no model is written."""
    given = context(tmp_path, tiny_model)
    loop = ppo.Loop(config(), given)
    keep = loop._keep

    def keep_and_spoil() -> None:
        keep()
        if spoil == "value":
            with torch.no_grad():
                loop.roles.critic.head.bias.fill_(float("nan"))  # type: ignore[union-attr]
        else:
            weight = loop.roles.policy.get_parameter("model.layers.1.mlp.up_proj.weight")
            weight.register_hook(lambda gradient: gradient * float("nan"))

    loop._keep = keep_and_spoil  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=message):
        loop.run()
    assert [p.name for p in checkpoints(tmp_path / "checkpoints") if is_intact(p)] == ["step-1"]
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1]
    assert not (tmp_path / "model").exists()


def test_a_run_that_ends_early_without_a_reason_is_an_error(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo.Loop, "_ends", lambda loop: loop.progress.step == 2)
    with pytest.raises(TrainingError, match="ended after 2 of 3 updates without a reason"):
        ppo.run(config(), context(tmp_path, tiny_model))
    assert not (tmp_path / "model").exists()
