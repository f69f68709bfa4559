"""The reward model's report: each part on rows worked by hand, then the file that a run of the stage leaves."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from report_schema import check_schema, read
from supervised_toys import make_config, make_context, make_tokenizer, tiny_base

from rlhf.errors import Preempted, TrainingError
from rlhf.render import Renderer
from rlhf.reward_report import comparing, sections, write
from rlhf.reward_report.calibration import calibrated_errors
from rlhf.reward_report.pairs import Judged, NotMeasured, Pair, draw, pairs_of, rate
from rlhf.types import Prompt, Ranking
from stages import rm


def judged(rewards: list[float], ranks: list[int | None], lengths: list[int] | None = None, **more: Any) -> Judged:
    """A ranking of the responses "a", "b", ...; `prompt` names its prompt, `words` what the bag of words says."""
    name = more.get("prompt", f"question {judged.count}")  # type: ignore[attr-defined]
    judged.count += 1  # type: ignore[attr-defined]
    ranking = Ranking(
        prompt=Prompt(messages=[{"role": "user", "content": name}], where=f"d.jsonl:{judged.count}"),  # type: ignore[attr-defined]
        responses=more.get("responses", list("abcdef"[: len(rewards)])), ranks=ranks,
        annotator=more.get("annotator"), subset=more.get("subset"),
    )  # fmt: skip
    return Judged(ranking=ranking, prompt=name, rewards=rewards, lengths=lengths or [1] * len(rewards),
                  words=more.get("words"))  # fmt: skip


judged.count = 0  # type: ignore[attr-defined]


def strict(rows: list[Judged]) -> list[Pair]:
    return pairs_of(rows)[0]


RIGHT, WRONG = [1.0, 0.0], [0.0, 1.0]  # the rewards of a pair whose first response is preferred


def pair(rewards: list[float], **more: Any) -> Judged:
    return judged(rewards, [1, 2], **more)


# ---- accuracy


def test_equal_rewards_are_a_miss_and_each_prompt_counts_once() -> None:
    """Four prompts: right, right, equal, and one with two annotators whose rankings both are wrong."""
    rows = [pair(RIGHT), pair(RIGHT), pair([1.0, 1.0]), pair(WRONG, prompt="q"), pair(WRONG, prompt="q")]
    found = rate(strict(rows), 0)
    assert (found["right"], found["prompts"], found["pairs"]) == (2, 4, 5)
    assert (found["estimate"], found["over_all_pairs"]) == (0.5, 0.4)
    # both ends of 2 in 4: P(X >= 2) = .025 at .0676, and by symmetry
    assert found["lower"] == pytest.approx(0.0676, abs=5e-5) and found["upper"] == pytest.approx(1 - found["lower"])


def test_all_right_has_the_closed_interval() -> None:
    found = rate(strict([pair(RIGHT) for _ in range(8)]), 0)
    assert (found["lower"], found["upper"]) == (pytest.approx(0.025 ** (1 / 8)), 1.0)


def test_one_pair_a_prompt_is_the_draw_of_the_stage() -> None:
    """The same seed and order as in stages.rm.accuracy, so that the report and the manifest agree."""
    rows = [judged([3.0, 1.0, 2.0], [1, 2, 3]) for _ in range(30)]  # two of three pairs right
    toys = [rm.Row(prompt=row.prompt, ids=[[1]] * 3, ranks=row.ranking.ranks, response_lengths=[1] * 3) for row in rows]
    fake = iter([reward for row in rows for reward in row.rewards])
    original, rm.score_ids = rm.score_ids, lambda model, ids, tokens: [next(fake) for _ in ids]  # type: ignore[assignment]
    try:
        stage = rm.accuracy(None, toys, toys, 5)
    finally:
        rm.score_ids = original  # type: ignore[assignment]
    found = rate(strict(rows), 5)
    assert 0 < found["estimate"] < 1 and found["estimate"] == stage["rm/one_pair_accuracy"]
    assert found["over_all_pairs"] == pytest.approx(2 / 3) == pytest.approx(stage["rm/accuracy"])


def test_groups_are_rated_apart() -> None:
    rows = [pair(RIGHT, subset="x", annotator="anna"), pair(WRONG, subset="x"), pair(RIGHT, annotator="ben")]
    subset, annotator = sections.by_subset(strict(rows), 0), sections.by_annotator(strict(rows), 0)
    assert {name: (part["right"], part["prompts"]) for name, part in subset.items()} == {"x": (1, 2)}
    assert {name: part["right"] for name, part in annotator.items()} == {"anna": 1, "ben": 1}
    assert list(sections.by_file(strict(rows), 0)) == ["d.jsonl"]
    with pytest.raises(NotMeasured, match="subset"):
        sections.by_subset(strict([pair(RIGHT)]), 0)
    with pytest.raises(NotMeasured, match="annotator"):
        sections.by_annotator(strict([pair(RIGHT)]), 0)


def test_margins_by_rank_and_by_reward() -> None:
    """Ranks 1, 5, 5, 9 are places 1, 2, 2, 3. Rewards 4, 1, 3, 2: of the four pairs one place apart 1 beats 5, 1 beats
    5, and 5 against 9 is wrong once (1 < 2); the pair two places apart is right."""
    row = judged([4.0, 1.0, 3.0, 2.0], [1, 5, 5, 9])
    found = sections.by_rank_distance(strict([row]), 0)
    assert list(found) == ["1", "2"]
    assert [part["pairs"] for part in found.values()] == [4, 1]
    assert found["1"]["over_all_pairs"] == 0.75 and found["2"]["over_all_pairs"] == 1.0

    rows = [pair([float(i), 0.0]) for i in range(1, 9)] + [pair([0.0, 0.5]), pair([0.0, 0.6])]
    fifths = sections.by_reward_difference(strict(rows), 0)
    assert [(part["from"], part["to"]) for part in fifths] == [(0.5, 0.6), (1, 2), (3, 4), (5, 6), (7, 8)]
    assert [part["right"] for part in fifths] == [0, 2, 2, 2, 2]
    with pytest.raises(NotMeasured, match="5 strict pairs"):
        sections.by_reward_difference(strict(rows[:4]), 0)


def test_ties_beside_strict_pairs() -> None:
    """Strict |d|: 3 and 1; tied |d|: 2. Of the two comparisons of strict and tied one is greater."""
    rows = [pair([3.0, 0.0]), pair([0.0, 1.0]), judged([5.0, 3.0], [1, 1])]
    found = sections.ties(*pairs_of(rows))
    assert found == {"pairs": 1, "mean_difference": 2.0, "strict_mean_difference": 2.0, "strict_is_greater": 0.5}
    assert sections.ties(*pairs_of([*rows, pair([9.0, 0.0])]))["strict_is_greater"] == pytest.approx(2 / 3)
    assert sections.ties(*pairs_of([pair([2.0, 0.0]), rows[2]]))["strict_is_greater"] == 0.5  # equal is one half
    with pytest.raises(NotMeasured, match="tied"):
        sections.ties(*pairs_of(rows[:2]))


# ---- calibration


def test_a_model_too_sure_is_distinguishable_from_a_calibrated_one() -> None:
    """Right in three of four pairs. At d = log 3 it says 3/4 and is calibrated; at 3 log 3 it says 27/28."""
    for scale, tell in ((1, False), (3, True)):
        d = scale * math.log(3)
        rows = strict([pair([d, 0.0] if i % 4 else [0.0, d]) for i in range(200)])
        found = sections.calibration(rows, 0)
        assert (found["distinguishable_from_calibrated"], found["p_value"] < 0.05) == (tell, tell)
        p = 3**scale / (3**scale + 1)
        assert found["brier"] == pytest.approx(0.75 * (1 - p) ** 2 + 0.25 * p**2)
        assert found["error"] == pytest.approx(abs(0.75 - p)) and found["prompts"] == 200
        null = sorted(calibrated_errors(np.full(200, p), 0))  # of the probabilities that the model gives, not of rates
        assert found["error_if_calibrated_q95"] == pytest.approx(null[1900])  # of 2,000: place .95 * 1,999 = 1,899.05
        assert len(found["bins"]) == 10 and all(part["right"] == 15 for part in found["bins"])
        fitted = sections.temperature(rows)
        assert fitted["temperature"] == pytest.approx(scale)
        assert fitted["nll_scaled"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_calibration_takes_one_pair_a_prompt() -> None:
    rows = strict([judged([1.0, 0.5, 0.0], [1, 2, 3], prompt=f"q {i % 4}") for i in range(8)])
    found = sections.calibration(rows, 0)
    assert (found["prompts"], found["over_all_pairs"]["pairs"]) == (4, 24)
    assert sum(part["prompts"] for part in found["bins"]) == 4


def test_each_half_is_scaled_by_the_temperature_of_the_other() -> None:
    """Prompts in turn: one half is right in 3 of 4 pairs at d = 2 (T = 2 / log 3), the other in 9 of 10 (2 / log 9)."""
    even = [pair([2.0, 0.0] if i % 4 else [0.0, 2.0]) for i in range(20)]
    odd = [pair([2.0, 0.0] if i % 10 else [0.0, 2.0]) for i in range(20)]
    found = sections.cross_fitted(strict([row for both in zip(even, odd, strict=True) for row in both]))
    assert found["temperatures"] == pytest.approx([2 / math.log(3), 2 / math.log(9)])
    expected = -(0.75 * math.log(0.9) + 0.25 * math.log(0.1) + 0.9 * math.log(0.75) + 0.1 * math.log(0.25)) / 2
    assert found["nll_scaled"] == pytest.approx(expected)
    with pytest.raises(NotMeasured):
        sections.cross_fitted(strict([pair(RIGHT) for _ in range(4)]))
    with pytest.raises(NotMeasured, match="are ordered rightly"):
        sections.temperature(strict([pair(RIGHT) for _ in range(4)]))
    with pytest.raises(NotMeasured, match="no better than chance"):
        sections.temperature(strict([pair(RIGHT), pair(WRONG)]))


# ---- length


def test_length_correlation_is_within_prompts() -> None:
    """Correlations 1, -1 and 1/2 over three prompts; of the others one has equal lengths, one equal rewards. Across
    prompts the rewards fall with the length, which must not matter."""
    rows = [
        judged([9.0, 8.0], [1, 2], [2, 1]),
        judged([1.0, 2.0], [1, 2], [90, 80]),
        judged([1.0, 2.0, 3.0], [1, 2, 3], [20, 10, 30]),
        judged([1.0, 2.0], [1, 2], [5, 5]),
        judged([1.0, 1.0], [1, 2], [5, 6]),
    ]
    found = sections.length_correlation(rows, 0)
    assert (found["estimate"], found["prompts"], found["left_out"]) == (pytest.approx(0.5 / 3), 3, 2)
    assert -1 <= found["lower"] < found["estimate"] < found["upper"] <= 1
    with pytest.raises(NotMeasured, match="there are 1"):
        sections.length_correlation(rows[:1] + rows[3:], 0)


def test_responses_that_annotators_share_count_once() -> None:
    rows = [judged([1.0, 2.0], [1, 2], [1, 2], prompt="q", annotator=name) for name in ("anna", "ben")]
    assert sections.histogram(rows)["responses"] == 2
    assert {prompt: len(texts) for prompt, texts in sections.distinct(rows).items()} == {"q": 2}


def test_length_strata() -> None:
    rows = [pair(RIGHT, lengths=[9, 1]), pair(RIGHT, lengths=[9, 1]), pair(WRONG, lengths=[1, 9]),
            pair(RIGHT, lengths=[2, 9]), pair(RIGHT, lengths=[4, 4])]  # fmt: skip
    found = {sign: sections.length_stratum(strict(rows), 0, sign) for sign in (1, -1, 0)}
    assert {sign: (part["right"], part["prompts"]) for sign, part in found.items()} == {
        1: (2, 2),
        -1: (1, 2),
        0: (1, 1),
    }
    with pytest.raises(NotMeasured, match="of this kind"):
        sections.length_stratum(strict(rows[:2]), 0, -1)


# ---- baselines


def test_model_and_baseline_are_compared_prompt_by_prompt() -> None:
    """Both right 3, the model alone 5, length alone 1, none 1: p = 2 (1 + 6) / 2^6."""
    kinds = [(RIGHT, [2, 1])] * 3 + [(RIGHT, [1, 2])] * 5 + [(WRONG, [2, 1]), (WRONG, [1, 2])]
    rows = strict([pair(rewards, lengths=lengths) for rewards, lengths in kinds])
    found = comparing.baseline(rows, 0, comparing.by_length(True))
    assert (found["right"], found["prompts"]) == (4, 10)
    test = found["model_against_it"]
    assert (test["only_model_right"], test["only_baseline_right"], test["prompts"]) == (5, 1, 10)
    assert (test["difference"], test["p_value"]) == (pytest.approx(0.4), pytest.approx(14 / 64))
    shorter = comparing.baseline(rows, 0, comparing.by_length(False))
    assert shorter["right"] == 6


def test_a_baseline_without_an_opinion_guesses() -> None:
    """Equal lengths throughout: half of the guesses are right, so a perfect model is ahead by one half, not by one."""
    rows = strict([pair(RIGHT, lengths=[3, 3]) for _ in range(400)])
    found = comparing.baseline(rows, 0, comparing.by_length(True))
    assert found["over_all_pairs"] == 0.5 and abs(found["right"] - 200) < 40


def test_the_direction_of_length_is_learnt_in_training() -> None:
    train = [judged(RIGHT, [1, 2]).ranking, judged(RIGHT, [2, 1]).ranking, judged([1.0] * 3, [1, 2, 2]).ranking]
    assert comparing.longer_wins(train, [[9, 1], [9, 1], [5, 5, 4]]) is True  # 1 - 1 + (0 + 1)
    assert comparing.longer_wins(train, [[1, 9], [9, 1], [5, 5, 4]]) is False  # -1 - 1 + 1


def test_the_words_are_learnt_in_training_alone() -> None:
    """`please` wins in training; held out it loses, and a word of the held-out rows alone wins."""
    train = [judged(RIGHT, [1, 2], responses=[f"w{i % 3} please", f"w{i % 3} no"]).ranking for i in range(12)]
    words = comparing.fit_words(train)
    assert words is not None and set(words.place) == {"please", "no", "w0", "w1", "w2"}
    texts = ["sunny no", "please"]
    row = judged(RIGHT, [1, 2], responses=texts, words=words.score(texts))
    assert comparing.by_words(strict([row])[0]) == 0.0
    assert comparing.fit_words([judged([1.0, 1.0], [1, 1]).ranking]) is None


# ---- agreement


def shared(*raters: tuple[str | None, list[int | None]], prompt: str = "q") -> list[tuple[str, Ranking]]:
    rows = [judged([0.0] * len(ranks), ranks, prompt=prompt, annotator=name) for name, ranks in raters]
    return [(prompt, row.ranking) for row in rows]


def test_agreement_of_annotators_worked_by_hand() -> None:
    """anna 1, 2, 3 and ben 1, 1, 2, whose mid-ranks are 1.5, 1.5, 3: units (1, 1.5), (2, 1.5), (3, 3).
    Values 1, 1.5, 2, 3 with counts 1, 2, 1, 2 and mid-ranks .5, 2, 3.5, 5. Observed: 2 (2.25 + 2.25) = 9. Expected:
    2 (2*2.25 + 1*9 + 2*20.25 + 2*2.25 + 4*9 + 2*2.25) / 5 = 2 * 99 / 5 = 39.6."""
    rankings = comparing.shared_rankings(shared(("anna", [1, 2, 3]), ("ben", [1, 1, 2]), ("anna", [3, 2, 1])))
    found = comparing.rank_agreement(rankings)
    assert found["alpha"] == pytest.approx(1 - 9 / 39.6)
    assert (found["prompts"], found["annotators"], found["responses"]) == (1, 2, 3)
    pairs = comparing.pair_agreement(rankings, 0)  # ben ties the first pair; on the others they agree
    assert (pairs["right"], pairs["prompts"], pairs["pairs"], pairs["over_all_pairs"]) == (1, 1, 2, 1.0)


def test_agreement_is_by_text_and_over_what_both_ranked() -> None:
    """The same texts in another order agree; a response that one of them left out is in no pair."""
    (_, first), (_, second) = shared(("anna", [1, 2, 3]), ("ben", [1, None, 2]))
    second.responses, second.ranks = ["c", "b ", "a"], [3, None, 1]
    found = comparing.shared_rankings([("q", first), ("q", second)])
    assert comparing.pair_agreement(found, 0)["over_all_pairs"] == 1.0
    second.ranks = [1, None, 3]
    found = comparing.shared_rankings([("q", first), ("q", second)])
    assert comparing.pair_agreement(found, 0)["over_all_pairs"] == 0.0
    assert comparing.rank_agreement(found)["alpha"] < 0


@pytest.mark.parametrize(
    ("rankings", "reason"),
    [
        (shared((None, [1, 2]), (None, [1, 2])), "names its `annotator`"),
        (shared(("anna", [1, 2]), ("anna", [2, 1])), "no two annotators"),
        (shared(("anna", [1, 2])) + shared(("ben", [1, 2]), prompt="other"), "no two annotators"),
        (shared(("anna", [1, 2]), ("ben", [1, 2, 3])), "no two annotators"),
        (shared(("anna", [1, 1]), ("ben", [2, 2])), "the same rank"),
    ],
)
def test_without_two_annotators_there_is_a_reason_and_no_zero(rankings: Any, reason: str) -> None:
    with pytest.raises(NotMeasured, match=reason):
        comparing.rank_agreement(comparing.shared_rankings(rankings))


# ---- rewards, mistakes, verdict


def test_histogram() -> None:
    rows = [pair([0.0, 1.0]), pair([0.5, 1.0])]
    found = sections.histogram(rows)
    assert (found["responses"], found["mean"]) == (4, 0.625) and found["std"] == pytest.approx(math.sqrt(0.171875))
    assert len(found["edges"]) == len(found["counts"]) + 1 == 21
    assert (found["counts"][0], found["counts"][10], found["counts"][-1], sum(found["counts"])) == (1, 1, 2, 4)


def test_the_most_confident_mistakes_come_first_one_a_ranking() -> None:
    """30 mistakes of confidence sigmoid(i), of which the twenty greatest are shown."""
    rows = [pair([0.0, float(i)]) for i in range(1, 30)] + [judged([0.0, 40.0, 35.0], [1, 2, 3]), pair(RIGHT)]
    found = sections.mistakes(strict(rows))
    margins = [item["other_reward"] - item["preferred_reward"] for item in found]
    assert margins == [40.0, *(float(i) for i in range(29, 10, -1))]
    assert found[0]["row"] == rows[29].ranking.prompt.where and found[0]["other"] == "b"
    assert found[-1]["confidence"] == pytest.approx(1 / (1 + math.exp(-11)))
    assert sections.mistakes(strict([pair(RIGHT)])) == []


def test_texts_are_cut_for_display_alone() -> None:
    row = pair(WRONG, responses=["x" * 301, "y" * 300])
    (found,) = sections.mistakes(strict([row]))
    assert found["preferred"] == "x" * 297 + "..." and found["other"] == "y" * 300
    assert row.ranking.responses[0] == "x" * 301


def verdict_of(model: list[list[float]], lengths: list[list[int]]) -> Any:
    rows = [pair(r, lengths=n, words=[0.0, 0.0]) for r, n in zip(model, lengths, strict=True)]
    train = [pair(RIGHT, responses=["c c", "d"]).ranking]
    return write.build(rows, train, [[2, 1]], 0)["verdict"]


def test_the_verdict_says_what_cannot_be_told_apart() -> None:
    same = verdict_of([RIGHT] * 30, [[2, 1]] * 30)
    assert (same["against_chance"], same["against_length"]) == ("better", "not distinguishable")
    assert "better than chance" in same["sentence"] and "Not distinguishable from length alone" in same["sentence"]
    better = verdict_of([RIGHT] * 30, [[2, 1]] * 15 + [[1, 2]] * 15)
    assert better["against_length"] == "better" and "Better than length alone" in better["sentence"]
    worse = verdict_of([WRONG] * 30, [[2, 1]] * 30)
    assert (worse["against_chance"], worse["against_length"]) == ("worse", "worse")
    even = verdict_of([RIGHT, WRONG] * 15, [[2, 1], [1, 2]] * 15)
    assert (even["against_chance"], even["against_length"]) == ("not distinguishable", "not distinguishable")
    # five to none is p = .0625: the exact test decides, not the interval
    assert verdict_of([RIGHT] * 30, [[1, 2]] * 5 + [[2, 1]] * 25)["against_length"] == "not distinguishable"
    assert verdict_of([RIGHT] * 30, [[1, 2]] * 6 + [[2, 1]] * 24)["against_length"] == "better"


# ---- the file


def test_the_stage_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_base(tmp_path / "base")
    result = rm.run(make_config(), make_context(tmp_path / "a", base))
    report = read(tmp_path / "a" / "report.json")
    check_schema(report)
    assert report["accuracy"]["overall"]["estimate"] == result.metrics["rm/one_pair_accuracy"]
    assert report["accuracy"]["overall"]["over_all_pairs"] == pytest.approx(result.metrics["rm/accuracy"])
    assert report["rows"]["training_rankings"] == 24 and report["rows"]["prompts"] == 8
    assert "names its `annotator`" in report["missing"]["agreement.ranks"]
    said = " ".join(capsys.readouterr().out.split())
    assert "report.json" in said and report["verdict"]["sentence"] in said and "bag of words" in said

    with pytest.raises(Preempted):
        rm.run(make_config(), make_context(tmp_path / "b", base, stop_at=4))
    assert not (tmp_path / "b" / "report.json").exists()
    rm.run(make_config(), make_context(tmp_path / "b", base))
    assert (tmp_path / "b" / "report.json").read_bytes() == (tmp_path / "a" / "report.json").read_bytes()


def test_baselines_never_see_the_held_out_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training "w1" and the longer answer win, held out "w2" and the shorter one: both baselines are always wrong.
    The model, which is replaced by a constant, is so too."""
    monkeypatch.setattr(write, "score_ids", lambda model, ids, tokens: [0.5] * len(ids))
    train = [pair(RIGHT, responses=[f"w1 w{4 + i % 2} w7", f"w2 w{6 + i % 2}"]).ranking for i in range(8)]
    held = [pair(RIGHT, responses=["w2", "w1 w1"]).ranking for _ in range(8)]
    context: Any = SimpleNamespace(
        stage="rm", folder=tmp_path, data=SimpleNamespace(rankings=SimpleNamespace(heldout=held))
    )
    report = write.write_report(context, None, Renderer(make_tokenizer()), train, 0)
    assert report == read(tmp_path / "report.json")
    assert [report["baselines"][key]["right"] for key in ("length", "bag_of_words")] == [0, 0]
    assert report["baselines"]["length"]["rule"] == "longer is better" and report["length"]["same"] is None
    assert (report["accuracy"]["overall"]["right"], report["calibration"]["brier"]) == (0, 0.0)
    assert "differ both in length and in reward" in report["missing"]["length.correlation"]


def test_a_reward_that_is_no_number_names_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "score_ids", lambda model, ids, tokens: [0.0, float("nan")])
    row = pair(RIGHT, responses=["w1", "w2"]).ranking
    with pytest.raises(TrainingError, match=rf"{row.prompt.where}: the reward model scores a response with .*nan"):
        write.judge(None, Renderer(make_tokenizer()), [row], None)


def test_a_report_without_any_strict_pair_is_all_reasons() -> None:
    report = write.build([judged([1.0, 2.0], [1, 1])], [judged([1.0, 2.0], [1, 1]).ranking], [[1, 1]], 0)
    check_schema(report)
    assert all(part is None for part in report["accuracy"].values()) and report["verdict"] is None
    assert set(report["missing"]) >= {"calibration", "baselines.length", "baselines.bag_of_words", "verdict", "ties"}


def test_draws_depend_on_the_seed_alone() -> None:
    rows = strict([judged([3.0, 1.0, 2.0, 0.0], [1, 2, 3, 4]) for _ in range(20)])
    places = [[(p.better, p.worse) for p in draw(rows, seed)] for seed in (0, 0, 1)]
    assert places[0] == places[1] != places[2]
