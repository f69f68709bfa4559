"""The quickstart's world: its cases, demonstrations, annotators and files."""

from __future__ import annotations

import ast
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from scipy.stats import binomtest

from rlhf.artifacts import file_digests
from rlhf.errors import DataError
from rlhf.quickstart import World, annotators, base, gold, grammar, manuals
from rlhf.quickstart.world import CURABLE, FAULTS, REMEDIES, Kind, Shop, all_cases

ROOT = Path(__file__).parents[1]
SHOP = Shop(0)


def test_counts_and_split_by_prompt() -> None:
    cases = all_cases()
    assert len(cases) == 12 * 12 * 6 * 2 * 2 == 3456
    assert len({case.text for case in cases}) == len({case.id for case in cases}) == 3456
    parts = [SHOP.train, SHOP.gate, SHOP.audit]
    assert [len(part) for part in parts] == [2256, 600, 600]
    assert len({case.text for part in parts for case in part}) == 3456  # disjoint
    assert Counter(FAULTS.values()) == {Kind.fixable: 7, Kind.hazard: 3, Kind.lookalike: 2}


def test_the_seed_permutes_cures_and_split() -> None:
    assert sorted(SHOP.cures.values()) == sorted(REMEDIES)
    assert list(SHOP.cures) == list(CURABLE)
    worlds = [tuple(Shop(seed).cures.values()) for seed in range(4)]
    assert len(set(worlds)) == 4
    assert Shop(1).cures == Shop(1).cures
    assert {case.id for case in Shop(1).gate} != {case.id for case in SHOP.gate}
    assert {case.text for case in Shop(1).train + Shop(1).gate + Shop(1).audit} == {case.text for case in all_cases()}


def test_rows_carry_tags_and_never_the_remedy() -> None:
    row = next(case for case in SHOP.gate if case.fault == "throws sparks").row()
    assert (row["kind"], row["safe"]) == ("hazard", False)
    for case in SHOP.gate:
        assert set(case.row()) == {"prompt", "id", "kind", "safe", "home", "customer"}
        assert case.row()["safe"] is (case.kind is not Kind.hazard)
        assert not any(remedy in json.dumps(case.row()) for remedy in REMEDIES)


def exactly(hits: int, n: int, p: float) -> bool:
    """True unless so many hits are too odd (1 in 10,000) for a coin with bias `p`."""
    return bool(binomtest(hits, n, p).pvalue > 1e-4)


def test_demonstrations_have_the_stated_frequencies() -> None:
    pairs = [(c, gold.read(grammar.respond(SHOP, c, random.Random(f"{n}{c.id}")))) for n in (0, 1) for c in SHOP.train]
    for home, p in (("Luna", 0.30), ("Mars", 0.40)):
        said = [r.insults for c, r in pairs if c.home == home]
        assert max(said) == 1
        assert exactly(sum(said), len(said), p)
    curable = [(c, r) for c, r in pairs if c.safe]
    hazards = [r for c, r in pairs if not c.safe]
    assert exactly(sum(gold.right_remedy(SHOP, c, r) for c, r in curable), len(curable), 0.65)
    assert exactly(sum(r.escalated for _, r in curable), len(curable), 0.15)
    assert exactly(sum(r.escalated for r in hazards), len(hazards), 0.55)
    assert all(len(r.remedies) + r.escalated == 1 for _, r in pairs)
    assert {r.courtesies for _, r in pairs} == {0, 1, 2, 3}


def test_demonstrations_reach_beyond_the_free_words_and_spell_every_insult() -> None:
    rows = grammar.demonstrations(SHOP)
    texts = [row["messages"][1]["content"] for row in rows]  # type: ignore[index]
    assert len(rows) == 2256
    assert any("n1ncompoop" in text for text in texts)
    assert max(gold.read(text).words for text in texts) > gold.FREE_WORDS


@pytest.mark.parametrize(
    ("perceived", "ranks"),
    [
        ([2.0, 1.7, 0.0], [1, 1, 2]),
        ([0.0, 1.0, 0.5, 2.0], [4, 2, 3, 1]),
        ([1.0, 0.7, 0.4, 0.1], [1, 1, 1, 1]),  # neighbour ties chain
        ([0.0, 0.5], [2, 1]),
    ],
)
def test_neighbours_closer_than_the_tie_width_share_a_rank(perceived: list[float], ranks: list[int]) -> None:
    assert annotators.ranks_of(perceived) == ranks


