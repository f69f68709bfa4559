"""Building the configured reward and checking what it returns, so that a fault in it is named and not trained on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.artifacts import members_of, read_json
from rlhf.errors import ConfigError, TrainingError
from rlhf.plugins import check_arguments, find
from rlhf.types import Reward

Score = float | list[float]
SCALE = frozenset({"mean", "std"})  # of the scores: what PPO normalises with
TRAINED = "reward_models.trained.TrainedReward"
ENSEMBLE = "reward_models.ensemble.Ensemble"


@dataclass(kw_only=True, slots=True)
class BuiltReward:
    """A reward and the mean and standard deviation of its scores; `None` where none are known."""

    reward: Reward
    mean: float | None
    std: float | None


def check_reward(node: Any, model: Path | None = None, key: str = "reward") -> dict[str, Any]:
    """The arguments that the `reward` node's class is made with, checked against its signature; nothing is loaded.

    `model`, the run's reward model, goes to a class that takes `artifact` where the node leaves that open. `mean` and
    `std` may stand in any node: they are arguments only of a class that takes them. ConfigError names the key.
    """
    target = find(node, key)
    _given_scale(node, key)
    own = {"_target_", *(SCALE - inspect.signature(target).parameters.keys())}
    arguments = {str(name): value for name, value in node.items() if name not in own}
    if model is not None and "artifact" in inspect.signature(target).parameters:
        arguments.setdefault("artifact", str(model))
    check_arguments(target, arguments, key)
    if inspect.isclass(target) and not callable(getattr(target, "score", None)):
        raise ConfigError(f"{key}._target_: {target.__name__} has no method score(prompts, responses, rows)")
    if callable(getattr(target, "check_node", None)):
        target.check_node(arguments, key)
    return arguments


def _given_scale(node: Any, key: str) -> tuple[float, float] | None:
    """`mean` and `std` of a reward node; None if it gives neither."""
    given = {name: node[name] for name in SCALE if node.get(name) is not None}
    if not given:
        return None
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{key}.{name}: must be a number, not {value!r}")
    if given.keys() != SCALE:
        raise ConfigError(f"{key}: gives only one of mean and std: PPO normalises with both or with neither")
    return float(given["mean"]), float(given["std"])


def takes_reward_model(node: Any) -> bool:
    """True if the `reward` node's class takes an `artifact`, so that a reward model of the run has a use."""
    return "artifact" in inspect.signature(find(node, "reward")).parameters


def build_reward(
    node: Any, model: Path | None = None, extra: Mapping[str, Any] | None = None, key: str = "reward",
    shared_base: Any = None, trust_remote_code: bool = False,
) -> BuiltReward:  # fmt: skip
    """Build the configured reward. `model` is the run's reward model and `extra` what its manifest stores about it.

    Its mean and std are those of the node, else those of the object, else those stored with the model that it reads.

    shared_base: what PPO's roles share with LoRA, for a class that takes an argument of this name.
    trust_remote_code: of the run's models, likewise; a node that gives it itself decides.
    """
    node = fill_members(node, model, extra or {})
    arguments = check_reward(node, model, key)
    target = find(node, key)
    offered = {"shared_base": shared_base, "trust_remote_code": trust_remote_code or None}
    for name in offered.keys() & inspect.signature(target).parameters.keys():
        if offered[name] is not None:
            arguments.setdefault(name, offered[name])
    reward = target(**arguments)
    if not callable(getattr(reward, "score", None)):
        raise ConfigError(
            f"{key}._target_: {node['_target_']} gave a {type(reward).__name__} without score(prompts, responses, "
            "rows); a plain function goes through reward._target_=reward_models.function.FunctionReward"
        )
    stored = _stored(arguments.get("artifact"), model, extra or {})
    sources = (
        _given_scale(node, key), (getattr(reward, "mean", None), getattr(reward, "std", None)),
        (stored.get("reward_mean"), stored.get("reward_std")),
    )  # fmt: skip
    mean, std = next((pair for pair in sources if pair is not None and None not in pair), (None, None))
    if mean is None or std is None:
        return BuiltReward(reward=reward, mean=None, std=None)
    if not std > 0:
        raise ConfigError(
            f"{key}: the std of its scores (given, or stored as reward_std) is {std}, and must be positive: give "
            "another, train the reward model again or set ppo.normalize_reward=false"
        )
    return BuiltReward(reward=reward, mean=float(mean), std=float(std))


def names_no_members(node: Any) -> bool:
    """True for an ensemble that is to be the run's own members."""
    return isinstance(node, Mapping) and node.get("_target_") == ENSEMBLE and not node.get("members")


