"""do=report: the page shows what the files hold, escapes it, and says what is missing, torn or altered."""

from __future__ import annotations

import base64
import math
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from report_runs import HOSTILE, draw_nothing, make_run, write
from runs import rlhf

from rlhf.config import Config, Do
from rlhf.errors import ConfigError
from rlhf.report import plots, tables
from rlhf.report.page import render
from rlhf.report.reading import read_run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(make_run(tmp_path_factory.mktemp("runs") / "hand"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


def page_of(path: Path) -> str:
    return render([read_run(path)])


def rows(page: str) -> list[list[str]]:
    """Every table row of the page as the text of its cells."""
    found = re.findall(r"<tr>(.*?)</tr>", page, re.S)
    return [[unescape(re.sub(r"<[^>]+>", "", c)) for c in re.findall(r"<td.*?>(.*?)</td>", row, re.S)] for row in found]


def svgs(page: str) -> list[str]:
    return [base64.b64decode(text).decode() for text in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]


def test_values_are_those_of_the_files(page: str) -> None:
    assert 'role="alert"' not in page and len(page) < 3_000_000
    found = rows(page)
    assert ["toxicity", "not measured", "0.5 % [0.1, 1.4]", "0.5 % [0.1, 1.4]"] in found
    assert ["demonstrations: loss, nats a token", "9.75", "0.625", "not measured"] in found
    assert ["toxicity", "PASS", "613", "0.5 % [0.1, 1.4]", "0.01543", "≤ 0.02", ""] in found
    assert ["accuracy", "0.7654", "0.7011 to 0.8222", "144"] in found
    assert ["correlation" in row[0] and row[1] for row in found if row and row[0] == "length: correlation"] == [
        "not measured"
    ]
    assert ["ppo.learning_rate", "1e-06", "0.000321"] in found
    assert ["torch", "9.8.7", "9.8.7", "9.8.7"] in found and ["cpu", "unknown", "unknown", "unknown"] in found
    assert ["run.dir", '""', "/runs/hand"] in found
    assert ["ppo", "1:01:02", "17", "17", "3 003", "train 4.5"] in found  # 3 x 1001 tokens, 3 x 1.5 seconds
    assert 'title="0.0048976 [0.0011, 0.0142]"' in page
    data = next(row for row in found if row[:2] == ["rm", "rows.jsonl"])
    assert data[3:5] == ["811", "809"] and data[-3:] == ["2 empty reply", "MIT (LICENSE)", "sha256:rows"]


def test_curves_hold_the_recorded_numbers_and_name_what_is_not_measured(tmp_path: Path, page: str) -> None:
    view = read_run(make_run(tmp_path / "hand"))
    metrics = view.stages["ppo"].metrics
    assert plots.points(metrics, "step", "reward/score") == [(1, 0.1), (2, 0.2), (3, pytest.approx(0.3))]
    assert plots.points(metrics, "step", "policy/entropy") == []  # NaN is no point
    entropy = plots.curve(plots.CURVES["ppo"][3], [("", metrics)])
    assert entropy.src is None and "not measured" in entropy.missing
    assert "holdout reward: not measured" in "".join(svgs(page))


def test_a_long_curve_is_thinned_and_keeps_its_end() -> None:
    found = plots.points([{"step": i, "x": i} for i in range(1001)], "step", "x")
    assert len(found) == 334 and found[-1] == (1000, 1000) and found[0] == (1, 1)


def test_hostile_text_is_escaped_and_hidden(page: str) -> None:
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert page.count("<script") == 1
    kind = re.search(r"<(\w+) ([^>]*)>ppo is kind<", page)
    unscored = re.search(r"<(\w+) ([^>]*)>nobody scored<", page)
    toxic = re.search(r"<(\w+) ([^>]*)>&lt;script", page)
    prompt = re.search(r"<(\w+) ([^>]*)>asks p0<", page)  # no scorer has seen it
    assert kind and unscored and toxic and prompt and prompt.group(1) == "button"
    assert (kind.group(1), unscored.group(1), toxic.group(1)) == ("p", "button", "button")
    assert HOSTILE not in unescape(page) and "more characters" in page


REMOVED, TORN = ("", ""), ("torn", "")


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("ppo/metrics.jsonl", ("0.25", "0.15"), "altered"),
        ("ppo/metrics.jsonl", REMOVED, "missing"),
        ("ppo/metrics.jsonl", TORN, "unreadable"),
        ("ppo/verdict.json", ("613", "999"), "altered"),
        ("ppo/verdict.json", REMOVED, "missing"),
        ("rm/report.json", ("0.7654", "0.9654"), "altered"),
        ("sft/manifest.json", ("sft-digest", "other-digest"), "altered"),
        ("sft/manifest.json", TORN, "unreadable"),
        ("ledger.jsonl", ("finished", "started"), "altered"),
        ("ledger.jsonl", REMOVED, "missing"),
        ("config.yaml", REMOVED, "missing"),
        ("config.yaml", TORN, "unreadable"),
        ("sft/gate_samples.jsonl", REMOVED, "missing"),
    ],
)
def test_a_changed_file_is_named(tmp_path: Path, name: str, change: tuple[str, str], expected: str) -> None:
    path = make_run(tmp_path / "hand")
    file = path / name
    text = file.read_text(encoding="utf-8")
    if change == REMOVED:
        file.unlink()
    elif change == TORN:
        file.write_bytes(b"\xff\xfe{[" + text.encode())
    else:
        assert change[0] in text
        file.write_text(text.replace(*change, 1), encoding="utf-8")
    assert (name, expected) in [(problem.name, problem.state) for problem in read_run(path).problems]


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_what_is_altered_and_shows_the_rest(tmp_path: Path) -> None:
    path = make_run(tmp_path / "hand")
    (path / "ppo" / "metrics.jsonl").unlink()
    write(path / "ppo" / "verdict.json", [1, 2])
    (path / "sft" / "metrics.jsonl").write_text('{"step": 1}\n[NaN\n', encoding="utf-8")
    page = page_of(path)
    alert = re.search(r'role="alert">(.*?)</div>', page, re.S)
    assert alert
    said = unescape(re.sub(r"<[^>]+>", "", alert.group(1)))
    assert "ppo/metrics.jsonl is missing" in said
    assert "ppo/verdict.json is unreadable: not a JSON object" in said
    assert "sft/metrics.jsonl is unreadable: line 2 is not a JSON object" in said
    assert "0.7654" in page


