"""What the documents say is so: their commands compose and plan, their keys exist, their messages are the program's."""

from __future__ import annotations

import ast
import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from quickstart_runs import Quickstart
from runs import ROOT, environment, write_data

from rlhf.compose import CONF_DIR, register, schema_keys, to_config
from rlhf.gates import validate

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
TESTED_ALONE = ("custom-reward.md",)  # tests/test_custom_reward_doc.py runs its commands
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)  # language, block
CALL = "python -m rlhf"
# Parts of commands that no test plans here, with the reason. Each such command still composes.
NOT_PLANNED = {
    "rm.base=": "a model of the hub",
    "experiment=hh": "the data set and a model of the hub",
    "launch.hostfile=": "two machines with GPUs",
    "run.root=/shared/runs": "an allocation of SLURM",
    "launch.gpus=8": "eight GPUs",
    "do=chat ppo.artifact=": "a run of its own: a plan takes the model for another's, a chat opens it",
}
# What a model of 256 positions and forty tokens of text can take, where a command names none of it.
SMALL = ("data.max_length=128", "data.max_prompt_length=64", "ppo.max_new_tokens=8")
GROUPS = {path.name for path in Path(CONF_DIR).iterdir() if path.is_dir()} - {"__pycache__"}
FILLED = {"...": "model.path=my-model", "engine=...": "engine=single", "launch.gpus=N": "launch.gpus=2"}


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def commands(text: str) -> Iterator[str]:
    """The arguments of each call in a block without language, in an indented block or between backticks. A pipe or
    another program before it on the line, as in `KEY=x python -m rlhf`, is left out."""
    joined = re.sub(r"\\\n\s*", "", text)
    blocks = [block for language, block in FENCED.findall(joined) if not language]
    outside = FENCED.sub("", joined)
    blocks += re.findall(rf"^    {CALL}.*$", outside, re.M) + re.findall(rf"`({CALL}(?: [^`\n]*)?)`", outside)
    for line in "\n".join(blocks).splitlines():
        yield from (match[1].strip() for match in [re.search(rf"{CALL}(|\s.*)$", line)] if match)


COMMANDS = list(
    {found: page for page in PAGES if page not in TESTED_ALONE for found in commands(text_of(page))}.items()
)


def arguments(command: str) -> list[str]:
    """As the shell would split them; of a sweep, its first job."""
    line = command.removesuffix("--cfg job")
    line = line[:-1] if line.count('"') % 2 else line  # the end of `sbatch --wrap "srun python -m rlhf ..."`
    given = [FILLED.get(word, word) for word in shlex.split(line, comments=True)]
    if "model.path=my-model" in given and not any(word.startswith("experiment=") for word in given):
        given.append("experiment=own")
    return [word.split(",")[0] for word in given if word != "-m"] if "-m" in given else given


@cache
def keys() -> frozenset[str]:
    packaged = {f"{group}@{stage}.{group}" for group in GROUPS for stage in ("sft", "rm", "ppo")}
    return frozenset(schema_keys()) | GROUPS | packaged


def test_the_documents_are_read_as_meant() -> None:
    found = {page: list(commands(text_of(page))) for page in PAGES}
    assert found["encoders.md"] == [
        "experiment=own ... rm.base=sentence-transformers/all-MiniLM-L6-v2 ppo.critic_init=policy"
    ]
    assert found["ensembles.md"] == ["run.name=several rm.members=3 rm.holdout=true"]
    assert found["reference/config.md"] == ["ppo.kl.coef=0.1", "--cfg job"]
    assert len(found["tutorial.md"]) == 8 and "" in found["tutorial.md"]
    assert len(COMMANDS) > 25


def composed(given: list[str], known: dict[tuple[str, ...], DictConfig]) -> DictConfig:
    """As Hydra composes it. A choice of groups takes a quarter of a second, so that each is composed once, in `known`;
    keys are then set on a copy by Hydra's own function for them, which `compose` calls too."""
    chosen = tuple(word for word in given if re.split("[=@]", word)[0] in GROUPS)
    if chosen not in known:
        known[chosen] = compose("config", overrides=list(chosen))
    cfg = copy.deepcopy(known[chosen])
    parsed = OverridesParser.create().parse_overrides([word for word in given if word not in chosen])
    ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
    return cfg


def test_every_command_composes() -> None:
    register()
    wrong: dict[str, str] = {}
    known: dict[tuple[str, ...], DictConfig] = {}
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        for command, page in COMMANDS:
            try:
                validate(to_config(composed(arguments(command), known)).gate)
            except Exception as error:  # whatever it is, it belongs to the page that it is about
                wrong[f"{page}: {command}"] = str(error)
    assert wrong == {}


def test_every_addition_in_the_text_composes() -> None:
    """`'+gate.ppo={...}'` and its like, on a configuration of one's own."""
    spans = {page: re.findall(r"`'(\+[^`\n]+)'`", FENCED.sub("", text_of(page))) for page in PAGES}
    assert {page for page, found in spans.items() if found} >= {"how-to/gate-says-no.md"}
    register()
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        for span in sorted({span for found in spans.values() for span in found}):
            validate(to_config(compose("config", overrides=["experiment=own", "model.path=my-model", span])).gate)


