"""Several roles on one model in memory: a frozen base, and on its layers one low-rank adapter for each role.

A role is a view of the base. It makes its own adapter the active one before it computes, so that roles take turns on
the same weights; the bare base, without any adapter, is a role too. peft's `set_adapter` is not used: it also decides
what is trainable, which is settled here once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.config import LoraConfig
from rlhf.console import say
from rlhf.errors import ConfigError
from rlhf.lean_lora import make_lean

FILE_PREFIX = "base_model.model."  # of every name in peft's files
HEAD = "score.weight"
FLIPPED = 0.01  # share of half-precision numbers that may be rounded to the other side of base plus adapter


@dataclass(kw_only=True, slots=True)
class StoredAdapter:
    """What a folder written by peft holds: settings, the low-rank factors by name, a reward model's head if any."""

    settings: Any
    factors: dict[str, Tensor]
    head: Tensor | None

    @property
    def modules(self) -> list[str]:
        """The names of the adapted modules."""
        return sorted({name.split(".lora_")[0] for name in self.factors})


class SharedBase:
    """The model that the roles share. `path` is the folder it was loaded from."""

    def __init__(self, model: Any, path: Path | str) -> None:
        self.model, self.path = model.requires_grad_(False), str(path)
        self.settings: dict[str, Any] = {}  # of each adapter, as peft writes them
        self.trainable: set[str] = set()
        self.layers: list[Any] = []
        self.active: str | None = None
        self._verdicts: dict[Path, str] = {}

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def add(self, name: str, lora: LoraConfig, seed: int) -> None:
        """A fresh trainable adapter, which changes nothing at first. ConfigError names ppo.lora.target_modules."""
        from peft import LoraConfig as PeftLora
        from peft import TaskType

        settings = PeftLora(
            task_type=TaskType.CAUSAL_LM, r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):  # the factors are drawn on the CPU
            torch.manual_seed(seed)
            try:
                self._inject(name, settings)
            except ValueError as error:
                raise ConfigError(f"ppo.lora.target_modules={lora.target_modules!r}: {error}") from error
        self._set_trainable(name, True)

    def put(self, name: str, stored: StoredAdapter, *, trainable: bool) -> None:
        """A copy of a stored adapter. It must fit, which `fitting` says."""
        settings = copy.deepcopy(stored.settings)
        settings.target_modules, settings.modules_to_save = set(stored.modules), None
        settings.lora_dropout, settings.inference_mode = 0.0, False
        with torch.random.fork_rng(devices=[]):
            self._inject(name, settings)
        own = dict(self.own_parameters(name))
        if own.keys() != stored.factors.keys():
            raise ConfigError(f"an adapter's tensors do not fit: {sorted(own.keys() ^ stored.factors.keys())[:3]}")
        with torch.no_grad():
            for key, p in own.items():
                p.copy_(stored.factors[key])
        self._set_trainable(name, trainable)

    def role(self, name: str | None, *, body: bool = False) -> RoleModel:
        """The model, or with `body` its transformer without the output layer, under this adapter; None: under none."""
        return RoleModel(self, name, self.model.base_model if body else self.model)

    def own_parameters(self, name: str | None) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of an adapter, or of the bare base, under names that do not hold the adapter's."""
        for key, p in self.model.named_parameters():
            parts = key.split(".")
            at = next((i for i, part in enumerate(parts) if part.startswith("lora_")), None)
            if at is None and name is None:
                yield key.replace(".base_layer.", "."), p
            elif at is not None and parts[at + 1] == name:
                yield ".".join(parts[: at + 1] + parts[at + 2 :]), p

    def activate(self, name: str | None) -> None:
        """What runs from now on runs with this adapter alone."""
        if name != self.active:
            for layer in self.layers:
                layer._active_adapter = [] if name is None else [name]
            self.active = name

    @contextmanager
    def acting(self, name: str | None) -> Iterator[None]:
        """This adapter inside, the one of before outside."""
        before = self.active
        self.activate(name)
        try:
            yield
        finally:
            self.activate(before)

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `context_fn` of torch's activation checkpointing: what a role computed is computed again as that role,
        whichever is active by the time of the backward pass."""
        return nullcontext(), self.acting(self.active)

    def fitting(self, folder: Path | str) -> tuple[StoredAdapter | None, str]:
        """The adapter beside a model folder, if that model is this base with it; else None and the reason.

        The weights are compared, not names: every tensor must be the base's, plus the adapter's product where there is
        one. Tokens added behind the base's vocabulary are no difference.
        """
        folder = Path(folder).absolute()
        stored = read_adapter(folder.parent / "adapter")
        if stored is None:
            return None, "it has no LoRA adapter beside it"
        if folder not in self._verdicts:
            self._verdicts[folder] = self._difference(folder, stored)
        return (None if self._verdicts[folder] else stored), self._verdicts[folder]

    def scorer(self, folder: str, device: torch.device) -> Scorer | None:
        """The reward model in `folder` on this base, frozen, or None where it has to be a model of its own."""
        stored, reason = self.fitting(folder)
        if stored is None or device.type != self.device.type:
            say(f"the reward model {folder} is loaded beside the shared base: {reason or f'it is to run on {device}'}")
            return None
        name = f"reward{sum(key.startswith('reward') for key in self.settings)}"
        self.put(name, stored, trainable=False)
        say(f"the reward model {folder} is an adapter on the policy's base")
        assert stored.head is not None  # `fitting` has compared it
        return Scorer(self.role(name, body=True), stored.head)

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write an adapter for `peft.PeftModel.from_pretrained` on the base's folder."""
        settings = copy.deepcopy(self.settings[name])
        settings.base_model_name_or_path, settings.inference_mode = self.path, True
        settings.target_modules = sorted(settings.target_modules)
        settings.save_pretrained(folder)
        tensors = {FILE_PREFIX + key: p.detach().cpu().contiguous() for key, p in self.own_parameters(name)}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _inject(self, name: str, settings: Any) -> None:
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        vars(self.model).pop("peft_config", None)  # else peft warns of what is meant: several adapters
        inject_adapter_in_model(settings, self.model, name)
        self.settings[name] = self.model.peft_config[name]
        self.layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self.layers:
            make_lean(layer)
        self.active = name
        self.activate(None)

    def _set_trainable(self, name: str, trainable: bool) -> None:
        self.trainable = self.trainable | {name} if trainable else self.trainable - {name}
        self.model.requires_grad_(False)
        for each in self.trainable:
            for _, p in self.own_parameters(each):
                p.requires_grad_(True)

    @torch.no_grad()
    def _difference(self, folder: Path, stored: StoredAdapter) -> str:
        own = dict(self.own_parameters(None))
        adapted = {f"{module}.weight" for module in stored.modules}
        output = self.model.get_output_embeddings()
        missing = {key for key, p in own.items() if output is None or p is not output.weight} | adapted
        other = f"it is not {self.path} with the adapter beside it"
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  # not a mapping
                    theirs = tensors.get_tensor(key).to(self.device)
                    if key == HEAD:
                        same = stored.head is not None and _same(theirs, stored.head.to(theirs), None)
                    else:
                        delta = self._product(key, stored) if key in adapted else None
                        same = key in own and _same(theirs, own[key], delta)
                    if not same:
                        return f"{other}: {key} differs"
                    missing.discard(key)
        return f"{other}: {min(missing)} is missing" if missing or stored.head is None else ""

    def _product(self, key: str, stored: StoredAdapter) -> Tensor | None:
        """What the adapter adds to a weight."""
        from transformers.pytorch_utils import Conv1D

        module = key.removesuffix(".weight")
        try:
            down, up = (stored.factors[f"{module}.lora_{side}.weight"].to(self.device) for side in "AB")
            target = self.model.get_submodule(module)
        except (KeyError, AttributeError):
            return None
        rank = down.shape[0] ** (0.5 if stored.settings.use_rslora else 1)
        product: Tensor = up @ down * (stored.settings.lora_alpha / rank)
        return product.T if isinstance(getattr(target, "base_layer", target), Conv1D) else product


