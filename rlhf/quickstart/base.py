"""The base model: a small Llama that has read the shop's manuals, and its tokenizer.

Each word of this world is one token (byte-level BPE, cut at words, no merges across them), which keeps sequences short;
any other text falls apart into bytes and survives.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = 1024  # at most
MAX_LENGTH = 256  # tokens
BATCH, STEPS, LEARNING_RATE = 8, 160, 2e-3  # small batches: it is the number of updates that teaches it


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer for `texts`, with the chat template; the pad token is not the end token."""
    tokenizer = Tokenizer(models.BPE())
    word = Regex(r" ?[\p{L}\p{N}]+| ?[^\s\p{L}\p{N}]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(word, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, END, *ROLES], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=list(ROLES),
        padding_side="right", model_max_length=MAX_LENGTH, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """About 0.9 M parameters, drawn with `seed`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=384, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True, initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        attention_dropout=0.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # Attention that starts out even, over tokens that differ clearly: the answer then finds the fault in the letter
    # within a few hundred updates. From the library's own start (0.02 everywhere) it takes thousands.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(0.2)
            elif name.endswith("embed_tokens.weight"):
                weight.mul_(3)
    return model


def _batches(ids: list[list[int]], rng: random.Random) -> Iterator[list[list[int]]]:
    """Batches for ever, every page once an epoch."""
    while True:
        order = rng.sample(ids, len(ids))
        yield from (order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH))


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> float:
    """Read `texts` for `STEPS` updates of next-token prediction; returns the last loss, nats a token."""
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    batches = _batches(ids, random.Random(f"pretrain/{seed}"))
    loss = torch.zeros(())
    model.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        if step < 10:
            optimizer.param_groups[0]["lr"] *= (step + 1) / 10
        rows = [torch.tensor(row) for row in next(batches)]
        inputs_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels_BT = inputs_BT.masked_fill(inputs_BT == tokenizer.pad_token_id, -100)
        loss = model(input_ids=inputs_BT, labels=labels_BT, use_cache=False).loss  # right padding needs no mask
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return float(loss.detach())


def build_base(folder: Path, vocabulary_texts: list[str], manuals: list[str], seed: int) -> float:
    """Write the base model and its tokenizer into `folder`; returns the last pretraining loss."""
    with torch.random.fork_rng(devices=[]):
        tokenizer = train_tokenizer(vocabulary_texts + manuals)
        model = new_model(tokenizer, seed)
        loss = pretrain(model, tokenizer, manuals, seed)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return loss
