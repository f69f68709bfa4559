"""docs/custom-reward.md: its code is taken out of it, written to files and run, and its claims are held."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from classifier_toys import encoder
from ppo_tiny import config, context, metrics
from runs import ROOT, TINY, environment, read_json, rlhf, words, write_data
from test_readme import FENCED, composed

from rlhf.config import Config, CriticInit, ModelConfig
from rlhf.models import load_reward_model, save_model
from rlhf.render import load_tokenizer
from stages import ppo

DOC = (ROOT / "docs" / "custom-reward.md").read_text(encoding="utf-8")
FILES = {source.split("\n")[0].removeprefix("# "): source for language, source in FENCED.findall(DOC) if language}
COMMANDS = {
    re.search(r"run\.name=(\w+)", line)[1]: line.partition("python -m rlhf ")[2]  # type: ignore[index]
    for language, block in FENCED.findall(DOC.replace("\\\n", " "))
    if not language
    for line in block.splitlines()
    if "python -m rlhf " in line
}
EXAMPLES = ("brief", "rules", "clean", "remote", "sum", "cautious")


def test_the_document_is_read_as_meant() -> None:
    assert tuple(COMMANDS) == EXAMPLES
    assert sorted(FILES) == ["my_judge.py", "my_rewards.py", "my_server.py"]
    assert len(re.findall(r"^### \d", DOC, re.M)) == 5


@pytest.fixture
def desk(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A start directory with the document's files, a classifier and two reward models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("REWARD_KEY", "secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name, source in FILES.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    encoder(tmp_path / "models" / "toxicity")
    for i, run in enumerate(("quickstart", "other")):
        model = load_reward_model(tiny_model, ModelConfig(), torch.device("cpu"), init_head=True, seed=i)
        save_model(model, load_tokenizer(tiny_model, ModelConfig()), tmp_path / "runs" / run / "rm" / "model")
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def short_run(folder: Path, model: Path, cfg: Config, **changes: Any) -> list[dict[str, Any]]:
    """PPO on the tiny model under the reward of `cfg`; what it logged."""
    small = config(**{"updates": 1, "eval_prompts": 2, **changes})
    small.reward = cfg.reward
    given = context(folder / "ppo", model)
    given.parents["rm"] = folder / "runs" / "quickstart" / "rm" / "model"
    ppo.run(small, given)
    return metrics(folder / "ppo")


@pytest.fixture
def server(desk: Path) -> Iterator[int]:
    """The document's server, in a thread, on a port of its own."""
    namespace: dict[str, Any] = {"__name__": "my_server"}
    exec(FILES["my_server.py"], namespace)
    made = ThreadingHTTPServer(("127.0.0.1", 0), namespace["Scores"])
    Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield made.server_address[1]
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("name", EXAMPLES)
def test_ppo_is_paid_by_each_example(name: str, desk: Path, tiny_model: Path, server: int) -> None:
    cfg = composed(COMMANDS[name])
    if name == "remote":
        assert cfg.reward["url"] == "http://127.0.0.1:8765/score"
        cfg.reward["url"] = f"http://127.0.0.1:{server}/score"
    (update,) = [line for line in short_run(desk, tiny_model, cfg) if "reward/mean" in line]
    parts = {key.removeprefix("reward/parts/"): value for key, value in update.items() if "/parts/" in key}
    mean = update["reward/mean"]
    if name == "brief":
        assert mean == 1.0  # six tokens are never more than ten words
    elif name == "rules":
        total = parts["short"] + 0.5 * parts["polite"] - parts["repetition"]
        assert mean == pytest.approx(total) and set(parts) == {"short", "polite", "repetition"}
    elif name == "clean":
        assert -1 < mean < 0
    elif name == "remote":
        assert 0 <= mean <= 1
    elif name == "sum":
        assert mean == pytest.approx(parts["model"] + 0.5 * (parts["words"] - 0.25) / 0.25, abs=1e-5)
    else:
        assert mean == pytest.approx((parts["first"] + parts["second"]) / 2 - parts["disagreement"], abs=1e-5)


def test_the_examples_score_as_they_say(desk: Path) -> None:
    import my_judge  # type: ignore[import-not-found]
    import my_rewards  # type: ignore[import-not-found]

    assert my_rewards.brief("p", "w " * 10, {}) == 1.0
    assert my_rewards.brief("p", "w " * 13, {}) == pytest.approx(0.7)
    keywords = my_judge.Keywords(["belt", "fuse"])
    assert keywords.score(["p"] * 3, ["The Belt", "fuse and belt", "none"], [{}] * 3) == [0.5, 1.0, 0.0]
    assert keywords.details == {"found": [1.0, 2.0, 0.0]}


