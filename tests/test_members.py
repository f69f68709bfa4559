"""Several reward models of one run: their folds, their seeds, their resume, and what PPO and the gates make of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import digests, flip_a_byte, lines
from supervised_toys import CPU, make_config, make_context, rankings, tiny_base

from rlhf.adapters import Scorer, SharedBase
from rlhf.artifacts import HOLDOUT, MEMBERS, holdout_of, read_json, write_json
from rlhf.config import GateConfig, LoraConfig, ModelConfig, PpoConfig, RmConfig, TrackerConfig, TrackerMode, check_all
from rlhf.context import Context
from rlhf.errors import ConfigError, DataError, LineageError, Preempted
from rlhf.gates.judge import GateRequest
from rlhf.gates.measure import measure
from rlhf.manifest import artifact_digest, check_intact
from rlhf.members import plan_members
from rlhf.models import load_policy, load_reward_model
from rlhf.render import Renderer, load_tokenizer
from rlhf.rewards import ENSEMBLE, TRAINED, build_reward, check_ensemble, fill_members, judging_ensemble
from rlhf.scoring import score_ids
from rlhf.types import Ranking
from stages import rm

SEVERAL = ("members/1", "members/2", HOLDOUT)


def reads(**options: Any) -> list[tuple[int, ...]]:
    config = RmConfig(**options)
    check_all(config, "rm")
    return [member.reads for member in plan_members(config, 0)]


def test_each_member_leaves_out_a_fold_and_the_holdout_alone_reads_the_last() -> None:
    assert reads() == [(0,)]
    assert reads(members=2) == [(1, 2, 3), (0, 2, 3)]
    assert reads(holdout=True) == [(0, 1, 2), (3,)]
    assert reads(members=3, holdout=True) == [(1, 2), (0, 2), (0, 1), (3,)]
    assert reads(members=2, holdout=True, folds=10) == [(1, 2, 3, 4, 5, 6, 7, 8), (0, 2, 3, 4, 5, 6, 7, 8), (9,)]
    assert reads(members=2, folds=2) == [(1,), (0,)]
    assert reads(members=3, folds=1) == [(0,)] * 3
    assert len(reads(members=6)) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, r"rm\.members: must be at least 1"),
        ({"members": 3, "artifact": "x"}, r"rm\.artifact: is one model"),
        ({"holdout": True, "artifact": "x"}, r"rm\.artifact: is one model"),
        ({"folds": 5}, r"rm\.folds: is for"),
        ({"members": 3, "holdout": True, "folds": 3}, r"rm\.folds: must be at least 4"),
        ({"holdout": True, "folds": 1}, r"rm\.folds: must be at least 2"),
    ],
)
def test_what_cannot_be_is_a_config_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_all(RmConfig(**options), "rm")


def said(rows: list[Ranking]) -> set[str]:
    return {row.prompt.messages[0]["content"] for row in rows}


def test_the_holdout_shares_no_prompt_with_any_member_and_folds_are_of_like_size() -> None:
    """Twice 41 rankings of 41 prompts: the second ranking of a prompt must go where the first went."""
    rows = [*rankings(41), *reversed(rankings(41))]
    *members, holdout = [member.rows(rows) for member in plan_members(RmConfig(members=3, holdout=True), 0)]
    assert not said(holdout) & set.union(*map(said, members))
    assert said(holdout) | set.union(*map(said, members)) == said(rows)
    for prompt in said(rows) - said(holdout):
        assert sum(prompt in said(member) for member in members) == 2
    assert sorted(len(part) for part in (*members, holdout)) == [20, 40, 42, 42]  # 2 * (10, 20, 21, 21)
    assert all(len(part) == 2 * len(said(part)) for part in (*members, holdout))
    with pytest.raises(DataError, match="3 training prompts cannot be cut into 4 folds"):
        members_of_three = plan_members(RmConfig(members=3, holdout=True), 0)
        members_of_three[0].rows(rankings(3))


def test_seeds_differ_and_the_first_has_the_runs_own() -> None:
    seeds = [[member.seed for member in plan_members(RmConfig(members=3, holdout=True), seed)] for seed in (5, 6)]
    assert (seeds[0][0], seeds[1][0]) == (5, 6)
    assert len({*seeds[0], *seeds[1]}) == 8
    assert all(0 <= seed < 2**31 for seed in (*seeds[0], *seeds[1]))


# ---- training


def a_config(lora: bool = False) -> Any:
    cfg = make_config(epochs=2)
    cfg.rm.members, cfg.rm.holdout, cfg.rm.lora = 3, True, LoraConfig(enabled=lora, r=2, alpha=4)
    cfg.run, cfg.tracker = SimpleNamespace(name="toy"), TrackerConfig(mode=TrackerMode.disabled)
    return cfg


def a_context(folder: Path, base: Path, stop_at: int | None = None) -> Context:
    return Context(**vars(make_context(folder, base, train=32, stop_at=stop_at)) | {"stage": "rm"})


def trained(folder: Path, base: Path, **options: Any) -> Any:
    """A whole stage, with the manifest that the pipeline would write."""
    context = a_context(folder, base)
    result = rm.run(a_config(**options), context)
    manifest = {"stage": "rm", "extra": result.extra, "digest": artifact_digest(folder / "model", result.extra)}
    write_json(folder / "manifest.json", manifest)
    return SimpleNamespace(folder=folder, context=context, result=result, extra=result.extra, manifest=manifest)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def several(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("several") / "rm", base)


def test_each_is_trained_on_its_own_folds_and_recorded(several: Any) -> None:
    folders = [several.folder, *(several.folder / name for name in SEVERAL)]
    weights = [digests(folder / "model")["model.safetensors"] for folder in folders]
    assert len(set(weights)) == 4
    assert list(several.extra[MEMBERS]) == list(SEVERAL)
    assert several.extra["reads"] == "folds 2, 3 of 4"
    assert [several.extra[MEMBERS][name]["reads"] for name in SEVERAL] == [
        "folds 1, 3 of 4", "folds 1, 2 of 4", "folds 4 of 4",
    ]  # fmt: skip
    for name in SEVERAL:
        kept = several.extra[MEMBERS][name]
        assert kept == read_json(several.folder / name / "manifest.json")
        assert kept["metrics"]["rm/prompts"] == 8 and kept["extra"]["reward_std"] > 0
        assert lines(several.folder / name / "metrics.jsonl")
        assert not (several.folder / name / "checkpoints").exists()


def test_stopped_in_the_second_it_goes_on_there_and_ends_with_the_same_bits(
    several: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 rows a member, 2 updates an epoch, 2 epochs: the sixth update is the second one of the second member."""
    begun: list[str] = []
    given: dict[str, set[str]] = {}
    train_one = rm.train_one

    def spy(cfg: Any, context: Context, rankings: Any, seed: int) -> Any:
        begun.append(context.stage)
        given[context.stage] = said(rankings)
        return train_one(cfg, context, rankings, seed)

    monkeypatch.setattr(rm, "train_one", spy)
    with pytest.raises(Preempted):
        rm.run(a_config(), a_context(tmp_path, base, stop_at=6))
    assert begun == ["rm/members/1", "rm/members/2"]
    result = rm.run(a_config(), a_context(tmp_path, base))
    assert begun[2:] == ["rm/members/2", "rm/holdout", "rm"]
    sizes = {name: len(prompts) for name, prompts in given.items()}
    assert sizes == {"rm/members/1": 16, "rm/members/2": 16, "rm/holdout": 8, "rm": 16}
    assert not given["rm/holdout"] & (given["rm"] | given["rm/members/1"] | given["rm/members/2"])
    for name in ("", *SEVERAL):
        assert digests(tmp_path / name / "model") == digests(several.folder / name / "model")
    for name in SEVERAL:
        assert lines(tmp_path / name / "metrics.jsonl") == lines(several.folder / name / "metrics.jsonl")
    assert without_times(result.extra) == without_times(several.extra)
    assert result.metrics == several.result.metrics


