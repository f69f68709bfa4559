"""What a model card says in fixed sentences."""

from __future__ import annotations

TITLES = {"sft": "supervised fine-tuning", "rm": "reward model", "ppo": "policy after PPO"}
PIPELINES = {"sft": "text-generation", "rm": "text-classification", "ppo": "text-generation"}
USES = {
    "sft": "A language model tuned on demonstrations. It is the start and the reference of PPO, and a baseline to "
    "compare with. Use it only as far as the verdict below covers: the checks were made on the gate's prompts, and "
    "other languages, subjects and prompts were not looked at.",
    "rm": "Scores responses to one prompt against each other, for training and ranking. Its scores carry no meaning "
    "across prompts, it generates no text, and it is no judge of truth or safety: it knows what the people who "
    "ranked preferred.",
    "ppo": "A language model tuned to be preferred by a reward model. Use it only as far as the verdict below covers: "
    "the checks were made on the gate's prompts, and other languages, subjects and prompts were not looked at.",
}  # fmt: skip
METHODS = {
    "sft": "Next-token cross-entropy on the responses of demonstrations.",
    "rm": "A scalar head trained on rankings of responses.",
    "ppo": "Proximal policy optimisation (Schulman et al., 1707.06347) of a reward with a KL penalty to the SFT model.",
}  # fmt: skip
LICENCES = (
    "A licence is what the configuration gave or what a card or licence file beside the data said; nobody has checked "
    "it. Look up what is unknown before the model is passed on."
)

_POLICY = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "model"  # the folder that this file lies in
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))
```"""
_REWARD = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "model"  # the folder that this file lies in
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
messages = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
print(model(**inputs).logits[0, 0].item())
```"""


def loading(stage: str, *, imported: bool) -> str:
    """How to load the model with plain transformers."""
    if imported:
        return "The model was imported and lies where its owner keeps it: the manifest names the folder."
    return _REWARD if stage == "rm" else _POLICY
