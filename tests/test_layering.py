"""Arrows only point down: every import inside the package goes to a lower level."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A module may import its own level and those below.
LEVELS = [
    {
        "errors",
        "types",
        "artifacts",
        "config",
        "console",
        "heap",
        "plugins",
        "places",
        "pulse",
        "remote",
        "signals",
        "supervise",
    },
    {"losses", "advantages", "ranking_loss", "statistics"},
    {"launch", "compose", "ledger", "tracking"},
    {
        "manifest",
        "memory",
        "render",
        "lora",
        "lean_lora",
        "packed",
        "adapters",
        "kv_cache",
        "last_layer",
        "decode_step",
        "recorded",
        "trial",
        "encoders",
        "scoring",
    },
    {"data", "models"},
    {"engine"},
    {"sharing", "checkpoints"},
    {"context", "logprobs", "rollout", "training", "ranking_trainer", "reward_report", "classifier"},
    {"members", "footprint"},
    {"rewards", "gates", "inputs"},
    {"ppo", "sampling", "quickstart"},
    {"rundir", "runs", "doctor", "report"},
    {"judging", "preflight", "chat"},
    {"pipeline"},
    {"plan_memory"},
    {"plan"},
    {"verbs"},
    {"worker", "__main__", "__init__"},
]
MATHS = {
    "losses", "advantages", "ranking_loss", "statistics/counts", "statistics/paired", "statistics/ranks",
    "reward_report/agreement", "reward_report/baselines", "reward_report/calibration",
}  # fmt: skip


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Dotted names of every import in a file; with `top_only`, those that run when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def type_checking_only(path: Path) -> set[str]:
    """Imports under `if TYPE_CHECKING:`, which never run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for inner in node.body:
                if isinstance(inner, ast.ImportFrom) and inner.module:
                    found |= {f"{inner.module}.{a.name}" for a in inner.names} | {inner.module}
    return found


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "rlhf").parts[0].removesuffix(".py")


def level(module: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if module in names)


FILES = sorted((ROOT / "rlhf").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = module_of(path)
    used = imports(path) - type_checking_only(path)
    inside = {name.split(".")[1] for name in used if name.startswith("rlhf.")} - {"__version__", "load_run"}
    upward = {name for name in inside if name != here and level(name) > level(here)}
    assert not upward, f"{path}: imports {upward} from above"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_names_no_stage_and_no_reward_model(path: Path) -> None:
    assert not {n for n in imports(path) if n.split(".")[0] in {"stages", "reward_models", "conf"}}


@pytest.mark.parametrize("name", sorted(MATHS))
def test_maths_is_importable_alone(name: str) -> None:
    allowed = {
        "torch",
        "numpy",
        "scipy",
        "math",
        "dataclasses",
        "typing",
        "collections",
        "__future__",
        "itertools",
        "re",
    }
    foreign = {n.split(".")[0] for n in imports(ROOT / "rlhf" / f"{name}.py")} - allowed
    assert not foreign


@pytest.mark.parametrize(("library", "owner"), [("deepspeed", "engine"), ("wandb", "tracking")])
def test_one_module_knows_each_service(library: str, owner: str) -> None:
    files = [p for top in ("rlhf", "stages", "reward_models") for p in (ROOT / top).rglob("*.py")]
    users = {module_of(p) if p.is_relative_to(ROOT / "rlhf") else p.name for p in files
             if any(n.split(".")[0] == library for n in imports(p))}  # fmt: skip
    assert users <= {owner}
