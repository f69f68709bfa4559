"""Over-optimisation in the quickstart's world (Gao et al. 2210.10760): what PPO is paid, what a held-out reward model
says, and what people truly want, against the distance from SFT.

    python -m rlhf tracker=none                                          the quickstart, about 3 minutes
    python benchmarks/overoptimisation.py runs/quickstart                three PPO runs, about 6 minutes

The finished run's rankings are split by prompt: 100 train the proxy, the others the holdout. Three PPO runs follow:
`free` is paid by the proxy with beta = 0 and goes on until all is lost; `watched` is the same run with the alarm and a
KL budget; `defaults` is the quickstart as it comes, paid by its own reward model. The policies of every few updates
are judged on the 600 audit prompts, which nothing else has seen, with the same noise. No run reads gold, only this.

Writes `overoptimisation.json` into --out, prints the table; --plot FILE draws it (with matplotlib).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from reward_models.trained import TrainedReward
from rlhf.artifacts import read_json, write_json, write_text
from rlhf.config import ModelConfig
from rlhf.data.loading import is_heldout
from rlhf.logprobs import sequence_logprobs
from rlhf.quickstart.audit import MAX_NEW_TOKENS, mean, utilities
from rlhf.quickstart.world import Shop
from rlhf.render import Renderer, load_tokenizer
from rlhf.rollout import Sampling, generate, seed_of

PROXY_ROWS, PROXY_HELDOUT = 100, 30  # rankings that the proxy is trained on, and judged by
PROXY = ("rm.optim.epochs=10", "rm.optim.evals=1")  # a hundred rankings are 7 updates an epoch
HOLDOUT_SEED = 1  # added to the run's: the held-out reward model has another draw of everything
EVERY = {"free": 2, "defaults": 6}  # updates between two policies that are judged
# As the quickstart, but beta = 0, no decay of the rate, and a third of the rate so that a curve has points; all
# held-out prompts, since the holdout's fall is small beside its noise.
FREE = (
    "ppo.kl.coef=0", "ppo.schedule=constant", "ppo.learning_rate=1e-4", "ppo.updates=30", "ppo.eval_every=2",
    "ppo.eval_prompts=225",
)  # fmt: skip
UNSTOPPED = ("ppo.kl.budget=10", "ppo.kl.patience=1")  # ends when there is nothing left to see
# The budget is what the quickstart spends with beta = .1, about 2 nats: more is no gain that is known.
STOPPED = ("ppo.kl.budget=2", "ppo.kl.patience=2", "ppo.alarm.action=stop")
SEEN = ("eval/kl", "eval/reward", "eval/holdout", "eval/holdout_fall", "eval/alarm")
ENDED = {0, 10, 11}  # exit codes that leave an artifact under gate.mode=observe: passed, failed, inconclusive


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def split_rankings(rankings: Path, share: float, proxy: Path, holdout: Path) -> None:
    """Write two files that share no prompt, each with some that no stage trains on, to be judged by.

    share: data.holdout of the run. The rows have one prompt each, so that a split by rows is one by prompts.
    """
    rows = lines(rankings)
    prompts = {json.dumps(row["prompt"]) for row in rows}
    if len(prompts) < len(rows):
        raise SystemExit(f"{rankings}: {len(rows)} rankings of {len(prompts)} prompts, want one each")
    heldout = [row for row in rows if is_heldout(row["prompt"], share)]
    train = [row for row in rows if not is_heldout(row["prompt"], share)]
    parts = {
        proxy: train[:PROXY_ROWS] + heldout[:PROXY_HELDOUT],
        holdout: train[PROXY_ROWS:] + heldout[PROXY_HELDOUT:],
    }
    for path, part in parts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))


class Bench:
    """The runs of one benchmark, in `out`/runs; a finished one is not made again."""

    def __init__(self, run: Path, out: Path, extra: Sequence[str]) -> None:
        self.run, self.out, self.extra = run.resolve(), out.resolve(), tuple(extra)
        self.seed = int(read_json(self.run / "world" / "world.json")["seed"])
        self.share = float(read_json(self.run / "rm" / "manifest.json")["inputs"]["data"]["rules"]["holdout"])

    def start(self, name: str, *arguments: str, seed: int | None = None) -> subprocess.Popen[bytes]:
        seed = self.seed if seed is None else seed
        common = (f"seed={seed}", f"data.world.seed={self.seed}", f"run.root={self.out}/runs", f"run.name={name}",
                  f"run.parents={self.run}", "tracker=none", "gate.mode=observe")  # fmt: skip
        return subprocess.Popen([sys.executable, "-m", "rlhf", *common, *arguments])

    def reward_model(self, name: str, seed: int, *arguments: str) -> Path:
        """Train a reward model on `out`/`name`.jsonl; its folder."""
        process = self.start(name, "stage=rm", f"data.rankings.path={self.out}/{name}.jsonl", *arguments, seed=seed)
        must_end_well(process, name)
        return self.out / "runs" / name / "rm" / "model"

    def ppo(self, name: str, *arguments: str) -> dict[str, Any]:
        """Run PPO and keep every update's policy in `out`/kept/`name`, since the program deletes the checkpoints of a
        finished stage; the stage's manifest."""
        kept, checkpoints = self.out / "kept" / name, self.out / "runs" / name / "ppo" / "checkpoints"
        kept.mkdir(parents=True, exist_ok=True)
        every = ("ppo.checkpoint_every=1", "ppo.keep_checkpoints=20")
        process = self.start(name, "stage=ppo", *every, *arguments, *self.extra)
        while process.poll() is None:
            for folder in checkpoints.glob("step-*"):
                copy_once(folder / "policy.safetensors", kept / f"{folder.name}.safetensors")
            try:
                process.wait(0.3)
            except subprocess.TimeoutExpired:
                continue
        must_end_well(process, name)
        manifest: dict[str, Any] = read_json(self.out / "runs" / name / "ppo" / "manifest.json")
        if manifest["stop_reason"] == "finished":
            final = self.out / "runs" / name / "ppo" / "model" / "model.safetensors"
            copy_once(final, kept / f"step-{manifest['updates']}.safetensors")
        return manifest

    def all(self) -> dict[str, Any]:
        """Everything; `free` and `defaults` have a curve, `watched` where it stopped and what it kept."""
        files = {name: self.out / f"{name}.jsonl" for name in ("proxy", "holdout")}
        split_rankings(self.run / "rankings" / "rankings.jsonl", self.share, files["proxy"], files["holdout"])
        proxy = self.reward_model("proxy", self.seed, *PROXY)
        holdout = self.reward_model("holdout", self.seed + HOLDOUT_SEED)
        paid = (f"rm.artifact={proxy}", f"ppo.holdout={holdout}", *FREE)
        free = self.ppo("free", *paid, *UNSTOPPED)
        watched = self.ppo("watched", *paid, *STOPPED)
        defaults = self.ppo("defaults")
        stop, kept = watched["updates"], watched["extra"].get("best_step", watched["updates"])
        self.must_be_a_part(kept)
        steps = {"free": (free["updates"], stop, kept), "defaults": (defaults["updates"],)}
        result: dict[str, Any] = {"watched": {"reason": watched["stop_reason"], "stop": stop, "kept": kept}}
        for name, reward in (("free", proxy), ("defaults", self.run / "rm" / "model")):
            judge = Judge(self.run, self.seed, {"proxy": reward, "holdout": holdout})
            chosen = [*range(0, steps[name][0], EVERY[name]), *steps[name]]
            result[name] = {"curve": judge.curve(self.out / "kept" / name, chosen), "seen": self.evaluations(name)}
        return result

    def must_be_a_part(self, step: int) -> None:
        """The stopped run must be the free one up to its stop: the policy that it kept is the free one's, bitwise."""
        kept = load_file(self.out / "runs" / "watched" / "ppo" / "model" / "model.safetensors")
        same = load_file(self.out / "kept" / "free" / f"step-{step}.safetensors") if step else None
        if same is not None and not all(torch.equal(tensor, same[name]) for name, tensor in kept.items()):
            raise SystemExit(f"the policy that the stopped run kept is not that of update {step} of the free run")

    def evaluations(self, name: str) -> dict[int, dict[str, float]]:
        """What the run itself saw at its evaluations, by update."""
        found = lines(self.out / "runs" / name / "ppo" / "metrics.jsonl")
        return {row["step"]: {k: v for k, v in row.items() if k in SEEN} for row in found if "eval/kl" in row}