def fill_members(node: Any, model: Path | None, extra: Mapping[str, Any]) -> Any:
    """A `reward` node with the run's members put in, at any depth: into an ensemble that names none, and where the
    run's reward model stands, which is the ensemble of them. Unchanged where the run has a single reward model."""
    others = members_of(extra)
    if model is None or not others:
        return node
    if isinstance(node, list):
        return [fill_members(item, model, extra) for item in node]
    if not isinstance(node, dict):
        return node
    members = {"model": model, **{name.replace("s/", "_"): model.parent / name / "model" for name in others}}
    if names_no_members(node):
        given = {name: {"_target_": TRAINED, "artifact": str(path)} for name, path in members.items()}
        return {**node, "members": given}
    if node.get("_target_") == TRAINED and not node.get("artifact"):
        options = {key: value for key, value in node.items() if key != "weight"}
        given = {name: {**options, "artifact": str(path)} for name, path in members.items()}
        # What a weighted sum says of a part stays outside.
        return {key: node[key] for key in node if key == "weight"} | {"_target_": ENSEMBLE, "members": given}
    return {key: fill_members(item, model, extra) for key, item in node.items()}


def judging_ensemble(node: Any, model: Path, extra: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a gate takes for the reward where the run has several: the ensemble of its members as `reward` has it, or
    with the defaults where `reward` is something else. None where the run has a single reward model."""
    if not members_of(extra):
        return None
    filled: dict[str, Any] = fill_members(node if names_no_members(node) else {"_target_": ENSEMBLE}, model, extra)
    return filled


def check_ensemble(node: Any, count: int) -> None:
    """ConfigError if `reward` is an ensemble without members and the run has no others than one reward model."""
    if names_no_members(node) and count < 2:
        raise ConfigError(
            "reward.members: names none, and the run has a single reward model: rm.members=3 trains three, "
            "+reward.members.<name>.artifact=... with its _target_ takes others"
        )


def _stored(artifact: Any, model: Path | None, extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known about a reward model's scores: from the run for its own, else from the manifest beside it."""
    if artifact is None:
        return {}
    if model is not None and artifact == str(model) and extra:
        return extra
    manifest = Path(str(artifact)).parent / "manifest.json"
    found: dict[str, Any] = read_json(manifest).get("extra", {}) if manifest.is_file() else {}
    return found


def part_scores(
    name: str, reward: Reward, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[float]:
    """One number a response from a reward that is part of another; ValueError names the part otherwise."""
    scores = reward.score(prompts, responses, rows)
    if len(scores) != len(responses):
        raise ValueError(f"part {name!r} gave {len(scores)} scores for {len(responses)} responses")
    said = []
    for score in scores:
        if isinstance(score, Sequence) or not hasattr(score, "__float__"):
            raise ValueError(f"part {name!r} must give one number a response, not {score!r}")
        said.append(float(score))
        if not math.isfinite(said[-1]):
            raise ValueError(f"the score of part {name!r} is {score}")
    return said


def holdout_node(spec: Any) -> Any:
    """ppo.holdout as a node like `reward`: the folder of a reward model stands for one that is trained."""
    return {"_target_": TRAINED, "artifact": spec} if isinstance(spec, str) else spec


def checked_scores(
    reward: Reward,
    prompts: Sequence[str],
    responses: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    lengths: Sequence[int],
) -> list[Score]:
    """The scores of `reward`, or a TrainingError that names the row (by `names`) and what is wrong with its score.

    lengths: tokens of each response, which a list of per-token scores must match.
    """
    who = type(reward).__name__
    try:
        scores = list(reward.score(prompts, responses, rows))
    except Exception as error:  # a plug-in may raise anything; it is re-raised with the row that causes it
        row = _row_that_fails(reward, prompts, responses, rows)
        where = f"on row {names[row]}" if row is not None else f"on {len(prompts)} rows together, on none alone"
        raise TrainingError(f"reward {who} raised {type(error).__name__} {where}: {error}") from error
    if len(scores) != len(responses):
        first = names[min(len(scores), len(names) - 1)]
        raise TrainingError(
            f"reward {who} returned {len(scores)} scores for {len(responses)} responses; "
            f"{'row ' + first + ' is the first without one' if len(scores) < len(responses) else 'one each is needed'}"
        )
    return [_number_or_list(score, f"reward {who}, row {name}", n)
            for score, name, n in zip(scores, names, lengths, strict=True)]  # fmt: skip


def _row_that_fails(
    reward: Reward, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> int | None:
    for i in range(len(prompts)):
        try:
            reward.score(prompts[i : i + 1], responses[i : i + 1], rows[i : i + 1])
        except Exception:  # the same fault, now of one row
            return i
    return None


def _number_or_list(score: Any, where: str, length: int) -> Score:
    """`score` as a float or a list of `length` floats, all finite."""
    if isinstance(score, str) or score is None:
        raise TrainingError(f"{where}: the score is {score!r}, not a number")
    try:
        values = [float(value) for value in score] if hasattr(score, "__len__") else float(score)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{where}: the score is not a number or a list of numbers: {error}") from error
    if isinstance(values, list):
        if len(values) != length:
            raise TrainingError(f"{where}: {len(values)} per-token scores for a response of {length} tokens")
        bad = next((value for value in values if not math.isfinite(value)), None)
    else:
        bad = None if math.isfinite(values) else values
    if bad is not None:
        raise TrainingError(f"{where}: the score is {bad}")
    return values
