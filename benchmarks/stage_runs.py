"""One stage through the pipeline, on one rank or several, watched from inside: what two benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

WORDS = ("the", "robot", "arm", "rattles", "when", "it", "lifts", "a", "box", "and", "then", "stops", "near", "door")
SMALL = (
    "experiment=own", "tracker=none", "launch.device=cpu", "launch.threads=1", "gate.mode=observe", "gate.prompts=4",
    "gate.max_new_tokens=8", "data.on_overlong=truncate_prompt", "sft.optim.evals=1", "rm.optim.evals=1",
    "ppo.eval_prompts=4",
)  # fmt: skip


def arguments_of(doc: str | None, names: Collection[str]) -> argparse.ArgumentParser:
    """What both benchmarks are told; `--rank` is how they start themselves as one rank."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a causal language model and a chat template")
    parser.add_argument("--only", nargs="*", choices=list(names), default=list(names))
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    return parser


def write_data(folder: Path, rows: int, prompts: tuple[int, int], responses: tuple[int, int]) -> list[str]:
    """Demonstrations and rankings of three responses; prompts and responses have so many words (least, most). The
    overrides that name the files."""
    rng = random.Random(0)

    def text(lengths: tuple[int, int]) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(*lengths)))

    demos, rankings = [], []
    for row in range(rows):
        prompt = f"{row} {text(prompts)}"
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text(responses)}]
        demos.append({"messages": turns})
        rankings.append(
            {"prompt": prompt, "responses": [f"{k} {text(responses)}" for k in range(3)], "ranks": [1, 2, 3]}
        )
    for name, lines in (("demos", demos), ("rankings", rankings)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [f"data.demonstrations.path={folder}/demos.jsonl", f"data.rankings.path={folder}/rankings.jsonl"]


def write_reward_model(model: Path, folder: Path) -> None:
    """The model with a head of random weights, to pay PPO."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def configuration(stage: str, model: Path, folder: Path, name: str, overrides: Sequence[str]) -> Any:
    """A run of one stage in folder/name. The stages before it are `model` as it is, and the reward model in
    folder/rm."""
    from hydra import compose, initialize_config_dir

    from rlhf.compose import CONF_DIR, register, to_config

    given = [f"sft.artifact={model}"] if stage != "sft" else []
    given += [f"rm.artifact={folder}/rm"] if stage == "ppo" else []
    register()
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        run = [f"stage={stage}", f"model.path={model}", f"run.root={folder}", f"run.name={name}"]
        cfg = to_config(compose("config", overrides=[*SMALL, *run, *given, *overrides]))
    cfg.run.dir = str(folder / name)
    return cfg


def run_ranks(cfg: Any, script: str, environment: dict[str, str]) -> list[Any]:
    """What `python script --rank SPEC` of each rank has left (`leave`), one thread each. RuntimeError with a log's end
    if one left nothing."""
    from rlhf.launch import to_plain, worker_environment
    from rlhf.places import Place
    from rlhf.supervise import supervise

    folder, ranks = Path(f"{cfg.run.dir}.ranks"), cfg.launch.gpus
    folder.mkdir()
    spec = folder / "config.json"
    spec.write_text(json.dumps(to_plain(cfg)), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {**worker_environment(), "OMP_NUM_THREADS": "1", **environment}

    def start(rank: int) -> subprocess.Popen[Any]:
        place = Place(rank, ranks, rank, "127.0.0.1", port).variables() if ranks > 1 else {}
        with (folder / f"rank-{rank}.log").open("w", encoding="utf-8") as log:
            command = [sys.executable, script, "--rank", str(spec)]
            return subprocess.Popen(command, env={**common, **place}, stdout=log, stderr=log)

    supervise([partial(start, rank) for rank in range(ranks)], cfg.launch.grace_seconds)
    found = [folder / f"rank-{rank}.json" for rank in range(ranks)]
    if not all(path.exists() for path in found):
        raise RuntimeError((folder / "rank-0.log").read_text(encoding="utf-8")[-3000:])
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def watch(spec: Path, watched: Callable[[Callable[[], Any], str], Any]) -> None:
    """One rank: run the configuration; `watched(perform, stage)` stands around the stage, and what it gives is left."""
    from rlhf import worker
    from rlhf.errors import RLHFError
    from rlhf.pipeline import Run

    perform = Run.perform

    def around(self: Run, stage: str, tracker: Any) -> Any:
        results = []
        found = watched(lambda: results.append(perform(self, stage, tracker)), stage)
        rank = os.environ.get("RANK", "0")
        spec.with_name(f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        return results[0]

    Run.perform = around  # type: ignore[method-assign]
    try:
        worker.work_as_a_rank(json.loads(spec.read_text(encoding="utf-8")))
    except RLHFError as error:  # a gate: four prompts decide nothing
        print(error, file=sys.stderr)
