"""The model card: what the files hold, as text, with the artifact's digest as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from report_runs import draw_nothing, make_run, write

from rlhf.artifacts import folder_digest
from rlhf.config import Config, Do
from rlhf.ledger import Ledger
from rlhf.report.card import card, words, write_cards
from rlhf.report.page import banner
from rlhf.report.reading import read_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "hand")


def card_of(path: Path, stage: str = "ppo") -> str:
    view = read_run(path)
    return card(view, view.stages[stage])


def rows(text: str) -> list[list[str]]:
    """Every table row as its cells."""
    return [re.split(r" \| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]


def section(text: str, name: str) -> str:
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0].strip()


def change(path: Path, **fields: Any) -> None:
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **fields})


def test_values_are_those_of_the_files(run: Path) -> None:
    text = card_of(run)
    found = rows(text)
    assert "> [!NOTE]\n> **PROMOTED.** " in text and "WARNING" not in text
    bound = "0.01543 (clopper pearson upper 0.95)"
    assert ["toxicity", "PASS", "613", r"0.5 % \[0.1, 1.4\]", bound, "≤ 0.02", ""] in found
    assert ["ppo.learning_rate", "0.000321"] in found
    read = ["rows.jsonl", "ranking", "811", "809", "2 empty reply", "MIT (LICENSE)", "sha256:rows"]
    assert ["rm", *read] not in found and ["ppo", *read] in found  # rm is not its parent
    assert ["ppo", "PROMOTED", "PASS", "sha256:ppo-digest", "base sha256:base", "sha256:ppo-mark"] in found
    assert "Seed: 5. Updates: 17 of 17 planned." in text and "torch 9.8.7" in text and "Base model: org/base." in text
    assert ["accuracy", "0.7654", "0.7011 to 0.8222", "144"] in rows(card_of(run, "rm"))


def test_the_lineage_is_followed_by_digest(run: Path) -> None:
    """Its own sft and the data of it; an rm of the same name but of another run is not taken for the parent."""
    parents = {"sft": "sha256:sft-digest", "rm": "sha256:of-another-run"}
    change(run / "ppo" / "manifest.json", parents=parents)
    change(run / "sft" / "manifest.json", base_license="apache-2.0 (README.md)")
    text = card_of(run)
    data = [row[0] for row in rows(section(text, "Training data"))]
    assert data == ["stage", "---", "sft", "ppo"]
    assert "The data of rm is recorded in another run." in text
    assert "Base model: org/base. Its licence: apache-2.0 (README.md)." in text
    assert "Its licence: unknown." in card_of(run, "rm")


def test_a_licence_that_is_not_recorded_is_unknown(run: Path) -> None:
    change(run / "ppo" / "data_report.json", files=[{"file": "a", "license": None}, {"file": "b"}])
    found = [row[6] for row in rows(section(card_of(run), "Training data"))[2:]]
    assert found == ["unknown", "unknown"]


def test_the_header_is_one_that_the_hub_reads(run: Path) -> None:
    read = ModelCard(card_of(run, "rm"))
    assert read.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-classification",
                                   "tags": ["rlhf", "rm"]}  # fmt: skip


@pytest.mark.parametrize("status", ["UNPROMOTED", "WAIVED"])
def test_what_did_not_pass_is_a_warning_at_the_top(tmp_path: Path, status: str) -> None:
    text = card_of(make_run(tmp_path / "hand", "FAIL", status))
    assert text.split("\n# ")[1].split("\n")[2:4][0] == "> [!WARNING]"
    assert f"> **{status}.** " in text and "> [!NOTE]" not in text
    assert "toxicity: FAIL. No reason is recorded." in section(text, "Known limits")


def test_a_status_that_the_record_contradicts_is_not_repeated(run: Path, tmp_path: Path) -> None:
    Ledger(run / "ledger.jsonl").append("promotion", stage="ppo", status="UNPROMOTED", digest="sha256:ppo-digest")
    forged = make_run(tmp_path / "forged", "FAIL", "PROMOTED")
    torn, other = make_run(tmp_path / "torn"), make_run(tmp_path / "other")
    (torn / "ppo" / "verdict.json").unlink()
    Ledger(other / "ledger.jsonl").append("promotion", stage="ppo", status="PROMOTED", digest="sha256:another")
    for path in (run, forged, torn, other):
        text = card_of(path)
        assert "> [!WARNING]\n> **UNVERIFIED.**" in text and "**PROMOTED.**" not in text
    assert "> - ppo/verdict.json is missing" in card_of(torn)


def test_waivers_are_those_of_the_ledger(run: Path) -> None:
    assert section(card_of(run), "Waivers") == "The ledger holds none."
    given = {"waiver_id": "W-7", "approver": "Ada | Bob", "requester": "Cy", "expires": "2026-02-03", "reason": "demo"}
    ledger = Ledger(run / "ledger.jsonl")
    ledger.append("waiver", stage="ppo", decision="ALLOW_BY_WAIVER", checks={"toxicity": 0.031}, **given)
    ledger.append("waiver", stage="rm", decision="REJECTED", reason="of another model")
    found = rows(section(card_of(run), "Waivers"))[2:]
    expected = ["ppo", "ALLOW_BY_WAIVER", "W-7", "toxicity 0.031", r"Ada \| Bob", "Cy", "2026-02-03", "demo"]
    assert [row[1:] for row in found] == [expected]


def waive(path: Path, stage: str, **more: str) -> None:
    given = {"waiver_id": "W-7", "approver": "Ada", "requester": "Cy", "expires": "2026-02-03", "reason": "a demo"}
    verdict = json.loads((path / stage / "verdict.json").read_text(encoding="utf-8"))["verdict_id"]
    given |= {"verdict_id": verdict, "decision": "ALLOW_BY_WAIVER", **more}
    Ledger(path / "ledger.jsonl").append("waiver", stage=stage, **given)


def test_a_waived_card_names_who_waived_and_until_when(tmp_path: Path) -> None:
    path = make_run(tmp_path / "hand", "FAIL", "WAIVED")
    waive(path, "ppo", verdict_id="sha256:of-an-older-verdict", approver="Eve")
    waive(path, "ppo", approver="Bob", decision="REJECTED")
    assert "> - the waiver is not in this run's ledger" in card_of(path)
    waive(path, "ppo")
    line = "ppo was waived by Ada until 2026-02-03 with W-7: a demo"
    assert f"> - {line}\n" in card_of(path).split("\n## ")[0]
    shown = banner(read_run(path))
    assert shown and (shown["stage"], shown["word"], shown["tone"]) == ("ppo", "WAIVED", "doubt")
    assert line in shown["lines"]


def test_a_parent_whose_verdict_contradicts_its_status_is_not_relied_on(run: Path) -> None:
    """As after a kill between a parent's new verdict and its stamp."""
    change(run / "ppo" / "manifest.json", parents={"sft": "sha256:sft-digest"})
    change(run / "sft" / "verdict.json", decision="FAIL")
    top = card_of(run).split("\n## ")[0]
    assert "**UNVERIFIED.**" in top and "the status of sft is PROMOTED and its verdict FAIL" in top


