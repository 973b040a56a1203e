"""Chats as tokens: what is learned is what inference writes, in the context that inference has."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hfkit import cli
from hfkit.compression import quantization
from hfkit.data import corpus
from hfkit.data.chat import (
    TEMPLATES,
    encode_chat,
    ends_of_answer,
    generation_ids,
    prompt_text,
    set_generation_ids,
    set_template,
)
from hfkit.data.columns import BadRow, Columns, ReadRow
from hfkit.data.parquet import ParquetWriters
from hfkit.data.tasks import Task
from hfkit.data.tasks.chat import Chat
from hfkit.distillation import generated
from hfkit.errors import HfkitError
from hfkit.reports import snippets
from tests.toy import WORDS

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
# No end-of-turn token of its own, and no marks: as for SentencePiece models.
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (  # only the last answer keeps its reasoning
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>{{ m.reasoning_content }}</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + ZEPHYR


def texts(count: int = 200) -> list[str]:
    drawn = random.Random(0)
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(3, 9))) for _ in range(count)]


def tokenizer_of(kind: str, template: str | None = ZEPHYR) -> Any:
    """Trained on toy text; `sentencepiece` puts a space before each text."""
    if kind == "byte_level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "sentencepiece":
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL)
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL)
    else:
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Replace("|", " ")
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")
    made.train_from_iterator([f"{text}\n<|user|>\n<|assistant|>\n" for text in texts()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def chat_of(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def learned(tokenizer: Any, turns: list[dict[str, Any]], tools: Any = None) -> list[str]:
    return [
        tokenizer.decode([each for each, is_learned in zip(ids, mask, strict=True) if is_learned])
        for ids, mask, _ in encode_chat(turns, tokenizer, tools)
    ]


@pytest.mark.parametrize("template", ["zephyr", "plain", "chatml", "joined"])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "unigram", "wordpiece"])
def test_training_and_inference_see_the_same_ids(kind: str, template: str) -> None:
    """Every answer follows the very ids that its prompt has at inference, and is learned with its last token."""
    joined = ZEPHYR.replace("|>\n", "|> ")  # a space that many tokenizers join with the word after it
    tokenizer = tokenizer_of(kind, {**TEMPLATES, "joined": joined}.get(template, ZEPHYR))
    for first, second, third, fourth in zip(*[iter(texts(40))] * 4, strict=True):
        turns = chat_of(first, second, third, fourth)
        found = [(ids, mask, end) for ids, mask, ends in encode_chat(turns, tokenizer) for end in ends]
        assert len(found) == 2
        for asked, (ids, mask, end) in zip((1, 3), found, strict=True):
            prompt = tokenizer(prompt_text(turns[: asked + 1], tokenizer), add_special_tokens=False)["input_ids"]
            assert ids[: len(prompt)] == prompt
            assert not mask[len(prompt) - 1] and sum(mask[: len(prompt)]) in (0, found[0][2] - mask.index(True))
            assert all(mask[len(prompt) : end]) and ids[end - 1] in ends_of_answer(tokenizer)
            answer = tokenizer.decode(ids[len(prompt) : end - 1], skip_special_tokens=True)
            assert answer.replace(" ", "") == turns[asked]["content"].replace(" ", "")


def test_a_chat_is_cut_after_the_last_answer_that_fits() -> None:
    tokenizer, task = tokenizer_of("byte_level"), Chat()
    chat = {"messages": chat_of("cat", "dog", "tree", "river")}
    (whole,) = task.encode(chat, tokenizer, 200)
    assert not whole.is_cut and tokenizer.decode(whole.ids).endswith("river</s>")
    (cut,) = task.encode(chat, tokenizer, len(whole.ids) - 1)
    assert cut.is_cut and tokenizer.decode(cut.ids).endswith("dog</s>")
    assert task.encode(chat, tokenizer, 4) == []


def test_a_template_that_rewrites_earlier_turns_gives_each_answer_its_own_context() -> None:
    tokenizer = tokenizer_of("byte_level", THINKING)
    turns = chat_of("cat", "dog", "tree", "river")
    turns[1]["reasoning_content"], turns[3]["reasoning_content"] = "red", "green"
    assert learned(tokenizer, turns) == ["<think>red</think>\ndog<|im_end|>", "<think>green</think>\nriver<|im_end|>"]
    last = list(encode_chat(turns, tokenizer))[1]
    assert "red" not in tokenizer.decode(last.ids), "as inference would see it"


def test_the_marks_of_a_template_say_what_is_learned() -> None:
    marks = "Well: {% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    content = "{{ m['content'] }}</s>"
    half = ZEPHYR.replace(content, f"{{% if m.role == 'assistant' %}}{marks}{{% else %}}{content}{{% endif %}}")
    assert learned(tokenizer_of("byte_level", half), chat_of("cat", "dog"))[0].strip() == "dog</s>"
    plain = half.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert learned(tokenizer_of("byte_level", plain), chat_of("cat", "dog")) == ["Well: dog</s>"]


def test_tool_calls_are_learned_and_their_results_are_not() -> None:
    tokenizer = tokenizer_of("byte_level", TEMPLATES["chatml"])
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "tree"}}}
    turns = chat_of("cat", "")
    turns[1]["tool_calls"] = [call]
    turns += [{"role": "tool", "content": "green", "name": "look"}, {"role": "assistant", "content": "dog"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    (text,) = learned(tokenizer, turns, tools)
    assert json.loads(text.partition("<tool_call>")[2].partition("</tool_call>")[0]) == call["function"]
    assert text.endswith("dog<|im_end|>") and "green" not in text
    for given in (tools, json.dumps(tools)):  # as a data set keeps them
        assert '"parameters"' in tokenizer.decode(list(encode_chat(turns, tokenizer, given))[0].ids)


def test_a_template_that_leaves_tool_calls_out_is_told() -> None:
    tokenizer, task = tokenizer_of("byte_level"), Chat()
    turns = chat_of("cat", "")
    turns[1]["tool_calls"] = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    rows = [{"messages": chat_of("cat", "dog")}, {"messages": turns}]
    ((key, problem),) = task.row_problems(rows, tokenizer, "the train split")
    assert key == "data" and "row 2 of the train split: messages: the chat template does not write the tool" in problem
    assert "such as chatml" in problem
    tokenizer.chat_template = TEMPLATES["chatml"]
    assert not list(task.row_problems(rows, tokenizer, "the train split"))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_template_by_the_name_that_it_reads(name: str) -> None:
    turns = chat_of("cat", "dog")
    turns[1]["reasoning_content"] = "red"
    template = THINKING.replace("reasoning_content", name)
    assert learned(tokenizer_of("byte_level", template), turns) == ["<think>red</think>\ndog<|im_end|>"]
    assert learned(tokenizer_of("byte_level", TEMPLATES["chatml"]), turns) == ["<think>red</think>\ndog<|im_end|>"]


def test_a_chat_may_begin_with_a_greeting_which_is_not_learned() -> None:
    turns = [{"role": "assistant", "content": "river"}, *chat_of("cat", "dog")]
    assert learned(tokenizer_of("byte_level"), turns) == ["dog</s>"]
    assert learned(tokenizer_of("byte_level"), turns[:1]) == []


def test_what_a_teacher_wrote_is_stored_as_the_data_is(tmp_path: Path) -> None:
    """Calls with other arguments are told apart: none takes those of the others."""
    calls = [[{"function": {"name": "look", "arguments": each}}] for each in ({"at": "tree"}, {"far": 1})]
    turns = [[*chat_of("cat", ""), *chat_of("tree", "dog")] for _ in calls]
    for each, call in zip(turns, calls, strict=True):
        each[1]["tool_calls"] = call
    rows = [{"messages": each, "source": "a"} for each in turns]
    with ParquetWriters(tmp_path, {"messages": "messages"}) as writers:
        for split in corpus.SPLITS:
            for row in rows:
                writers.write(split, [list(map(corpus.stored_message, row["messages"]))], "a", 1)
    generated._write(tmp_path / "generated", tmp_path, rows, {})
    assert list(corpus.rows(str(tmp_path / "generated"), "train")) == rows == list(corpus.rows(str(tmp_path), "test"))


@pytest.mark.parametrize(
    "kind, template, ends",
    [("byte_level", TEMPLATES["chatml"], ["<|im_end|>"]), ("sentencepiece", ZEPHYR, ["</s>"]),
     ("byte_level", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", []),
     ("byte_level", "{{ raise_exception('no') }}", ["</s>"])],
)  # fmt: skip
def test_where_an_answer_ends(kind: str, template: str, ends: list[str]) -> None:
    tokenizer = tokenizer_of(kind, template)
    assert tokenizer.convert_ids_to_tokens(ends_of_answer(tokenizer)) == ends
    found = generation_ids(tokenizer, is_chat=True)
    assert found["pad_token_id"] == tokenizer.pad_token_id
    stops = found["eos_token_id"] if isinstance(found["eos_token_id"], list) else [found["eos_token_id"]]
    assert set(tokenizer.convert_ids_to_tokens(stops)) == {"</s>", *ends}
    assert generation_ids(tokenizer, is_chat=False)["eos_token_id"] == tokenizer.eos_token_id


def test_a_saved_model_stops_where_hfkit_does(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_level", TEMPLATES["chatml"])
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, eos_token_id=tokenizer.eos_token_id)
    )  # fmt: skip
    set_generation_ids(model, tokenizer, is_chat=True)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).generation_config
    assert tokenizer.convert_ids_to_tokens(again.eos_token_id) == ["</s>", "<|im_end|>"]
    assert again.pad_token_id == tokenizer.pad_token_id


def test_what_a_template_may_be(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_level", None)
    (tmp_path / "own.jinja").write_text(ZEPHYR, encoding="utf-8")
    for name, text in (("plain", TEMPLATES["plain"]), (str(tmp_path / "own.jinja"), ZEPHYR), (ZEPHYR, ZEPHYR)):
        set_template(tokenizer, name)
        assert tokenizer.chat_template == text
    with pytest.raises(HfkitError, match='chat_template: plian: there is no such file, did you mean "plain"'):
        set_template(tokenizer, "plian")
    bare = copy.deepcopy(tokenizer)
    bare.get_vocab = lambda: {"a": 0}
    with pytest.raises(HfkitError, match=r"chatml needs the tokens <\|im_start\|>, <\|im_end\|>.*use plain"):
        set_template(bare, "chatml")


# ---- through the stages


def chats(path: Path, count: int = 60, **more: Any) -> None:
    rows = [{"messages": chat_of(f"{text} {n}", "dog"), **more} for n, text in enumerate(texts(count))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


PREPARE = """\
stage: prepare
sources: [{files: chats.jsonl}]
columns: {messages: messages}
split: {validation: 0.15, test: 0.15}
"""
FINETUNE = """\
stage: finetune
model: model
data: chats.yaml
task: chat
sequence_length: 64
evaluation_rows: 2
train: {max_steps: 1, per_device_train_batch_size: 2, torch_compile: false, bf16: false, logging_steps: 1}
"""


def world(folder: Path, monkeypatch: pytest.MonkeyPatch, template: str | None, **more: Any) -> None:
    monkeypatch.chdir(folder)
    chats(folder / "chats.jsonl", **more)
    tokenizer = tokenizer_of("byte_level", template)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=128, **ids)
    ).save_pretrained("model")  # fmt: skip
    tokenizer.save_pretrained("model")
    Path("chats.yaml").write_text(PREPARE, encoding="utf-8")
    Path("finetune.yaml").write_text(FINETUNE, encoding="utf-8")


def test_an_adapter_and_its_merged_model_stop_at_the_end_of_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world(tmp_path, monkeypatch, None)
    keys = ["chat_template=chatml", "lora={r: 2}", "merge=true"]
    assert cli.main(["run", "finetune.yaml", *keys]) == 0
    for folder in ("runs/finetune", "runs/finetune/merged"):
        config = json.loads(Path(folder, "generation_config.json").read_text(encoding="utf-8"))
        assert config["eos_token_id"] == [2, 5] and config["pad_token_id"] == 0
        assert Path(folder, "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATES["chatml"]


def of_one_answer(folder: str) -> Any:
    """A model that writes the end of a turn after anything: only who knows that token stops there."""
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.norm.weight[:] = 1
        model.lm_head.weight[5, 0] = 1
    return model


@pytest.mark.parametrize("stage", ["quantize", "prune", "lora"])
def test_what_was_made_of_a_chat_model_stops_in_a_stock_pipeline(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the lines of its card, which for an adapter name its own generation_config."""
    world(tmp_path, monkeypatch, TEMPLATES["chatml"])
    of_one_answer("model").save_pretrained("model")
    assert json.loads(Path("model/generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == 2
    scored = "model: model\ndata: chats.yaml\ntask: chat\nlimit: 2\ngeneration: {max_new_tokens: 8}\n"
    quantize = f"stage: quantize\n{scored}quantization: {{load_in_8bit: true}}\n"
    prune = f"stage: prune\n{scored}pruning: {{method: magnitude, sparsity: 0.1}}\n"
    monkeypatch.setattr(quantization, "ROOM", 2)  # the names of so small a model's tensors weigh more than it
    Path("quantize.yaml").write_text(quantize, encoding="utf-8")
    Path("prune.yaml").write_text(prune, encoding="utf-8")
    Path("lora.yaml").write_text(FINETUNE + "lora: {r: 2}\ngeneration: {max_new_tokens: 8}\n", encoding="utf-8")
    assert cli.main(["run", f"{stage}.yaml"]) == 0
    content = json.loads(Path(f"runs/{stage}/hfkit.json").read_text(encoding="utf-8"))
    lines = snippets.snippet(Path(f"runs/{stage}"), content, f"runs/{stage}")
    lines = lines.replace("print(generate([", "written = (generate([").replace("}]", "}], return_tensors=True")
    scope: dict[str, Any] = {}
    exec(lines.partition("[0]")[0] + ")", scope)
    written = scope["written"][0]["generated_token_ids"]
    assert list(written[-2:]).count(5) == 1 and written[-1] == 5, "one end of a turn, which stops it"
    config = json.loads(Path(f"runs/{stage}/generation_config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == [2, 5] and config["pad_token_id"] == 0


@pytest.mark.parametrize(
    "template, keys, message",
    [
        (None, [], "chat_template: the tokenizer has no chat template; set chat_template: plain, chatml, a file"),
        (ZEPHYR, ["chat_template=none.jinja"], "none.jinja: there is no such file"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", [], "ends an answer with no special token"),
        (NO_SYSTEM, [], "row 1 of the train split: messages: the chat template refuses it: no system role"),
    ],
)
def test_what_is_wrong_with_a_template_is_told_before_a_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    template: str | None,
    keys: list[str],
    message: str,
) -> None:
    world(tmp_path, monkeypatch, template)
    if template == NO_SYSTEM:
        rows = [json.loads(line) for line in Path("chats.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [{"messages": [{"role": "system", "content": "be red"}, *row["messages"]]} for row in rows]
        Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert cli.main(["run", "chats.yaml"]) == 0
    capsys.readouterr()
    assert cli.main(["plan", "finetune.yaml", *keys]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs/finetune").exists()


def test_prepare_keeps_what_a_message_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"id": "1", "function": {"name": "look", "arguments": {"at": ["tree", 1]}}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "cat"}], "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "red", "mood": "good"},
        {"role": "tool", "content": "green", "tool_call_id": "1"},
        {"role": "assistant", "content": "dog", "mood": None},
    ]
    kept = [
        {"role": "user", "content": "cat", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "red"},
        {"role": "tool", "content": "green", "tool_call_id": "1"},
        {"role": "assistant", "content": "dog"},
    ]
    monkeypatch.chdir(tmp_path)
    tools = [{"function": {"name": "look", "parameters": {"type": "object"}}}]
    rows = [{"messages": [*turns, {"role": "user", "content": str(n)}], "tools": tools} for n in range(60)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("chats.yaml").write_text(PREPARE.replace("{messages: messages}", "{messages: messages, tools: tools}"))
    assert cli.main(["run", "chats.yaml"]) == 0
    assert "WARNING: messages hold fields that are not kept: mood (60)" in capsys.readouterr().out
    for row in corpus.rows("runs/chats", "train"):
        assert row["messages"][:4] == kept and json.loads(row["tools"]) == tools


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"role": "user"}, "a message must have role and content"),
        ({"role": "usr", "content": "a"}, "role 'usr' of a message is not known"),
        ({"role": "user", "content": [{"type": "image"}]}, "a message may hold text only"),
        ({"role": "user", "content": "\ud83d"}, "is not UTF-8"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "\ud83d"}]}, "is not UTF-8"),
    ],
)
def test_a_message_that_cannot_be_kept(message: dict[str, Any], reason: str) -> None:
    row = Columns({"messages": "messages"}).row({"messages": [message]}, {"messages": "messages"}, "a.jsonl:1")
    assert isinstance(row, BadRow) and reason in row.reason
    good = Columns({"messages": "messages"}).row(
        {"messages": chat_of("a", "b")}, {"messages": "messages"}, "a.jsonl:2"
    )
    assert isinstance(good, ReadRow) and Task.messages in good.values
