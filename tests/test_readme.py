"""What the README says is so: its commands compose, its class works, its links lead somewhere, its codes are ours."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import pytest
from hydra import compose, initialize_config_dir
from quickstart_runs import Quickstart
from runs import ROOT

from rlhf import errors
from rlhf.compose import CONF_DIR, register, to_config
from rlhf.config import Config

README = (ROOT / "README.md").read_text(encoding="utf-8")
JOINED = README.replace("\\\n", " ")
TRY_IT = README.split("\n## Try it\n")[1].split("\n## ")[0]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)  # language, block
FILLED = {"...": "some/thing", "path-or-hub-id": "some/thing"}


def commands() -> list[str]:
    """The arguments of every `python -m rlhf` in a code block or between backticks."""
    spoken = re.findall(r"`(python -m rlhf [^`\n]*)`", FENCED.sub("", JOINED))
    found = [line for language, block in FENCED.findall(JOINED) if not language for line in block.splitlines()] + spoken
    return [line.partition("python -m rlhf")[2].strip() for line in found if "python -m rlhf" in line]


def table_rows() -> list[str]:
    """The first column of the table `you type | it does`, one entry for each code span."""
    rows = README.split("| you type | it does |\n|---|---|\n")[1].split("\n\n")[0]
    return [span for row in rows.splitlines() for span in re.findall(r"`([^`]*)`", row.split("|")[1])]


def composed(arguments: str) -> Config:
    overrides = [re.sub("|".join(map(re.escape, FILLED)), lambda m: FILLED[m[0]], a) for a in shlex.split(arguments)]
    if "-m" in overrides:  # a sweep: its first job
        overrides = [o.split(",")[0] for o in overrides if o != "-m"]
    register()
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return to_config(compose("config", overrides=overrides))


def extracted_by_ci() -> list[str]:
    """The lines that .ci/run takes out of the README, by its own awk program."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    program = re.search(r"awk '([^']*)' README.md", script)
    assert program, ".ci/run no longer takes its commands from README.md with awk"
    done = subprocess.run(["awk", program[1], "README.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(not (ROOT / ".ci" / "run").is_file(), reason="no .ci/run here")
@pytest.mark.skipif(shutil.which("awk") is None, reason="no awk here")
def test_the_two_commands_of_try_it_are_what_ci_runs() -> None:
    fenced = [block.strip() for _, block in FENCED.findall(TRY_IT)]
    assert extracted_by_ci() == fenced[:2]
    run, test = fenced[:2]
    assert run.endswith("&& python -m rlhf")
    assert test.endswith("&& pytest")
    assert all(line.startswith("pip install -c constraints.txt -e ") for line in (run, test))


def test_the_readme_is_read_as_meant() -> None:
    assert len(commands()) == 7
    assert len(table_rows()) == 16


@pytest.mark.parametrize("arguments", commands())
def test_every_command_composes(arguments: str) -> None:
    composed(arguments)


@pytest.mark.parametrize("arguments", table_rows())
def test_every_row_of_the_table_composes(arguments: str) -> None:
    composed(arguments)


def test_a_wrong_command_would_be_found() -> None:
    with pytest.raises(Exception, match="updatez"):
        composed("ppo.updatez=3")


def test_the_custom_reward_scores_as_it_says() -> None:
    source = next(b for _, b in FENCED.findall(README) if "def score" in b)
    assert len(source.strip().splitlines()) <= 10
    namespace: dict[str, type] = {}
    exec(source, namespace)
    reward = namespace["Brief"](words=3)
    assert reward.score(["p"] * 3, ["one two three", "one two three four", ""], [{}] * 3) == [1.0, 0.0, 1.0]
    assert namespace["Brief"]().score(["p"] * 2, ["w " * 30, "w " * 31], [{}] * 2) == [1.0, 0.0]


def test_the_python_example_compiles_and_names_what_there_is() -> None:
    import rlhf

    source = next(b for _, b in FENCED.findall(README) if "load_run" in b)
    compile(source, "README.md", "exec")
    assert set(re.findall(r"rlhf\.(\w+)", source)) - {"from_pretrained"} <= set(rlhf.__all__)


def test_every_link_leads_to_a_file() -> None:
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", README) if not t.startswith(("http://", "https://"))]
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_the_exit_codes_are_those_of_the_errors() -> None:
    line = README.split("Exit codes: ")[1].split("\n\n")[0]
    told = {int(code): text.strip() for code, text in re.findall(r"(?:^|·)\s*(\d+) ([^·]*)", line)}
    assert sorted(told) == [0, 1, 2, 10, 11, 12, 13, 14, 75]
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.RLHFError)]
    assert {k.exit_code for k in kinds} | {0} == set(told)
    words = {2: "configuration or data", 10: "FAIL", 11: "INCONCLUSIVE", 12: "INVALID", 13: "lineage",
             14: "waiver", 75: "signal"}  # fmt: skip
    assert all(word in told[code] for code, word in words.items())
    assert (errors.GateError.exit_code, errors.Inconclusive.exit_code, errors.Invalid.exit_code) == (10, 11, 12)


@pytest.mark.skipif("QUICKSTART_OUTPUT" in README, reason="the quickstart's printout is not filled in yet")
def test_the_printout_names_what_the_program_prints() -> None:
    from rlhf.quickstart.audit import LABELS, MODELS

    missing = [text for text in (*LABELS.values(), *MODELS) if text not in TRY_IT]
    assert missing == []


def tables(output: str) -> list[list[list[str]]]:
    """The tables that rich drew: rows of cells, the header first."""
    found: list[list[list[str]]] = []
    for line in output.splitlines():
        if line.startswith("┏"):
            found.append([])
        elif line.startswith(("┃", "│")):
            found[-1].append([cell.strip() for cell in re.split("[┃│]", line)[1:-1]])
    return found


def interval(cell: str) -> tuple[str, float, float]:
    """The unit, lower and upper bound of `value  [low, high]` or `value %  [low, high]`."""
    match = re.fullmatch(r"-?[\d.]+( %)?  \[(-?[\d.]+), (-?[\d.]+)\]", cell)
    assert match, cell
    return match[1] or "", float(match[2]), float(match[3])


def test_intervals_are_read_as_printed() -> None:
    assert interval("62.1 %  [57.5, 66.4]") == (" %", 57.5, 66.4)
    assert interval("-0.74  [-0.84, -0.64]") == ("", -0.84, -0.64)


@pytest.mark.slow
def test_the_printout_is_that_of_a_run(first: Quickstart) -> None:
    """Row for row, column for column. Another machine rounds differently and so samples other words, so that figures
    agree when their 95 % intervals overlap; the stages and their verdicts must be the same."""
    (told, told_stages), (seen, seen_stages) = tables(TRY_IT), tables(first.process.stdout)[-2:]  # after the gates
    assert [row[0] for row in told] == [row[0] for row in seen]
    assert told[0] == seen[0] == ["", "base", "SFT", "PPO"]
    assert told_stages == seen_stages
    apart = []
    for old, new in zip(told[1:], seen[1:], strict=True):
        for column, a, b in zip(told[0][1:], old[1:], new[1:], strict=True):
            if a and b:
                (unit, low, high), (other, lower, higher) = interval(a), interval(b)
                assert unit == other
                apart += [f"{old[0]}, {column}: {a} in the README, {b} here"] if low > higher or lower > high else []
            else:
                assert a == b
    assert apart == []
