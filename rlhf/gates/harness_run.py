"""Run a task of lm-evaluation-harness on one model and keep what it says of each document.

The model is loaded as everywhere here (safetensors, no code of its own) and handed over. No cache of answers is used:
the harness's own does not know which model answered.
"""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf.config import TaskConfig
from rlhf.errors import ConfigError, DataError, Invalid
from rlhf.gates.harness import collect, find, task_key
from rlhf.gates.measured import TaskScores
from rlhf.gates.policy import checks_of
from rlhf.models import load_policy
from rlhf.render import load_tokenizer

if TYPE_CHECKING:
    from rlhf.gates.judge import GateRequest

BATCH = 8  # requests at once: rows are padded, so it changes last digits only


def scores_of(request: GateRequest, path: Path | str) -> dict[str, TaskScores | Invalid]:
    """The scores of the model in `path` by task, for every task that a check of the request's stage names; or why there
    are none, for the checks of that task to say."""
    from lm_eval.models.huggingface import HFLM

    checks = checks_of(request.policy, request.stage)
    tasks = {task_key(c.task): (f"gate.{request.stage}.{name}.task", c.task)
             for name, c in checks.items() if c.task.name is not None}  # fmt: skip
    model = load_policy(path, request.model_config, torch.device(request.device))
    runner = HFLM(pretrained=model, tokenizer=load_tokenizer(path, request.model_config), batch_size=BATCH)
    return {key: _tried(runner, where, task, request.seed) for key, (where, task) in tasks.items()}


def _tried(runner: Any, where: str, task: TaskConfig, seed: int) -> TaskScores | Invalid:
    try:
        return _run(runner, where, task, seed)
    except Invalid as error:
        return error


def _run(runner: Any, where: str, task: TaskConfig, seed: int) -> TaskScores:
    """Invalid for whatever a task does wrong: its own code raises, texts are cut. What the machine or the network does
    (a full disk; a DataError for data out of reach) ends the command: a verdict would be replayed when all is well."""
    from lm_eval import evaluate
    from lm_eval.api.metrics import mean, nanmean

    found = find(task, where)
    try:
        loaded = found.manager.load([found.name])["tasks"]
        for one in loaded.values():
            _configure(one, task, seed)
        drawn = {name: _drawn(name, len(one.eval_docs), task, seed) for name, one in loaded.items()}
        with _whole_texts(found.name), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            result = evaluate(
                lm=runner, task_dict={"tasks": loaded}, samples=None if task.documents is None else drawn,
                bootstrap_iters=0, apply_chat_template=task.chat_template, fewshot_as_multiturn=task.chat_template,
            )  # fmt: skip
    except (Invalid, ConfigError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise DataError(f"{where}: what the task reads cannot be had: {type(error).__name__}: {error}") from error
    except Exception as error:  # a task is the code of others, and its data may lie anywhere
        raise Invalid(f"{where}: lm-evaluation-harness: {type(error).__name__}: {error}") from error
    return collect(found.name, loaded, result["samples"], {name: len(ids) for name, ids in drawn.items()},
                   (mean, nanmean))  # fmt: skip


def _configure(one: Any, task: TaskConfig, seed: int) -> None:
    if task.num_fewshot is not None:
        one.set_config(key="num_fewshot", value=task.num_fewshot)
    elif one.get_config("num_fewshot") is None:
        one.set_config(key="num_fewshot", value=0)
    one.set_fewshot_seed(seed=seed)


def _drawn(name: str, total: int, task: TaskConfig, seed: int) -> list[int]:
    """Which of a task's documents are asked: all, or so many of them, drawn with the seed."""
    count = total if task.documents is None else min(total, task.documents)
    return sorted(random.Random(f"{seed}/{name}").sample(range(total), count))


@contextmanager
def _whole_texts(name: str) -> Iterator[None]:
    """The harness cuts a text that is too long for the model from the left and warns: here that is Invalid."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said = record.getMessage()
            if "truncat" in said.lower():
                raise Invalid(f"{name}: a text is too long for the model: {said} Fewer examples (num_fewshot) may do")

    logger, listener = logging.getLogger("lm_eval"), Listener(logging.WARNING)
    level = logger.level
    logger.setLevel(logging.WARNING)  # whatever the process lets through
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