def test_without_a_reward_model_nothing_is_normalised_unless_the_node_says_how(
    desk: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every response earns 1: as it is, or (1 - .25) / .25 = 3; the tenth or so that is cut loses 1 of it."""
    cfg = composed(COMMANDS["brief"])
    line = short_run(desk, tiny_model, cfg, no_eos_penalty=0.0)[-1]
    assert line["reward/score"] == 1.0
    assert "FunctionReward stores no mean and std: its rewards are used as they are" in capsys.readouterr().out
    cfg = composed(COMMANDS["brief"] + " +reward.mean=0.25 +reward.std=0.25")
    line = short_run(desk / "again", tiny_model, cfg, no_eos_penalty=0.0)[-1]
    assert (line["reward/mean"], line["reward/score"]) == (1.0, 3.0)
    assert "stores no mean" not in capsys.readouterr().out


def test_without_a_reward_model_the_critic_starts_from_the_policy(
    desk: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = config(critic_init=CriticInit.reward)
    small.reward = composed(COMMANDS["brief"]).reward
    loop = ppo.Loop(small, context(desk / "alone", tiny_model))
    own = dict(loop.roles.policy.base_model.named_parameters())
    assert all(torch.equal(own[name], p) for name, p in loop.roles.critic.body.named_parameters())
    assert not any(p.any() for p in loop.roles.critic.head.parameters())
    assert "no reward model of its own: the critic starts from the policy" in capsys.readouterr().out


# ---- the commands as they stand, in processes of their own


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, list[str]]:
    """A start directory in which `runs/quickstart` is a small run with an SFT and a reward model."""
    folder = tmp_path_factory.mktemp("doc")
    for name, source in FILES.items():
        (folder / name).write_text(source, encoding="utf-8")
    encoder(folder / "models" / "toxicity")
    small = [*TINY, f"model.path={tiny_model}", *write_data(folder)]
    for stage, seed, run in (
        ("sft", 0, "quickstart"),
        ("rm", 0, "quickstart"),
        ("sft", 1, "other"),
        ("rm", 1, "other"),
    ):
        done = rlhf(*small, f"stage={stage}", f"seed={seed}", f"run.name={run}", cwd=folder)
        assert done.returncode in (0, 10, 11, 12), done.stderr
    return folder, small


def serve(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """The document's server in a process of its own, once it listens."""
    command = [sys.executable, "my_server.py", str(port)]
    process = subprocess.Popen(
        command, cwd=folder, env={**environment(), "REWARD_KEY": "secret"}, stderr=subprocess.DEVNULL
    )
    for _ in range(2000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        assert process.poll() is None
        time.sleep(0.01)
    raise AssertionError("the server does not listen")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_each_command_works_as_typed(name: str, world: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, small = world
    monkeypatch.setenv("REWARD_KEY", "secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    port = free_port()
    server = serve(folder, port) if name == "remote" else None
    try:
        typed = shlex.split(COMMANDS[name].replace("8765", str(port)))
        done = rlhf(*small, *typed, cwd=folder)
    finally:
        if server is not None:
            server.kill()
            server.wait()
    assert done.returncode in (0, 10, 11, 12) and "Traceback" not in done.stderr, done.stderr
    manifest = read_json(folder / "runs" / name / "ppo" / "manifest.json")
    assert manifest["stop_reason"] == "finished"
    code = {"brief": "my_rewards", "sum": "my_judge"}.get(name)
    assert {key for key in manifest["inputs"]["rewards"] if key.startswith("my_")} == ({code} if code else set())


@pytest.mark.slow
def test_a_killed_server_ends_ppo_with_a_named_error_and_the_same_command_goes_on(
    world: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to the server once an update is in the metrics; afterwards the run ends as the one without a fault."""
    folder, small = world
    monkeypatch.setenv("REWARD_KEY", "secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    port = free_port()
    typed = shlex.split(COMMANDS["remote"].replace("8765", str(port)))
    typed += ["ppo.updates=12", "reward.attempts=2", "reward.backoff=0.01"]
    unbroken, broken = ([*small, *typed, f"run.name={name}"] for name in ("unbroken", "broken"))
    server = serve(folder, port)
    assert rlhf(*unbroken, cwd=folder).returncode in (0, 10, 11, 12)
    log = folder / "runs" / "broken" / "ppo" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf", *broken], cwd=folder, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (log.exists() and log.read_text(encoding="utf-8").count("\n") >= 3):
        assert process.poll() is None, "it ended before the server was killed"
        time.sleep(0.005)
    server.send_signal(signal.SIGKILL)
    server.wait()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in stderr, stderr
    assert re.search(rf"http://127\.0\.0\.1:{port}/score, rows 0 to \d of \d: ConnectionRefusedError", words(stderr)), (
        stderr
    )
    assert not (folder / "runs" / "broken" / "ppo" / "model").exists()
    server = serve(folder, port)
    resumed = rlhf(*broken, cwd=folder)
    server.kill()
    server.wait()
    assert resumed.returncode in (0, 10, 11, 12) and "resumed after update" in words(resumed.stdout), resumed.stderr
    runs = [folder / "runs" / name / "ppo" for name in ("unbroken", "broken")]
    assert metrics(runs[0]) == metrics(runs[1])
    assert read_json(runs[0] / "manifest.json")["digest"] == read_json(runs[1] / "manifest.json")["digest"]
