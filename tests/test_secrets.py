"""No token that the environment holds is found in anything that a run writes or prints."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from runs import TINY, rlhf, write_data
from score_server import Server

PLANTED = {
    "WANDB_API_KEY": "a1b2c3d4e5f60718293a4b5c6d7e8f9012345678",
    "HF_TOKEN": "hf_PlantedTokenOfTheTests0123456789",
    "REWARD_TOKEN": "reward-PlantedTokenOfTheTests",
    "AWS_SECRET_ACCESS_KEY": "aws-PlantedTokenOfTheTests",
}


@pytest.mark.slow
def test_no_planted_token_is_written_or_printed(
    tmp_path: Path, tiny_model: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with W&B offline and a reward behind a server that wants a key, its report, cards, plan and chat: in clear,
    reversed or in base64."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    options = [o for o in TINY if not o.startswith("tracker=")]
    arguments = [
        *options, "tracker=wandb", f"model.path={tiny_model}", *write_data(tmp_path), f"run.root={tmp_path}/runs",
        "reward=http", f"reward.url={server.url}", "reward.key_variable=REWARD_TOKEN",
        "gate.ppo.win_rate.record_only=true", "gate.ppo.win_rate.min=null",
        "gate.ppo.reward_gain.record_only=true", "gate.ppo.reward_gain.min=null",
    ]  # fmt: skip
    done = rlhf(*arguments, cwd=tmp_path)
    shown = [rlhf(*arguments, f"do={verb}", cwd=tmp_path, given="hello\n") for verb in ("report", "chat", "plan")]
    assert [one.returncode for one in shown] == [0, 0, 0], [one.stderr for one in shown]
    assert (tmp_path / "runs" / "own" / "ppo" / "verdict.json").is_file(), done.stderr
    assert f"Bearer {PLANTED['REWARD_TOKEN']}" in server.keys, "it was used"
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    names = {p.name for p in files}
    assert {"manifest.json", "report.html", "README.md", "verdict.xml"} <= names
    assert any(name.endswith(".wandb") for name in names)
    written = {str(p.relative_to(tmp_path)): p.read_bytes() for p in files}
    written["printed"] = "".join(one.stdout + one.stderr for one in (done, *shown)).encode()
    found = {(name, where) for name, value in PLANTED.items() for where, text in written.items()
             if any(form in text for form in forms(value))}  # fmt: skip
    assert found == set()


def forms(token: str) -> list[bytes]:
    """As it is and reversed, and its middle in base64 at each of the three alignments."""
    coded = [base64.b64encode(token.encode()[start:])[:20] for start in range(3)]
    return [token.encode(), token[::-1].encode(), *coded]
