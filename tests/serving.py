"""A server in a thread, on toy models."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hfkit.data.chat import set_template
from hfkit.data.tokenizer import load_tokenizer
from hfkit.model import HfkitConfig, HfkitForCausalLM, HfkitForSequenceClassification
from hfkit.serving.engine import Engine
from hfkit.serving.listen import Background, bound
from hfkit.serving.metrics import Monitor
from hfkit.serving.models import Limits, open_all
from hfkit.serving.server import Server, Settings
from hfkit.serving.store import Store

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_models(folder: Path, tokenizer_folder: Path) -> None:
    """Write `toy`, which generates, and `labels`, which classifies, with random weights."""
    tokenizer = load_tokenizer(str(tokenizer_folder))
    set_template(tokenizer, "plain")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = HfkitConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **SHAPE, **ids)
    for name, kind, options in (
        ("toy", HfkitForCausalLM, {}),
        ("labels", HfkitForSequenceClassification, {"num_labels": 3, "id2label": {0: "red", 1: "green", 2: "blue"}}),
    ):
        torch.manual_seed(0)
        config.update(options)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@contextlib.contextmanager
def running(folders: dict[str, str], log: Path, slots: int = 32, **settings: Any) -> Iterator[tuple[str, Server]]:
    """Serve models inside; yields the address and the server."""
    content = settings.pop("content", "full")
    monitor = Monitor()
    engine = Engine(open_all(folders, Limits(slots)), monitor.between.observe)
    engine.start()
    settings = {"tokens": [], "shares": {}, **settings}
    server = Server(engine, Store(log, content), monitor, Settings(**settings))
    with Background(server, bound("127.0.0.1", 0)) as http:
        yield http.address, server