@pytest.mark.usefixtures("undrawn")
def test_an_exchanged_verdict_is_not_believed(tmp_path: Path) -> None:
    """A genuine verdict of another run has a right id, but not the one in the ledger."""
    path, other = make_run(tmp_path / "hand", "FAIL", "UNPROMOTED"), make_run(tmp_path / "other")
    shutil.copy(other / "ppo" / "verdict.json", path / "ppo" / "verdict.json")
    assert "not the newest verdict that the ledger holds" in page_of(path)


@pytest.mark.usefixtures("undrawn")
def test_a_failed_run_says_so_in_words(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "hand", "FAIL", "UNPROMOTED"))
    assert '<div class="banner bad"><strong>ppo: UNPROMOTED.</strong>' in page
    assert "<li>the gate of ppo says FAIL</li>" in page
    assert '<span class="badge bad">FAIL</span>' in page and '<span class="badge doubt">UNPROMOTED</span>' in page


@pytest.mark.usefixtures("undrawn")
def test_what_has_not_run_is_not_measured(tmp_path: Path) -> None:
    path = make_run(tmp_path / "hand")
    shutil.rmtree(path / "ppo")
    lines = (path / "ledger.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (path / "ledger.jsonl").write_text("".join(lines[:-2]), encoding="utf-8")
    page = page_of(path)
    assert 'role="alert"' not in page and "NOT MADE" in page
    assert "not measured: there is no verdict" in page


def test_without_a_recorded_digest_a_file_is_unchecked_not_intact(tmp_path: Path) -> None:
    path = make_run(tmp_path / "hand")
    (path / "ledger.jsonl").unlink()
    states = {file.name: file.state for file in read_run(path).stages["ppo"].files}
    assert states["ppo/metrics.jsonl"] == "unchecked"


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        read_run(tmp_path)


def test_numbers() -> None:
    shown = {0.0016666: "0.001667", 29868.88: "29869", 3: "3", 1e-7: "1.000e-07", 12345678: "12 345 678", 0.0: "0"}
    assert {value: tables.cell(value).text for value in shown} == shown
    assert tables.cell(None).text == "not measured"
    assert tables.cell(math.nan).text == "not a number" and tables.cell(math.inf).text == "not a number"
    assert tables.cell(True).text == "True"


@pytest.mark.usefixtures("undrawn")
def test_the_verb_writes_pages_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf.verbs import dispatch

    monkeypatch.setenv("WANDB_API_KEY", "planted-secret-4711")
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "_$<b>", "FAIL", "UNPROMOTED")
    cfg = Config(do=Do.report)
    cfg.run.root, cfg.run.dir = str(tmp_path), str(one)
    assert dispatch(cfg) == 0
    cfg.report.runs = ["one", str(two)]
    assert dispatch(cfg) == 0
    pages = [path.read_text(encoding="utf-8") for path in (one / "report.html", tmp_path / "report.html")]
    assert "planted-secret-4711" not in "".join(pages) + capsys.readouterr().out
    assert not re.search(r"(src|href)=\"(?!data:|#)", "".join(pages))  # nothing is fetched
    assert "<b>:" not in pages[1] and "&lt;b&gt;" in pages[1]
    overview = [row for row in rows(pages[1]) if row and row[0] in ("one", "_$<b>")]
    assert [row[3] for row in overview] == ["PASS", "FAIL"]


@pytest.mark.slow
def test_the_verb_does_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To import it takes longer than to make the page."""
    run = make_run(tmp_path / "hand")
    for name in ("torch", "transformers"):
        (tmp_path / "none" / name).mkdir(parents=True)
        (tmp_path / "none" / name / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "none"))
    made = rlhf("do=report", f"run.root={tmp_path}", "run.name=hand", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert (run / "report.html").is_file() and (run / "ppo" / "model" / "README.md").is_file()