@pytest.mark.parametrize("status", ["UNPROMOTED", "WAIVED"])
def test_a_model_stands_no_better_than_the_parent_that_failed_later(run: Path, status: str) -> None:
    for stage in ("sft", "rm", "ppo"):
        change(run / stage / "manifest.json", parents={"sft": "sha256:sft-digest"} if stage == "ppo" else {})
    assert "**PROMOTED.**" in card_of(run)
    change(run / "rm" / "manifest.json", status="UNPROMOTED")
    assert "**PROMOTED.**" in card_of(run), "rm is no parent of it"
    change(run / "sft" / "manifest.json", status=status)
    waive(run, "sft")
    top = card_of(run).split("\n## ")[0]
    assert f"> [!WARNING]\n> **{status}.** " in top and f"sft, which it was made from, is {status} now" in top
    assert ("sft was waived by Ada" in top) == (status == "WAIVED")
    shown = banner(read_run(run))
    assert shown and shown["word"] == status


def test_a_card_that_would_say_the_same_is_not_touched(run: Path) -> None:
    (path,) = (path for path in write_cards(read_run(run)) if path.parts[-3] == "ppo")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert path in write_cards(read_run(run))
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    change(run / "ppo" / "manifest.json", status="UNPROMOTED")
    write_cards(read_run(run))
    assert "**PROMOTED.**" not in path.read_text(encoding="utf-8") and path.stat().st_ino != before[1]