def without_times(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: without_times(item) for key, item in value.items() if key != "finished"}


def test_a_finished_member_that_was_altered_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        rm.run(a_config(), a_context(tmp_path, base, stop_at=6))
    flip_a_byte(tmp_path / "members" / "1" / "model" / "model.safetensors")
    with pytest.raises(LineageError, match=r"members/1/model: .*altered"):
        rm.run(a_config(), a_context(tmp_path, base))


@pytest.mark.parametrize("name", ["", *SEVERAL])
def test_a_byte_flipped_in_any_of_them_is_a_breach_that_names_it(several: Any, name: str) -> None:
    check_intact(several.folder, several.manifest, "mend")
    file = several.folder / name / "model" / "model.safetensors"
    flip_a_byte(file)
    with pytest.raises(LineageError, match=f"{file.parent}: .*altered"):
        check_intact(several.folder, several.manifest, "mend")
    flip_a_byte(file)
    check_intact(several.folder, several.manifest, "mend")


def test_the_digest_covers_every_member(several: Any) -> None:
    beside, found = several.extra[MEMBERS], set()
    for name in SEVERAL:
        changed = {**beside, name: {**beside[name], "digest": "sha256:0"}}
        found.add(artifact_digest(several.folder / "model", {MEMBERS: changed}))
    assert len({*found, several.manifest["digest"]}) == 4


# ---- what PPO is paid by, and what the gates judge by


def normalised(folder: Path, extra: Mapping[str, Any], asked: list[tuple[Any, str]]) -> list[float]:
    """Scores of one reward model on texts, in its own standard deviations, by its forward pass alone."""
    renderer = Renderer(load_tokenizer(folder / "model", ModelConfig()))
    ids = [renderer.full_ids(messages, text)[0] for messages, text in asked]
    scores = score_ids(load_reward_model(folder / "model", ModelConfig(), CPU), ids, 64)
    return [(score - extra["reward_mean"]) / extra["reward_std"] for score in scores]


def asked_of(run: Any) -> list[tuple[Any, str]]:
    return [(row.prompt.messages, text) for row in run.context.data.rankings.heldout for text in row.responses]


