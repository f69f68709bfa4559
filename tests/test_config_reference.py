"""docs/reference/config.md is what the schema and its comments make, key for key."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import yaml
from runs import ROOT

from rlhf.compose import schema_keys
from rlhf.config import STAGES, CheckConfig, Config, NoninferiorityConfig, TaskConfig, reference

PAGE = ROOT / "docs" / "reference" / "config.md"
ROW = re.compile(r"^\| `([^`]+)` \| (.*?) \| (.*?) \| (.*) \|$", re.M)


def rows() -> dict[str, tuple[str, str, str]]:
    """What the page says of each key: what it takes, its default, its text."""
    body = PAGE.read_text(encoding="utf-8").split("\n## The root\n")[1]
    return {key: (takes, default.strip("`"), text) for key, takes, default, text in ROW.findall(body)}


def test_the_page_is_that_of_this_schema() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.reference(), (
        "the schema changed: python -m rlhf.config.reference docs/reference/config.md"
    )


def test_the_page_has_every_key_and_no_other() -> None:
    """The walk here is that of the error messages, not the page's own."""
    nodes = {key.rpartition(".")[0] for key in schema_keys()} | {f"gate.{stage}" for stage in STAGES}
    inner = {"noninferiority": NoninferiorityConfig, "task": TaskConfig}
    nested = {f"{name}.{field.name}" for name, cls in inner.items() for field in dataclasses.fields(cls)}
    names = {field.name for field in dataclasses.fields(CheckConfig)} - set(inner) | nested
    checks = {f"gate.<stage>.<check>.{name}" for name in names}
    told = {key for key, (takes, _, _) in rows().items() if takes != "node"}
    assert told == (set(schema_keys()) - nodes) | checks
    assert len(told) > 130


def test_every_key_has_a_text_and_a_node_has_no_default() -> None:
    assert [key for key, (_, _, text) in rows().items() if not text] == []
    assert {default for takes, default, _ in rows().values() if takes == "node"} == {""}


def test_the_defaults_are_read_back_as_those_of_the_schema() -> None:
    for key, (takes, default, _) in rows().items():
        if takes == "node" or "<" in key:
            continue
        value = Config()
        for name in key.split("."):
            value = getattr(value, name)
        told = float(default) if isinstance(value, float) else yaml.safe_load(default)
        assert told == getattr(value, "value", value), key


def test_a_comment_an_enumeration_and_a_default_stand_where_they_belong() -> None:
    assert rows()["rm.optim.batch"] == ("whole number", "16", "rows (SFT), prompts (RM) per update, over all ranks")
    assert rows()["ppo.kl.target"][0] == "number or null"
    assert rows()["ppo.kl.target"][2] == "nats a response: `coef` is adapted towards it; null: fixed"
    assert rows()["gate.refusal_patterns"][:2] == ("list of texts", "[]")
    assert rows()["ppo.kl.place"] == (
        "`reward`, `loss`", "reward",
        "where the penalty acts; `reward`: k1, on each token's reward; `loss`: k3, beside the policy loss",
    )  # fmt: skip
    assert rows()["data.reference_text"][2] == "plain text the model must not forget"


def test_every_group_and_option_is_listed() -> None:
    table = PAGE.read_text(encoding="utf-8").split("\n## The root\n")[0]
    told = {
        group: re.findall("`([^`]+)`", names) for group, names in re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.M)
    }
    files = [path.relative_to(ROOT / "conf") for path in (ROOT / "conf").glob("*/*.yaml")]
    assert {(group, name) for group, names in told.items() for name in names} == {(f.parts[0], f.stem) for f in files}


def test_it_is_written_without_torch(tmp_path: Path) -> None:
    code = "import sys; from rlhf.config import reference; reference.main(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "page.md")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