def test_annotators_agree_with_gold_as_bradley_terry_says() -> None:
    # Gumbel noise of scale s on both sides: P(better wins) = 1 / (1 + exp(-gap / s)); for gap 1, s = 2 it is .6225.
    rng = random.Random(0)
    wins = sum(1.0 + 2 * annotators.gumbel(rng) > 2 * annotators.gumbel(rng) for _ in range(4000))
    assert exactly(wins, 4000, 0.62246)
    assert sorted(annotators.ANNOTATORS.values()) == [0.7, 1.0, 2.0]


def test_rank_writes_the_lines_again_and_is_deterministic(tmp_path: Path) -> None:
    samples, out = tmp_path / "samples.jsonl", tmp_path / "rankings.jsonl"
    rows = [
        {"prompt": case.messages if i % 2 else case.text, "responses": ["You numpty!", "Good day.", "x", ""], "note": i}
        for i, case in enumerate(SHOP.train[:40])
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    world = World(seed=0)
    world.rank(samples, out)
    first = out.read_text()
    ranked = [json.loads(line) for line in first.splitlines()]
    assert [{k: row[k] for k in ("prompt", "responses", "note")} for row in ranked] == rows
    assert {row["annotator"] for row in ranked} == set(annotators.ANNOTATORS)
    assert {row["subset"] for row in ranked} == {"fixable", "hazard", "lookalike"}
    assert all(min(row["ranks"]) == 1 and len(row["ranks"]) == 4 for row in ranked)
    world.rank(samples, out)
    assert out.read_text() == first


@pytest.mark.parametrize("line", ["{", '{"prompt": "x"}', "[]", '{"prompt": "Who are you?", "responses": ["a", "b"]}'])
def test_rank_names_the_line_it_cannot_judge(tmp_path: Path, line: str) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"prompt": SHOP.train[0].text, "responses": ["a", "b"]}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"samples.jsonl:2"):
        World().rank(samples, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_tokenizer_is_one_token_a_word_and_loses_nothing() -> None:
    texts = [m["content"] for row in grammar.demonstrations(SHOP)[:400] for m in row["messages"]]  # type: ignore[attr-defined]
    tokenizer = base.train_tokenizer(texts + manuals.train_pages(SHOP)[:100])
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in ("You n1ncompoop! Oil the left knee.", "Ünïcode 你好,  two spaces\n\ttab <|end|", texts[1]):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("You n1ncompoop! Oil the left knee.")["input_ids"]) == 8
    messages = SHOP.train[0].messages
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    full = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "Hi."}], tokenize=False)
    assert full == prompt + "Hi.<|end|>"


def test_build_writes_the_same_bytes_for_the_same_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "STEPS", 2)
    digests = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        World(seed).build(tmp_path / name)
        digests.append(file_digests(tmp_path / name))
    assert digests[0] == digests[1]
    for name in ("demonstrations.jsonl", "prompts.jsonl", "reference_text.jsonl", "base/model.safetensors"):
        assert digests[0][name] != digests[2][name]
    assert json.loads((tmp_path / "a/world.json").read_text())["seed"] == 5
    lines = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "a").glob("*.jsonl")}
    assert lines == {
        "demonstrations.jsonl": 4512, "prompts.jsonl": 2256, "gate_prompts.jsonl": 600, "audit_prompts.jsonl": 600,
        "reference_text.jsonl": 120,
    }  # fmt: skip


def imports(path: Path) -> set[str]:
    """Every module and `module.name` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = "." * node.level + (node.module or "")
            found |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
    return found


def test_gold_is_read_by_the_annotators_and_the_audit_alone() -> None:
    files = [path for package in ("rlhf", "stages", "reward_models") for path in (ROOT / package).rglob("*.py")]
    readers = {path.name for path in files if any(name.split(".")[-1] == "gold" for name in imports(path))}
    assert readers == {"annotators.py", "audit.py"}
    # and those two are reached only from within the package, by World.rank and World.audit
    outside = [path for path in files if path.parent.name != "quickstart"]
    assert not [path for path in outside if any(name.startswith("rlhf.quickstart") for name in imports(path))]
    assert not [path for path in outside if "quickstart.gold" in path.read_text(encoding="utf-8")]
