"""A small world to run recipes in: texts, and the three recipes on them."""

import random
from pathlib import Path

WORDS = ["the", "cat", "dog", "tree", "sees", "finds", "likes", "red", "green", "small", "and", "under", "river"]

DATA = """\
stage: prepare
sources:
  - files: texts.txt
    document: line
split:
  validation: 0.1
  test: 0.1
"""
TOKENIZER = """\
stage: tokenizer
data: data.yaml
vocab_size: 320
"""
PRETRAIN = """\
stage: pretrain
data: data.yaml
tokenizer: tokenizer.yaml

model:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4

sequence_length: 32

train:
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  logging_steps: 1
  torch_compile: false
  bf16: false
  save_steps: 2
"""


def write_world(folder: Path, documents: int = 400) -> Path:
    """`texts.txt` and `recipes/{data,tokenizer,pretrain}.yaml` in a folder."""
    random.seed(0)
    lines = (" ".join(random.choices(WORDS, k=random.randint(5, 40))) + f" {number}." for number in range(documents))
    (folder / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipes = folder / "recipes"
    recipes.mkdir()
    for name, text in (("data", DATA), ("tokenizer", TOKENIZER), ("pretrain", PRETRAIN)):
        (recipes / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder
