"""What a mistake gets: one message with key or file, value, rule and remedy; exit code 2; nothing on disk changed."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hfkit import cli

Change = Callable[[Path], None]


def edit(name: str, old: str, new: str) -> Change:
    def change(world: Path) -> None:
        path = world / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return change


def write(name: str, content: str | bytes) -> Change:
    def change(world: Path) -> None:
        (world / name).parent.mkdir(parents=True, exist_ok=True)
        (world / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def add(name: str, text: str) -> Change:
    return lambda world: write(name, (world / name).read_text(encoding="utf-8") + text)(world)


def both(*changes: Change) -> Change:
    return lambda world: [change(world) for change in changes].clear()


def save_tokenizer(**special: str) -> Change:
    """A word tokenizer in `tok`, with the special tokens that are named."""

    def change(world: Path) -> None:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        vocabulary = {token: index for index, token in enumerate(["<a>", "<b>", "<c>", "x"])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<a>"))
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(world / "tok")

    return change


def nothing(world: Path) -> None:
    return None


PRETRAIN, DATA, TOKENIZER = "recipes/pretrain.yaml", "recipes/data.yaml", "recipes/tokenizer.yaml"

# name: (what is wrong, the arguments after `run`, what the message must say)
CASES: dict[str, tuple[Change, list[str], list[str]]] = {
    # the recipe file
    "no such recipe": (nothing, ["recipes/pretrian.yaml"], ["pretrian.yaml", "no such recipe", '"pretrain.yaml"?']),
    "not yaml": (write("recipes/x.yaml", "stage: [pretrain\n"), ["recipes/x.yaml"], ["x.yaml:2", "not valid YAML"]),
    "a list": (write("recipes/x.yaml", "- 1\n"), ["recipes/x.yaml"], ["not a recipe", "`stage:`"]),
    "an empty file": (write("recipes/x.yaml", ""), ["recipes/x.yaml"], ["not a recipe", "`stage:`"]),
    "not utf-8": (write("recipes/x.yaml", b"stage: \xff\n"), ["recipes/x.yaml"], ["x.yaml", "cannot be read"]),
    "no stage": (write("recipes/x.yaml", "task: 1\n"), ["recipes/x.yaml"], ["not a recipe", "stage: pretrain"]),
    "unknown stage": (
        edit(PRETRAIN, "stage: pretrain", "stage: pretrian"),
        [PRETRAIN],
        ["pretrain.yaml:1", "'pretrian'", 'did you mean "pretrain"?'],
    ),
    "unknown key": (
        add(PRETRAIN, "sequence_lenght: 3\n"),
        [PRETRAIN],
        ["pretrain.yaml:20", "sequence_lenght", "unknown key", 'did you mean "sequence_length"?'],
    ),
    "unknown key in a section": (
        edit(PRETRAIN, "hidden_size: 32", "hiden_size: 32"),
        [PRETRAIN],
        ["pretrain.yaml:6: model.hiden_size: unknown key", 'did you mean "hidden_size"?'],
    ),
    "unknown key in a list": (
        edit(DATA, "files: texts.txt", "file: texts.txt"),
        [DATA],
        ["data.yaml:3: sources.0.file: unknown key", '"files"?'],
    ),
    "a library's key that has gone": (
        edit(PRETRAIN, "max_steps: 4", "warmup_ratio: 0.1"),
        [PRETRAIN],
        ["train.warmup_ratio: unknown key", '"warmup_steps"?'],
    ),
    "duplicate key": (
        edit(PRETRAIN, "  hidden_size: 32\n", "  hidden_size: 32\n  hidden_size: 64\n"),
        [PRETRAIN],
        ["pretrain.yaml:7: model.hidden_size: stands twice", "pretrain.yaml:6", "delete one"],
    ),
    "a missing key": (
        edit(PRETRAIN, "tokenizer: tokenizer.yaml\n", ""),
        [PRETRAIN],
        ["pretrain.yaml", "tokenizer: is missing"],
    ),
    "a tag": (edit(DATA, "stage: prepare", "stage: !!python/name:os.system x"), [DATA], ["tag", "plain values only"]),
    "an alias": (edit(DATA, "stage: prepare", "stage: &a prepare\nx: *a"), [DATA], ["data.yaml", "x: unknown key"]),
    # values
    "a word for a whole number": (
        edit(PRETRAIN, "max_steps: 4", "max_steps: four"),
        [PRETRAIN],
        ["train.max_steps: must be a whole number, got 'four'"],
    ),
    "a fraction for a whole number": (
        edit(PRETRAIN, "max_steps: 4", "max_steps: 4.5"),
        [PRETRAIN],
        ["train.max_steps: must be a whole number, got 4.5"],
    ),
    "a string for a number": (
        edit(PRETRAIN, "learning_rate: 1e-2", 'learning_rate: "1e-2"'),
        [PRETRAIN],
        ["train.learning_rate: must be a number, got '1e-2'"],
    ),
    "infinity": (
        edit(PRETRAIN, "learning_rate: 1e-2", "learning_rate: 1e999"),
        [PRETRAIN],
        ["train.learning_rate: must be a finite number"],
    ),
    "no for false": (
        edit(PRETRAIN, "torch_compile: false", "torch_compile: no"),
        [PRETRAIN],
        ["train.torch_compile: must be true or false, got 'no'"],
    ),
    "a value that is not offered": (
        add(PRETRAIN, "packing: documnts\n"),
        [PRETRAIN],
        ["packing: must be one of documents, concatenate, got 'documnts', did you mean \"documents\"?"],
    ),
    "a schedule that does not exist": (
        edit(PRETRAIN, "max_steps: 4", "max_steps: 4\n  lr_scheduler_type: cosin"),
        [PRETRAIN],
        ["train.lr_scheduler_type: must be one of linear, cosine", "got 'cosin', did you mean \"cosine\"?"],
    ),
    "an optimizer that does not exist": (
        add(PRETRAIN, "optimizer: adam\n"),
        [PRETRAIN],
        ["optimizer: must be one of adamw, muon, got 'adam', did you mean \"adamw\"?"],
    ),
    "a section that is no mapping": (
        nothing,
        [PRETRAIN, "model=small"],
        ["command line: model=small: must be a mapping of keys to values"],
    ),
    "a key that hfkit sets": (
        edit(PRETRAIN, "max_steps: 4", "max_steps: 4\n  output_dir: x"),
        [PRETRAIN],
        ["train.output_dir: is set by hfkit", "delete the key"],
    ),
    "a token in a recipe": (
        edit(PRETRAIN, "max_steps: 4", "max_steps: 4\n  hub_token: hf_secret"),
        [PRETRAIN],
        ["train.hub_token: is set by hfkit", "environment"],
    ),
    "arguments that the library refuses": (
        edit(PRETRAIN, "save_steps: 2", "save_steps: 2\n  load_best_model_at_end: true"),
        [PRETRAIN],
        ["pretrain.yaml:12: train:", "strategy"],
    ),
    # the model
    "heads that do not divide the width": (
        nothing,
        [PRETRAIN, "model.num_attention_heads=5"],
        ["command line: model.num_attention_heads=5", "must divide hidden_size=32"],
    ),
    "key-value heads that do not divide the heads": (
        nothing,
        [PRETRAIN, "model.num_key_value_heads=3"],
        ["model.num_key_value_heads=3", "must divide num_attention_heads=4"],
    ),
    "no layers": (nothing, [PRETRAIN, "model.num_hidden_layers=0"], ["num_hidden_layers=0: must be at least 1"]),
    "an odd head for rotary positions": (nothing, [PRETRAIN, "model.head_dim=7"], ["head_dim=7: must be even"]),
    "an unknown kind of positions": (
        nothing,
        [PRETRAIN, "model.position_embedding_type=alibi"],
        ["model.position_embedding_type", "must be one of rope, learned, sinusoidal, got 'alibi'"],
    ),
    "a sequence longer than the positions": (
        nothing,
        [PRETRAIN, "model.max_position_embeddings=16"],
        ["sequence_length", "at most model.max_position_embeddings=16, got 32"],
    ),
    "a vocabulary larger than the model's": (
        nothing,
        [PRETRAIN, "model.vocab_size=100"],
        ["command line: model.vocab_size=100", "at least the tokenizer's 320, got 100", "leave it out"],
    ),
    # inputs
    "an input folder that is not there": (
        nothing,
        [PRETRAIN, "data=runs/dta"],
        ["command line: data=runs/dta: runs/dta: there is no such folder", "a recipe (x.yaml)"],
    ),
    "an input recipe that is not there": (
        nothing,
        [PRETRAIN, "data=dta.yaml"],
        ["data=dta.yaml", "no such recipe", "name a folder"],
    ),
    "an input of another kind": (
        nothing,
        [PRETRAIN, "tokenizer=data.yaml"],
        ["tokenizer=data.yaml", "is a data set, but tokenizer must be a tokenizer"],
    ),
    "a recipe that needs itself": (
        edit(DATA, "stage: prepare", "stage: tokenizer\ndata: data.yaml"),
        [TOKENIZER],
        ["data.yaml", "circular dependency ("],
    ),
    "two recipes for one folder": (
        nothing,
        [PRETRAIN, "output_dir=runs/data"],
        ["output_dir=runs/data", "writes there too"],
    ),
    "a data folder without its splits": (
        write("plain/train.parquet", ""),
        [PRETRAIN, "data=plain"],
        ["data=plain", "has no validation.parquet, test.parquet", "stage: prepare"],
    ),
    "a tokenizer folder without a tokenizer": (
        write("tok/readme.txt", "x"),
        [PRETRAIN, "tokenizer=tok"],
        ["tokenizer=tok", "no tokenizer can be loaded", "stage: tokenizer"],
    ),
    "a tokenizer without eos": (
        save_tokenizer(pad_token="<a>"),
        [PRETRAIN, "tokenizer=tok"],
        ["tok", "no EOS token", "set eos_token"],
    ),
    "a tokenizer without pad": (
        save_tokenizer(eos_token="<b>"),
        [PRETRAIN, "tokenizer=tok"],
        ["tok", "pad token is not set", "<pad>"],
    ),
    "a tokenizer whose pad is its eos": (
        save_tokenizer(eos_token="<b>", pad_token="<b>"),
        [PRETRAIN, "tokenizer=tok"],
        ["tok", "pad token is its EOS token too", "one of its own"],
    ),
    "a vocabulary smaller than the bytes": (
        edit(TOKENIZER, "vocab_size: 320", "vocab_size: 200"),
        [TOKENIZER],
        ["tokenizer.yaml:3: vocab_size: must be at least 262", "got 200"],
    ),
    # data
    "a file that is not there": (
        edit(DATA, "files: texts.txt", "files: nothere.txt"),
        [DATA],
        ["data.yaml:3: sources.0.files: nothere.txt: no such file", "a glob that exists"],
    ),
    "a format that is not read": (
        both(write("texts.docx", "x"), edit(DATA, "files: texts.txt", "files: texts.docx")),
        [DATA],
        ["texts.docx: format .docx is not read", ".jsonl"],
    ),
    "two places in one source": (
        edit(DATA, "files: texts.txt", "files: texts.txt\n    builtin: python-stdlib"),
        [DATA],
        ["sources.0", "exactly one of builtin, files and hub"],
    ),
    "no sources": (nothing, [DATA, "sources=[]"], ["sources=[]: must not be empty"]),
    "a share above one half": (nothing, [DATA, "split.test=0.9"], ["split.test=0.9: must be below 0.5, got 0.9"]),
    "a wrong column": (
        both(write("t.jsonl", '{"body": "x"}\n'), edit(DATA, "files: texts.txt", "files: t.jsonl")),
        [DATA],
        ['t.jsonl:1: column "text": is missing', "known: body"],
    ),
    "a bad row": (
        both(write("t.jsonl", '{"text": "x"}\n{"text": \n'), edit(DATA, "files: texts.txt", "files: t.jsonl")),
        [DATA],
        ["t.jsonl:2: not a JSON object", "bad_rows: {skip: 0.01}"],
    ),
    "a number for a text": (
        both(write("t.jsonl", '{"text": 7}\n'), edit(DATA, "files: texts.txt", "files: t.jsonl")),
        [DATA],
        ['t.jsonl:1: column "text": must be text, got 7'],
    ),
    "a text that is not utf-8": (
        write("texts.txt", b"ok\n\xff\xfe\n"),
        [DATA],
        ["texts.txt:2: byte 0xff is not UTF-8"],
    ),
    "a file cut short": (
        both(
            write("t.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999)[:60]),
            edit(DATA, "files: texts.txt", "files: t.jsonl.gz"),
        ),
        [DATA],
        ["t.jsonl.gz: cannot be read", "restore or remove"],
    ),
    "an empty corpus": (write("texts.txt", ""), [DATA], ["no rows (0 in all)", "give more data"]),
    "a corpus with too few documents": (write("texts.txt", "one\n"), [DATA], ["no rows", "`document: passage`"]),
    # the command line
    "not an override": (nothing, [PRETRAIN, "max_steps"], ["max_steps: not an override", "train.max_steps=100"]),
    "an override of an unknown key": (
        nothing,
        [PRETRAIN, "train.max_stesp=3"],
        ["command line: train.max_stesp=3: unknown key", 'did you mean "max_steps"?'],
    ),
    "an override of a wrong type": (
        nothing,
        [PRETRAIN, "train.max_steps=ten"],
        ["command line: train.max_steps=ten: must be a whole number, got 'ten'"],
    ),
    "an override below a value": (nothing, [PRETRAIN, "data.text=x"], ["data.text=x", "data is 'data.yaml'"]),
    # the output folder
    "a folder with other things in it": (
        write("runs/data/thesis.txt", "x"),
        [DATA],
        ["runs/data: holds files that hfkit did not make", "output_dir="],
    ),
    "a file in the place of the folder": (write("runs/data", "x"), [DATA], ["runs/data", "output_dir="]),
    "a folder of another stage": (
        write("runs/data/hfkit.json", json.dumps({"stage": "tokenizer", "name": "old", "made_from": {}})),
        [DATA],
        ["runs/data: belongs to old (stage tokenizer)", "output_dir="],
    ),
    "a damaged manifest": (write("runs/data/hfkit.json", "{"), [DATA], ["runs/data/hfkit.json: cannot be read"]),
    "a place that cannot be written": (
        nothing,
        [DATA, "output_dir=/proc/hfkit/data"],
        ["/proc/hfkit", "output_dir=..."],
    ),
}


def files_below(folder: Path) -> dict[str, bytes]:
    """Everything on disk, but for the empty lock files."""
    paths = [
        Path(parent) / name for parent, _, names in os.walk(folder) for name in names if not name.endswith(".lock")
    ]
    return {str(path): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_explained_and_changes_nothing(
    name: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, arguments, expected = CASES[name]
    change(world)
    before = files_below(world)
    capsys.readouterr()

    assert cli.main(["run", *arguments]) == 2

    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    for part in expected:
        assert part in message
    assert files_below(world) == before


def test_a_full_disk_is_seen_before_training(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert cli.main(["run", PRETRAIN]) == 2
    message = capsys.readouterr().err
    assert "output_dir: " in message and "0.0 MB are free" in message and "make room" in message
    assert not (world / "runs").exists()


def test_all_mistakes_are_told_at_once(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(PRETRAIN, "hidden_size: 32", "hiden_size: 32")(world)
    edit(PRETRAIN, "max_steps: 4", "max_steps: four")(world)
    edit(TOKENIZER, "vocab_size: 320", "vocab_size: many")(world)
    edit(DATA, "validation: 0.1", "validaton: 0.1")(world)

    assert cli.main(["plan", PRETRAIN, "sequence_length=0"]) == 2

    message = capsys.readouterr().err
    for part in ("hiden_size", "max_steps", "vocab_size", "validaton", "sequence_length=0"):
        assert part in message
    assert len(message.strip().splitlines()) == 5