class RoleModel(nn.Module):
    """The shared model, or its transformer, as one role sees it.

    Its parameters are the adapter's; those of the bare base are the base's own. It computes in its own mode (training
    or evaluation), whatever mode another role has left the base in.
    """

    def __init__(self, base: SharedBase, name: str | None, inner: Any) -> None:
        super().__init__()
        self.base, self.name = base, name
        self._hidden = (inner,)  # in a tuple, or its parameters would be this module's
        self.own = _tree(base.own_parameters(name))
        self.eval()

    @property
    def inner(self) -> Any:
        """The module of the shared model that computes."""
        return self._hidden[0]

    @property
    def config(self) -> Any:
        return self.inner.config

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]  # so that its signature is the inner model's
        @functools.wraps(self.inner.forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.ready()
            return self.inner(*args, **kwargs)

        return run

    def ready(self) -> None:
        """Make this role the one that the shared model computes as."""
        self.base.activate(self.name)
        if self.base.model.training != self.training:
            self.base.model.train(self.training)

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()


class Scorer(nn.Module):
    """A reward model on the shared base, for `rlhf.scoring.score_ids`: a body and the frozen head `score`."""

    base_model_prefix = "body"

    def __init__(self, body: RoleModel, head: Tensor) -> None:
        super().__init__()
        self.body = body
        self.score = nn.Linear(head.shape[1], head.shape[0], bias=False, dtype=next(body.parameters()).dtype)
        with torch.no_grad():
            self.score.weight.copy_(head)
        self.score.to(body.base.device).requires_grad_(False)
        self.eval()


def read_adapter(folder: Path) -> StoredAdapter | None:
    """The LoRA adapter in a folder written by peft; None if there is none, or one of another kind."""
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        return None
    from peft import LoraConfig as PeftLora
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(str(folder))
    if not isinstance(settings, PeftLora):
        return None
    tensors = {k.removeprefix(FILE_PREFIX): v for k, v in load_file(folder / "adapter_model.safetensors").items()}
    factors = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    return StoredAdapter(settings=settings, factors=factors, head=tensors.get(HEAD))


def _same(theirs: Tensor, base: Tensor, delta: Tensor | None) -> bool:
    """True if `theirs` is `base` plus `delta`, as far as its number format and another machine's sums can tell."""
    if delta is None:
        if theirs.ndim == 2 and theirs.shape[0] > base.shape[0]:
            theirs = theirs[: base.shape[0]]  # an embedding that got tokens of its own
        return torch.equal(theirs, base.to(theirs.dtype))
    if theirs.shape != base.shape or delta.shape != base.shape:
        return False
    want = base + delta.to(base.dtype)
    if torch.finfo(theirs.dtype).bits < 32:
        return float((theirs != want.to(theirs.dtype)).float().mean()) <= FLIPPED
    return float((theirs.to(want.dtype) - want).norm()) <= 1e-6 * float(want.norm()) + 1e-5 * float(delta.norm())


def _tree(named: Iterable[tuple[str, nn.Parameter]]) -> nn.Module:
    """Modules that hold these parameters under these dotted names and do nothing else."""
    root = nn.Module()
    for name, p in named:
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.register_parameter(leaf, p)
    return root
