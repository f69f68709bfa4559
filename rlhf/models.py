"""Loading, checking and saving of the two kinds of model: a policy (causal LM) and a reward model (one score).

A tensor that a folder lacks would be filled with random numbers by the library, with a warning: here it is an error,
except for the head of a reward model that starts from a language model. What is saved is opened again and compared.

Shapes: B sequences, T tokens, D hidden units.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf.config import Dtype, LaunchConfig, ModelConfig
from rlhf.encoders import is_encoder, is_head
from rlhf.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
PAD_SHIFTS_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert"}  # the first is pad_token_id + 1
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # of outputs after a save, absolute


def pick_device(launch: LaunchConfig) -> torch.device:
    """The device of `launch.device`; ConfigError when it asks for one that this machine lacks."""
    if launch.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(launch.device)
    except RuntimeError as error:
        raise ConfigError(f"launch.device={launch.device!r} is not a device: use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("launch.device=cuda, but PyTorch sees no GPU here: use launch.device=cpu or auto")
    return device


def parameter_count(model: torch.nn.Module) -> int:
    """Number of weights, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def load_policy(path: str | Path, model: ModelConfig, device: torch.device) -> Any:
    """The causal LM in folder (or hub id) `path`, in `model.dtype`, in eval mode. ConfigError if it does not fit."""
    from transformers import AutoModelForCausalLM

    loaded, missing = _load(AutoModelForCausalLM, path, model)
    if missing:
        raise ConfigError(f"{path}: the weights lack {_some(missing)}, which would be random: is it a causal LM?")
    return loaded.to(device).eval()


def load_reward_model(
    path: str | Path, model: ModelConfig, device: torch.device, *, init_head: bool = False, seed: int = 0
) -> Any:
    """A sequence classifier with one output, `score`, in eval mode.

    init_head: `path` is a language model. The missing head `score` of a decoder is drawn from N(0, 1 / (D + 1)) with
    `seed`, as in Stiennon et al. 2020, section 3.4; what an encoder lacks outside its layers (its classifier, its
    pooler) is drawn as its library does, with `seed`, and so is a classifier of another number of labels. Otherwise a
    missing head is a ConfigError, as is any other missing tensor.
    """
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):  # new weights are drawn on the CPU
        torch.manual_seed(seed)
        loaded, missing = _load(
            AutoModelForSequenceClassification, path, model, keep_shapes=not init_head, num_labels=1
        )  # fmt: skip
    decoder = isinstance(getattr(loaded, "score", None), torch.nn.Module)
    if not decoder and (not is_encoder(loaded) or loaded.config.is_encoder_decoder):
        raise ConfigError(
            f"{path}: {type(loaded).__name__} has no linear head named `score`; use a decoder or an encoder"
        )
    lost = [key for key in missing if not (init_head and is_head(loaded, key))]
    if lost:
        hint = "" if init_head else "; a reward model is made from a language model by stage=rm"
        raise ConfigError(f"{path}: the weights lack {_some(lost)}, which would be random{hint}")
    if missing and decoder:
        head = loaded.score
        draw = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            head.weight.copy_(draw / (head.weight.shape[1] + 1) ** 0.5)
    return loaded.to(device).eval()


def load_classifier(path: str | Path, model: ModelConfig, device: torch.device) -> Any:
    """Any sequence classifier with all its labels, in eval mode. ConfigError if a tensor, such as its head, is missing.

    Where its config names no pad token, every token counts: the library would refuse more than one row at a time.
    """
    from transformers import AutoModelForSequenceClassification

    loaded, missing = _load(AutoModelForSequenceClassification, path, model)
    if missing:
        raise ConfigError(f"{path}: the weights lack {_some(missing)}, which would be random: is it a classifier?")
    text_config = loaded.config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = -1  # no token has this id
    return loaded.to(device).eval()


def training_config(model: ModelConfig) -> ModelConfig:
    """`model` with weights in float32: bf16 is the arithmetic of a training, not what its updates are added to."""
    return dataclasses.replace(model, dtype=Dtype.float32)


def _load(
    auto: Any, path: str | Path, model: ModelConfig, *, keep_shapes: bool = True, **options: Any
) -> tuple[Any, list[str]]:  # fmt: skip
    """The model and the names of its tensors that the files did not hold.

    keep_shapes: a tensor of another shape is an error, else as if it were missing.
    """
    where = str(path)
    if not Path(where).is_dir() and (Path(where).is_absolute() or where.startswith((".", "~")) or where.count("/") > 1):
        raise ConfigError(f"{where}: no such model folder")
    _refuse_pickles(Path(where))
    try:
        with _quiet():
            loaded, info = auto.from_pretrained(
                where, dtype=DTYPES[model.dtype], revision=model.revision, trust_remote_code=model.trust_remote_code,
                output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **options,
            )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(f"{where}: holds code of its own, which model.trust_remote_code=true runs") from error
        raise ConfigError(f"{where}: cannot be loaded as a model: {str(error).strip().splitlines()[0]}") from error
    other = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    if other and keep_shapes:
        raise ConfigError(f"{where}: shapes of {_some(other)} do not fit its config.json")
    if "ForCausalLM" in auto.__name__ and any(key.startswith("score.") for key in info["unexpected_keys"]):
        raise ConfigError(f"{where}: holds a reward model (it has score.weight), not a causal LM")
    # The library leaves the pad token's row untrained; where pad is the end token, that would be the end token's.
    loaded.get_input_embeddings().padding_idx = None
    return loaded, sorted({*info["missing_keys"], *other})


