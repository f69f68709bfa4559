"""Every YAML composes, every rule names its key, and the configuration survives the way to the worker."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlhf.compose import CONF_DIR, friendly, register, schema_keys, stray_keys, to_config, unknown_key
from rlhf.config import Config, LaunchConfig, LoraConfig, OptimConfig, PpoConfig, RmConfig, RmLoss, Ties, check_all
from rlhf.errors import ConfigError
from rlhf.launch import from_plain, to_plain

OPTIONS = sorted(
    f"{path.parent.relative_to(CONF_DIR).as_posix()}={path.stem}"
    for path in Path(CONF_DIR).rglob("*.yaml")
    if path.parent != Path(CONF_DIR) and path.stem != "shared"  # of a stage, not of all
)


def composed(*overrides: str) -> Config:
    register()
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return to_config(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes(option: str) -> None:
    needs = [] if option == "experiment=quickstart" else ["experiment=own", "model.path=some/model"]
    if option.startswith("data=quickstart"):
        needs = ["experiment=own", "ppo.max_new_tokens=48"]
    if option == "experiment=hh":
        needs = ["model.path=some/model", "data.root=some/folder"]
    config = composed(option, *needs)
    assert dataclasses.is_dataclass(config)


def test_lora_reaches_every_stage_or_one_alone() -> None:
    everywhere = composed("lora=r16", "lora@ppo.lora=none")
    assert (everywhere.sft.lora.enabled, everywhere.rm.lora.enabled, everywhere.ppo.lora.enabled) == (True, True, False)
    one = composed("lora@rm.lora=r16")
    assert (one.sft.lora.enabled, one.rm.lora.enabled) == (False, True)


def test_a_key_of_lora_holds_for_every_stage_that_has_none_of_its_own() -> None:
    config = composed("lora=r16", "lora.r=64", "lora@rm.lora=r16", "ppo.lora.alpha=8")
    assert [(s.lora.enabled, s.lora.r, s.lora.alpha) for s in (config.sft, config.rm, config.ppo)] == [
        (True, 64, 32), (True, 16, 32), (True, 64, 8),
    ]  # fmt: skip


def test_every_key_of_lora_is_shared() -> None:
    shared = OmegaConf.load(Path(CONF_DIR) / "lora" / "shared.yaml")
    expected = {field.name: f"${{lora.{field.name}}}" for field in dataclasses.fields(LoraConfig)}
    assert OmegaConf.to_container(shared, resolve=False) == expected


def test_the_configuration_survives_the_way_to_the_worker() -> None:
    config = composed("seed=3", "gate.mode=observe", "ppo.kl.coef=0.2")
    assert from_plain(to_plain(config)) == config


def test_a_key_that_the_schema_lacks_is_named() -> None:
    stray = OmegaConf.create({"seed": 1, "ppo": {"updatez": 1}})
    assert list(stray_keys(stray)) == ["ppo.updatez"]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("ppo.upates", "ppo.updates"), ("sft.optim.learning_rat", "sft.optim.learning_rate"), ("kl.coef", "ppo.kl.coef")],
)
def test_the_nearest_key_is_offered(typo: str, meant: str) -> None:
    assert f"did you mean {meant}?" in unknown_key(typo)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_new_tokens", "repetition_penalty"])
@pytest.mark.parametrize("override", ["ppo.{}=5", "+ppo.{}=5", "+sample.{}=5"])
def test_sampling_filters_are_refused_and_told_why(name: str, override: str) -> None:
    try:
        composed("experiment=own", "model.path=some/model", override.format(name))
    except Exception as error:  # Hydra's own for a key that it does not know
        told = str(friendly(error))
        assert name in told and "log-probabilities do not model a filter" in told
    else:
        pytest.fail("accepted")


def test_the_schema_lists_nested_keys_once() -> None:
    keys = list(schema_keys())
    assert {"ppo.kl.coef", "gate.scorer.kind", "data.rankings.path"} <= set(keys)
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("node", "key"),
    [
        (OptimConfig(learning_rate=-1.0), "x.learning_rate"),
        (OptimConfig(batch=16, micro_batch=0), "x.micro_batch"),
        (OptimConfig(warmup=1.0), "x.warmup"),
        (PpoConfig(updates=0), "x.updates"),
        (LaunchConfig(threads=0), "x.threads"),
        (PpoConfig(temperature=0.0), "x.temperature"),
        (RmConfig(label_smoothing=0.5), "x.label_smoothing"),
        (RmConfig(label_smoothing=-0.1), "x.label_smoothing"),
        (RmConfig(margin=-1.0), "x.margin"),
        (RmConfig(loss=RmLoss.plackett_luce, ties=Ties.drop, margin=1.0), "x.margin: is of pairs"),
        (RmConfig(loss=RmLoss.plackett_luce), "x.ties: must be drop with x.loss=plackett_luce"),
        (RmConfig(loss=RmLoss.plackett_luce, ties=Ties.half), "x.ties"),
        (RmConfig(loss=RmLoss.plackett_luce, ties=Ties.drop, label_smoothing=0.1), "x.label_smoothing: is of pairs"),
    ],
)
def test_a_value_out_of_range_names_its_key(node: OptimConfig | PpoConfig | RmConfig, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}"):
        check_all(node, "x")


def test_rankings_with_ties_can_be_chosen_from() -> None:
    config = composed("rm.loss=plackett_luce", "rm.ties=drop")
    assert (config.rm.loss, config.rm.ties) == (RmLoss.plackett_luce, Ties.drop)