def by_hand(run: Any, k: float) -> list[float]:
    """mean - k * std of the three members."""
    asked = asked_of(run)
    columns = [normalised(run.folder, run.extra, asked)]
    for name in ("members/1", "members/2"):
        columns.append(normalised(run.folder / name, run.extra[MEMBERS][name]["extra"], asked))
    return [statistics.fmean(row) - k * statistics.pstdev(row) for row in zip(*columns, strict=True)]


def ask(built: Any, asked: list[tuple[Any, str]]) -> list[float]:
    scores: list[float] = built.reward.score(
        [""] * len(asked), [t for _, t in asked], [{"messages": m} for m, _ in asked]
    )
    return scores


@pytest.mark.parametrize(
    ("node", "k"),
    [({"_target_": TRAINED}, 1.0), ({"_target_": ENSEMBLE, "members": {}, "mode": "mean", "k": 0.3}, 0.3)],
)
def test_ppo_is_paid_mean_less_k_std_of_the_members(several: Any, node: dict[str, Any], k: float) -> None:
    built = build_reward(node, several.folder / "model", several.extra)
    assert ask(built, asked_of(several)) == pytest.approx(by_hand(several, k), abs=1e-5)
    assert set(built.reward.details) == {"model", "member_1", "member_2", "disagreement"}
    assert (built.mean, built.std) == (0.0, 1.0)


def test_the_holdout_is_found_and_is_in_no_reward(several: Any) -> None:
    model = several.folder / "model"
    assert holdout_of(model, several.extra) == several.folder / "holdout" / "model"
    assert "holdout" not in str(fill_members({"_target_": TRAINED}, model, several.extra))
    assert holdout_of(model, {}) is None and holdout_of(None, several.extra) is None


def test_the_runs_members_stand_where_its_reward_model_would(several: Any) -> None:
    model = several.folder / "model"
    members = {
        "model": model,
        "member_1": several.folder / "members/1/model",
        "member_2": several.folder / "members/2/model",
    }
    nodes = {name: {"_target_": TRAINED, "micro_tokens": 9, "artifact": str(path)} for name, path in members.items()}
    part = {"_target_": TRAINED, "micro_tokens": 9, "weight": 2.0}
    weighted = {"_target_": "reward_models.weighted.WeightedSum", "parts": {"a": part}}
    filled = {"_target_": ENSEMBLE, "members": nodes, "weight": 2.0}
    assert fill_members(weighted, model, several.extra) == {**weighted, "parts": {"a": filled}}
    for node in ({"_target_": TRAINED, "artifact": "x"}, {"_target_": ENSEMBLE, "members": {"a": {}}}):
        assert fill_members(node, model, several.extra) == node
    for extra in ({}, {MEMBERS: {HOLDOUT: {}}}):  # a single reward model, with or without a holdout
        assert fill_members({"_target_": TRAINED}, model, extra) == {"_target_": TRAINED}


def test_an_ensemble_of_a_run_with_one_reward_model_is_refused_before_it_starts() -> None:
    node = {"_target_": ENSEMBLE, "members": {}}
    with pytest.raises(ConfigError, match=r"reward\.members: names none"):
        check_ensemble(node, 1)
    check_ensemble(node, 2)
    check_ensemble({"_target_": TRAINED}, 1)


def test_the_gate_judges_the_rankings_by_what_ppo_is_paid_by(several: Any) -> None:
    model = several.folder / "model"
    node = {"_target_": ENSEMBLE, "members": {}, "mode": "mean", "k": 0.3}
    held = several.context.data.rankings.heldout

    def rewards(reward: Any) -> list[float]:
        request = GateRequest(
            stage="rm", model=model, digest="", parents={}, rankings=held, policy=GateConfig(), ppo=PpoConfig(),
            model_config=ModelConfig(), seed=0, reward=judging_ensemble(reward, model, several.extra),
        )  # fmt: skip
        return [value for ranked in measure(request, {"rankings"}, None).rankings for value in ranked.rewards]

    assert rewards(node) == pytest.approx(by_hand(several, 0.3), abs=1e-5)
    assert rewards({"_target_": "reward_models.rules.RulesReward"}) == pytest.approx(by_hand(several, 1.0), abs=1e-5)
    assert judging_ensemble(node, model, {}) is None


def test_lora_members_and_the_holdout_are_adapters_on_one_base(base: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "rm", base, lora=True)
    model = run.folder / "model"
    shared = SharedBase(load_policy(base, ModelConfig(), CPU), base)
    built = build_reward({"_target_": TRAINED}, model, run.extra, shared_base=shared)
    node = {"_target_": TRAINED, "artifact": str(holdout_of(model, run.extra))}
    holdout = build_reward(node, key="ppo.holdout", shared_base=shared)
    members = [member.reward.model for member in built.reward.members.values()]
    assert all(isinstance(scorer, Scorer) for scorer in (*members, holdout.reward.model))
    assert all(scorer.body.inner is shared.model.base_model for scorer in (*members, holdout.reward.model))
    assert len(shared.settings) == 4
    assert ask(built, asked_of(run)) == pytest.approx(by_hand(run, 1.0), abs=1e-4)