def test_hostile_text_stays_text(run: Path) -> None:
    hostile = "<img src=x onerror=alert(1)> [click](javascript:x) | cell\n---\n# heading `code` \u202e {{ 7 * 7 }}"
    change(run / "ppo" / "data_report.json", files=[{"file": hostile, "rows": 3}])
    text = card_of(run)
    assert "<img" not in text and "[click]" not in text and "\n# heading" not in text and "\u202e" not in text
    line = next(line for line in text.splitlines() if "onerror" in line)
    assert r"\| cell --- \# heading \`code\` " + "\ufffd" + r" \{\{ 7 \* 7 \}\}" in line
    change(run / "ppo" / "manifest.json", base_model=f"{hostile}\n---\nlicense: mit\n---\n")
    assert set(ModelCard(card_of(run)).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}


def test_words() -> None:
    assert words("/home/ada/secret/rows.jsonl") == "rows.jsonl"  # a card is published, a machine's paths are not
    assert words("max_new_tokens") == "max_new_tokens" and words("_it_") == r"\_it\_"
    assert words("a" * 301) == "a" * 300 + " …"


def test_missing_parts_say_so(run: Path) -> None:
    for name in ("verdict.json", "data_report.json"):
        (run / "ppo" / name).unlink()
    made = json.loads((run / "ppo" / "manifest.json").read_text(encoding="utf-8"))
    write(run / "ppo" / "manifest.json", {key: made[key] for key in ("schema", "stage", "digest")})
    (run / "ledger.jsonl").unlink()
    text = card_of(run)
    assert section(text, "Training data").startswith("No data report is recorded for ppo.")
    assert "Base model: not recorded." in text and "Tuned: not recorded." in text
    assert "No hyper-parameter is recorded." in section(text, "Method")
    assert section(text, "Verdict").startswith("Not measured: there is no verdict.")
    assert section(text, "Waivers") == "Not known: there is no ledger that could be read."
    assert section(text, "Known limits").startswith("- No check has run")
    assert "The environment is not recorded." in text
    assert "**UNVERIFIED.**" in text and "It states: NOT JUDGED." in text


def test_the_card_is_outside_the_digest_and_moved_in_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = run / "ppo" / "model"
    (model / "config.json").write_text("{}", encoding="utf-8")
    before = folder_digest(model)
    seen: list[Path] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append(self)
        assert folder_digest(model) == before and sorted(p.name for p in model.iterdir())[-1] == "config.json"
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    assert model / "README.md" in write_cards(read_run(run))
    assert folder_digest(model) == before and sorted(p.name for p in model.iterdir()) == ["README.md", "config.json"]
    assert seen and all(path.parent != model for path in seen)
    assert not list(run.rglob("*.part")) and not (run / "ppo" / "README.md").exists()


def test_an_imported_model_s_folder_is_left_alone(run: Path, tmp_path: Path) -> None:
    change(run / "sft" / "manifest.json", imported=str(tmp_path / "theirs"))
    (run / "sft" / "model").rmdir()
    (tmp_path / "theirs").mkdir()
    assert write_cards(read_run(run))[0] == run / "sft" / "README.md"
    assert not list((tmp_path / "theirs").iterdir())
    assert "imported" in section((run / "sft" / "README.md").read_text(encoding="utf-8"), "How to load")


def test_do_report_writes_the_cards_of_finished_stages(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf.verbs import dispatch

    draw_nothing(monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret-4711")
    (run / "rm" / "manifest.json").unlink()
    cfg = Config(do=Do.report)
    cfg.run.root, cfg.run.dir = str(run.parent), str(run)
    assert dispatch(cfg) == 0
    cards = {path.parent.parent.name: path.read_text(encoding="utf-8") for path in run.glob("*/model/README.md")}
    assert sorted(cards) == ["ppo", "sft"] and "planted-secret" not in "".join(cards.values())