def overrides(page: str) -> list[str]:
    """Every `key=value` between backticks whose key has the name of a node or group before its first dot."""
    roots = {key.partition(".")[0] for key in keys()}
    spans = re.findall(r"`([^`\n]+)`", FENCED.sub("", text_of(page)))
    words = [word.strip("'") for span in spans for word in span.replace(CALL, "").split(" ")]
    found = [re.match(r"\+*([a-z_]+(?:@[a-z.]+)?(?:\.\w+)*)=", word) for word in words]
    return [match[1] for match in found if match and match[1].partition(".")[0].partition("@")[0] in roots]


@pytest.mark.parametrize("page", PAGES)
def test_every_override_in_the_text_names_a_key(page: str) -> None:
    free = (
        "reward.",
        "rollout.",
        "ppo.holdout.",
        "gate.sft.",
        "gate.rm.",
        "gate.ppo.",
        "gate.baselines.",
    )  # plug-ins, and names of the user's
    assert [key for key in overrides(page) if key not in keys() and not key.startswith(free)] == []


def test_an_invented_key_would_be_found() -> None:
    assert "ppo.updatez" not in keys()
    assert {"ppo.kl.budget", "lora@ppo.lora", "rm.holdout"} <= keys()
    assert "ppo.kl.budget" in overrides("overoptimisation.md")


# ---- messages


@cache
def messages() -> list[str]:
    """Every text in the code, an expression inside one as a NUL."""
    found = []
    for package in ("rlhf", "stages", "reward_models"):
        for path in (ROOT / package).rglob("*.py"):
            found += [_plain(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return [text for text in found if text]


def _plain(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_plain(part) or "\0" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _plain(node.left) + _plain(node.right)
    return ""


QUOTED = [block.strip() for language, block in FENCED.findall(text_of("troubleshooting.md")) if language == "text"]


def spoken(quoted: str) -> bool:
    """Whether one text of the code has all fixed parts of `quoted`, in their order."""
    parts = [re.escape(part.strip(": ")) for part in quoted.split("…") if part.strip(": ;.,")]
    return any(re.search(".*?".join(parts), text, re.S) for text in messages())


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda q: q[:40])
def test_a_quoted_message_is_one_of_the_programs(quoted: str) -> None:
    assert spoken(quoted)


def test_an_invented_message_would_be_found() -> None:
    assert len(QUOTED) > 25
    assert not spoken("…: no such key, and there will be one")
    assert not spoken("model.path=…: the tokenizer has no bos token")


# ---- the site


def test_every_page_is_in_the_navigation_once() -> None:
    def leaves(node: object) -> list[str]:
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else None
        return [node] if isinstance(node, str) else [leaf for item in inner or () for leaf in leaves(item)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(leaves(nav)) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_of_the_site(page: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", FENCED.sub("", text_of(page)))
    here = (DOCS / page).parent
    lost = [t for t in targets if not t.startswith("http") and not (here / t).resolve().is_file()]
    outside = [t for t in targets if not t.startswith("http") and not (here / t).resolve().is_relative_to(DOCS)]
    assert lost + outside == []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    pytest.importorskip(
        "mkdocstrings_handlers.python", reason="mkdocstrings is not installed: pip install -e '.[docs]'"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    built = (tmp_path / "site" / "reference" / "api.html").read_text(encoding="utf-8")
    assert "load_run" in built and "clipped_value_loss" in built
    assert "ppo.kl.budget" in (tmp_path / "site" / "reference" / "config.html").read_text(encoding="utf-8")


# ---- every command, planned on a finished quickstart beside a toy model and data


@pytest.fixture
def desk(first: Quickstart, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a reader would be in: `runs/quickstart`, a model, the files of data."""
    monkeypatch.chdir(first.root)
    if not Path("my-model").exists():
        Path("my-model").symlink_to(tiny_model)
        write_data(first.root, rows=40)
        rows = [{"prompt": f"my pump {i} rattles", "home": ("luna", "mars")[i % 2]} for i in range(40)]
        Path("gate_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return first.root


PLANNED = [command for command, _ in COMMANDS if not any(part in command for part in NOT_PLANNED)]


@pytest.mark.slow
@pytest.mark.parametrize("command", PLANNED)
def test_every_command_is_planned_on_a_toy(command: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `do=plan`, whatever the command would do: parents are checked and bytes counted, nothing is trained."""
    from rlhf.verbs import plan

    words = [word for word in arguments(command) if not word.startswith("do=")]
    if any(word in ("experiment=own", "model.path=my-model") for word in words):
        words += SMALL
    register()
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = to_config(compose("config", overrides=[*words, "do=plan", "tracker=none"]))
    cfg.run.dir = str(desk / cfg.run.root / cfg.run.name)
    assert plan(cfg) == 0
    shown = capsys.readouterr().out
    assert "would be" in shown and "refused" not in shown


def test_what_is_not_planned_is_in_a_document() -> None:
    assert [part for part in NOT_PLANNED if not any(part in command for command, _ in COMMANDS)] == []
    assert len(PLANNED) > 20