def _refuse_pickles(folder: Path) -> None:
    """ConfigError for a folder whose weights are pickles alone: opening one may run whatever it says."""
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
    if pickles and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder}: its weights are pickled ({pickles[0]}), and loading a pickle may run code: save them as "
            "safetensors, with save_pretrained, where you trust them"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's load report and bars: what it warns of is judged here."""
    from transformers.utils import logging as library_logging

    library_logging.disable_progress_bar()
    loggers = [logging.getLogger("transformers"), logging.getLogger("transformers.modeling_utils")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _some(names: Iterable[str], show: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:show]) + (f" and {len(names) - show} more" if len(names) > show else "")


def check_vocabulary(model: Any, tokenizer: Any, path: str | Path) -> None:
    """ConfigError if the tokenizer can make ids that the embedding has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows: "
            "they do not belong together (or call resize_token_embeddings and save the model again)"
        )


def check_positions(path: str | Path, model: ModelConfig, max_length: int, key: str = "model.path") -> None:
    """ConfigError if rows of `max_length` tokens would not fit the positions that the model was made for."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(path), revision=model.revision, trust_remote_code=model.trust_remote_code
        )  # fmt: skip
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"{key}: {path} has no readable config.json: {first}") from error
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in PAD_SHIFTS_POSITIONS:
        positions -= config.pad_token_id + 1
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"data.max_length={max_length} exceeds the {positions} positions of {path}: "
            f"data.max_length={positions} fits"
        )


def enable_activation_checkpointing(model: Any, **options: Any) -> None:
    """Recompute activations in the backward pass; the method's name depends on the transformers version.

    options: of torch.utils.checkpoint.checkpoint.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})


def ensure_pad(model: Any, tokenizer: Any) -> None:
    """Give tokenizer and model a pad token that is not the end token, in place.

    A sequence classifier finds the last token by looking for pads from the right; were the pad the end token, it
    would read its score one token early.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        name = "<|pad|>"
        while tokenizer.convert_tokens_to_ids(name) not in (None, tokenizer.unk_token_id):
            name = name.replace("|>", "_|>")
        tokenizer.add_special_tokens({"pad_token": name})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"


def save_model(model: Any, tokenizer: Any, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Write model and tokenizer to `folder` as safetensors, open it as a user would and compare.

    TrainingError if a tensor is empty, not finite, missing, or if outputs on a probe batch differ from the live
    model's. `folder` is the temporary one of `artifacts.atomic_folder`, so that a bad save never takes its place.
    trust_remote_code: of the model's config; the folder then holds the model's own code, which opening it runs.
    """
    model.config.use_cache = True  # Trainer turns it off; a saved policy should generate quickly
    with _quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reopened = _reopen(model, folder, trust_remote_code)
    live = model.state_dict()
    for name, tensor in reopened.state_dict().items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            raise TrainingError(f"{folder.name}: tensor {name} was saved empty or with values that are not finite")
        if name not in live or not torch.equal(tensor, live[name].detach().cpu()):
            raise TrainingError(f"{folder.name}: tensor {name} is not what was trained")
    gap = _probe_gap(model, reopened)
    if not gap <= TOLERANCE.get(model.dtype, 1e-2):
        raise TrainingError(f"{folder.name}: the saved model's outputs differ from the trained model's by {gap:.2g}")


def _reopen(model: Any, folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    scores = type(model).__name__.endswith("ForSequenceClassification")
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with _quiet():
        reopened, info = auto.from_pretrained(
            folder, dtype=model.dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )  # fmt: skip
    if info["missing_keys"]:
        raise TrainingError(f"{folder.name}: the saved model lacks {_some(info['missing_keys'])}")
    return reopened.eval()


@torch.no_grad()
def _probe_gap(model: Any, reopened: Any) -> float:
    """Largest difference of the two models' outputs on two fixed rows of random tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    pad = model.config.pad_token_id
    ids_BT = torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(0))
    if pad is not None:
        ids_BT[ids_BT == pad] = (pad + 1) % vocabulary
    device, training = next(model.parameters()).device, model.training
    model.eval()
    reopened.to(device)  # another device's arithmetic differs by more than the tolerance
    options = {} if is_encoder(model) else {"use_cache": False}
    outputs = [m(input_ids=ids_BT[i : i + 1].to(device), **options).logits.float().cpu()
               for m in (model, reopened) for i in range(2)]  # fmt: skip
    model.train(training)
    return max(float((outputs[i] - outputs[i + 2]).abs().max()) for i in range(2))
