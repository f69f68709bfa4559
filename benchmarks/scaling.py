"""Seconds per update on two ranks of one thread each, against one rank of one thread, at the same global batch.

    python benchmarks/scaling.py --model MODEL                    SFT, reward model and PPO, on CPU, for minutes
    python benchmarks/scaling.py --model MODEL --only ppo --engine zero2

Both have one core a rank, and take turns, so that what else the machine does meets both. The first updates of a run are
left out; the figure is the median of the rest, the ratio that of the medians. PPO is shown by part as well. `work` is
the processor time of an update on the rank that has most: how evenly the work is split, whatever else the machine does.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stage_runs import arguments_of, configuration, run_ranks, watch, write_data, write_reward_model

WARM_UP = 2  # updates
SHAPES = (
    "data.holdout=0.1", "data.max_length=192", "data.max_prompt_length=96", "sft.optim.batch=32",
    "sft.optim.micro_batch=8", "rm.optim.batch=16", "rm.optim.micro_batch=8", "ppo.updates=8", "ppo.batch=64",
    "ppo.minibatch=32", "ppo.micro_tokens=1024", "ppo.max_new_tokens=64", "ppo.decode_group=32", "ppo.eval_every=100",
    "ppo.epochs=2",
)  # fmt: skip
ROWS = {"sft": 320, "rm": 128, "ppo": 128}


def seconds(perform: Callable[[], Any], stage: str) -> dict[str, list[float]]:
    """Seconds of each update, from the end of the one before; PPO's parts as its log has them."""
    found: dict[str, list[float]] = defaultdict(list)
    if stage == "ppo":
        from stages.ppo import Loop

        update = Loop._update

        @functools.wraps(update)
        def timed(self: Loop, number: int) -> dict[str, float]:
            began, worked = time.perf_counter(), time.process_time()
            metrics = update(self, number)
            found["update"].append(time.perf_counter() - began)
            found["work"].append(time.process_time() - worked)
            for name in ("generate", "score", "compare", "train"):
                found[name].append(metrics[f"time/{name}"])
            return metrics

        Loop._update = timed  # type: ignore[method-assign]
    else:
        from rlhf.training import Recorder

        step_end, ends = Recorder.on_step_end, [(0.0, 0.0)]

        def noted(self: Recorder, *args: Any, **kwargs: Any) -> Any:
            control = step_end(self, *args, **kwargs)
            ends.append((time.perf_counter(), time.process_time()))
            if len(ends) > 2:
                for part, now, before in zip(("update", "work"), ends[-1], ends[-2], strict=True):
                    found[part].append(now - before)
            return control

        Recorder.on_step_end = noted  # type: ignore[method-assign]
    perform()
    return found


def main() -> None:
    parser = arguments_of(__doc__, ROWS)
    parser.add_argument("--engine", default="ddp", help="of the two ranks")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], help="more overrides, for both")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        watch(arguments.rank, seconds)
        return
    print(f"{'stage':6} {'part':9} {'one rank, s':>12} {'two ranks, s':>13} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), arguments.model.resolve()
        write_reward_model(model, folder / "rm")
        for stage in arguments.only:
            data, taken = write_data(folder, ROWS[stage], (10, 50), (10, 70)), defaultdict(list)
            for turn in range(2 * arguments.rounds):
                ranks = 1 + turn % 2
                engine = [f"launch.gpus={ranks}", f"engine={arguments.engine if ranks > 1 else 'single'}"]
                overrides = [*SHAPES, *data, *engine, *arguments.set]
                cfg = configuration(stage, model, folder, f"{stage}-{turn}", overrides)
                first, *others = run_ranks(cfg, __file__, {})
                for part, values in first.items():
                    worst = [max(each) for each in zip(values, *(other[part] for other in others), strict=True)]
                    taken[part, ranks] += worst[WARM_UP:]
            for part in dict.fromkeys(part for part, _ in taken):
                one, two = (statistics.median(taken[part, ranks]) for ranks in (1, 2))
                print(f"{stage:6} {part:9} {one:12.3f} {two:13.3f} {one / two:6.2f}", flush=True)


if __name__ == "__main__":
    main()