def must_end_well(process: subprocess.Popen[bytes], name: str) -> None:
    if process.wait() not in ENDED:
        raise SystemExit(f"{name}: ended with {process.returncode}")


def copy_once(source: Path, target: Path) -> None:
    """Copy aside and rename, so that what is there is whole. A source that is just being deleted is passed over."""
    if target.exists():
        return
    part = target.with_suffix(".part")
    try:
        shutil.copyfile(source, part)
    except FileNotFoundError:
        return
    part.rename(target)


class Judge:
    """Gold, proxy and holdout of one response to each audit prompt; the same noise for every policy."""

    def __init__(self, run: Path, seed: int, rewards: Mapping[str, Path]) -> None:
        self.shop = Shop(seed)
        self.sft = run / "sft" / "model"
        self.renderer = Renderer(load_tokenizer(str(self.sft), ModelConfig(path=str(self.sft))))
        self.prompts = [self.renderer.prompt_ids(case.messages) for case in self.shop.audit]
        self.seeds = [seed_of(seed, "audit", case.id) for case in self.shop.audit]
        self.policy = AutoModelForCausalLM.from_pretrained(self.sft)
        self.reference = AutoModelForCausalLM.from_pretrained(self.sft)
        self.rewards = {name: TrainedReward(str(path)) for name, path in rewards.items()}
        self.scale = {
            name: read_json(path.parent / "manifest.json")["extra"] for name, path in rewards.items()
        }  # fmt: skip

    def judge(self, weights: Path | None) -> dict[str, Any]:
        """KL in nats a response, gold with its 95 % interval, rewards in standard deviations; None: the SFT policy."""
        state = self.reference.state_dict() if weights is None else load_file(weights)
        self.policy.load_state_dict(state, strict=False)
        sampling = Sampling(1.0, MAX_NEW_TOKENS, self.renderer.eos_id, len(self.prompts))
        with torch.inference_mode():
            responses = generate(self.policy, self.prompts, self.seeds, sampling)
            before = sequence_logprobs(self.reference, self.prompts, [r.ids for r in responses], 1.0)
        texts = [self.renderer.decode(r.ids).strip() for r in responses]
        values = utilities(self.shop, self.shop.audit, texts)
        gold = mean(values)
        kl = [sum(r.logprobs) - float(b.sum()) for r, b in zip(responses, before, strict=True)]
        found = {"kl": sum(kl) / len(kl), "gold": gold.value, "gold_low": gold.low, "gold_high": gold.high,
                 "values": values, "sample": texts[0]}  # fmt: skip
        rows = [{"messages": case.messages} for case in self.shop.audit]
        for name, reward in self.rewards.items():
            raw = reward.score([case.text for case in self.shop.audit], texts, rows)
            found[name] = (sum(raw) / len(raw) - self.scale[name]["reward_mean"]) / self.scale[name]["reward_std"]
        return found

    def curve(self, kept: Path, steps: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The policies of a run after the updates `steps`; update 0 is SFT."""
        return {step: self.judge(kept / f"step-{step}.safetensors" if step else None) for step in sorted(set(steps))}


def fallen(curve: Mapping[int, Mapping[str, Any]], step: int) -> float:
    """Share of the gold gained over SFT at the highest point up to `step` that is lost at `step`. A share of the gain,
    not of the utility, whose zero is arbitrary: with SFT above zero it is the stricter of the two."""
    start = curve[0]["gold"]
    peak = max(row["gold"] for at, row in curve.items() if at <= step)
    return float((peak - curve[step]["gold"]) / (peak - start)) if peak > start else 0.0


def table(name: str, curve: Mapping[int, Mapping[str, Any]], seen: Mapping[int, Mapping[str, float]]) -> str:
    """Markdown. The last two columns are what the run itself saw: the fall of the holdout, evaluations in alarm."""
    head = f"| {name}: update | KL | √KL | proxy | holdout | gold, 95 % | lost | fall seen | alarms |"
    rows = [head, "|" + "---:|" * 9]
    for step, row in curve.items():
        gold = f"{row['gold']:.2f} [{row['gold_low']:.2f}, {row['gold_high']:.2f}]"
        eyes = seen.get(step, {})
        fall = f"{eyes['eval/holdout_fall']:.2f}" if "eval/holdout_fall" in eyes else ""
        alarms = f"{eyes['eval/alarm']:.0f}" if "eval/alarm" in eyes else ""
        cells = (step, f"{row['kl']:.2f}", f"{math.sqrt(max(row['kl'], 0)):.2f}", f"{row['proxy']:.2f}",
                 f"{row['holdout']:.2f}", gold, f"{100 * fallen(curve, step):.0f} %", fall, alarms)  # fmt: skip
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(rows)


def summary(result: Mapping[str, Any]) -> str:
    """What the claims come to, in a few lines."""
    free, defaults, watched = result["free"]["curve"], result["defaults"]["curve"], result["watched"]
    rung = [step for step, row in result["free"]["seen"].items() if row.get("eval/alarm", 0) >= 2]
    return "\n".join([
        f"free: {100 * fallen(free, max(free)):.0f} % of the gain at the peak is lost at update {max(free)}",
        f"watched: {watched['reason']} at update {watched['stop']}, {100 * fallen(free, watched['stop']):.0f} % lost",
        f"kept: update {watched['kept']}, {100 * fallen(free, watched['kept']):.0f} % lost",
        f"the alarm alone would have stopped after update {min(rung)}, {100 * fallen(free, min(rung)):.0f} % lost"
        if rung else "the alarm alone would not have stopped it",
        f"defaults: {100 * fallen(defaults, max(defaults)):.0f} % lost at update {max(defaults)}",
    ])  # fmt: skip


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Rewards above, gold below, both against √KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rlhf", "font.size": 9})
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(6.4, 6.0), layout="constrained")
    free, defaults = result["free"]["curve"], result["defaults"]["curve"]
    x = [math.sqrt(max(row["kl"], 0)) for row in free.values()]
    for key, mark, colour, label in (
        ("proxy", "o-", "tab:red", "proxy: 100 rankings, what PPO is paid"),
        ("holdout", "s-", "tab:blue", "holdout: the other rankings"),
    ):
        top.plot(x, [row[key] for row in free.values()], mark, ms=3, color=colour, label=label)
    top.set_ylabel("reward, standard deviations")
    for name, curve, colour in (("beta = 0", free, "black"), ("quickstart's defaults", defaults, "tab:green")):
        x = [math.sqrt(max(row["kl"], 0)) for row in curve.values()]
        gold = [row["gold"] for row in curve.values()]
        bottom.plot(x, gold, "o-", ms=3, color=colour, label=f"gold, {name}")
        low, high = ([row[key] for row in curve.values()] for key in ("gold_low", "gold_high"))
        bottom.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    bottom.set_ylabel("gold utility, 600 unseen prompts")
    bottom.set_xlabel("√KL(policy ‖ SFT), nats a response")
    watched = result["watched"]
    for axis in (top, bottom):
        for step, style, label in ((watched["stop"], "--", "stopped"), (watched["kept"], ":", "kept")):
            at = math.sqrt(free[step]["kl"])
            axis.axvline(at, ls=style, color="grey", lw=1, label=f"{label}: update {step}")
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)  # the same figures, the same bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished quickstart run")
    parser.add_argument("--out", type=Path, default=Path("runs/overoptimisation"))
    parser.add_argument("--plot", type=Path, help="write the picture here (.svg)")
    parser.add_argument("overrides", nargs="*", help="for all three PPO runs, such as launch.threads=1")
    arguments = parser.parse_args()
    bench = Bench(arguments.run, arguments.out, arguments.overrides)
    result = bench.all()
    write_json(bench.out / "overoptimisation.json", result)
    for name in ("free", "defaults"):
        print(table(name, result[name]["curve"], result[name]["seen"]) + "\n")
    print(summary(result))
    if arguments.plot:
        draw(result, arguments.plot)


if __name__ == "__main__":
    main()
