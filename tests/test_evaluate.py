"""Evaluation: scores that can be recomputed from the predictions, intervals, paired tests, and what bad input gets."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sacrebleu
import sklearn.metrics
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.data import corpus
from hfkit.data.tasks.text import windows
from hfkit.data.tokenizer import load_tokenizer
from hfkit.engine import graph
from hfkit.errors import HfkitError
from hfkit.evaluation import harness
from hfkit.inference.generation import generate
from hfkit.model.loading import load_model
from hfkit.reports import evaluation
from hfkit.reports.markdown import cell, fenced
from tests.toy import WORDS

EVALUATE = """\
stage: evaluate
model: runs/pretrain
data: tasks.yaml
prompt: "{question} ->"
completion: " {answer}"
batch_size: 4
generation: {max_new_tokens: 4}
"""
RECIPE = "recipes/evaluate.yaml"


@pytest.fixture
def recipe(there: Path) -> Path:
    (there / RECIPE).write_text(EVALUATE, encoding="utf-8")
    return there


def run(*options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    assert cli.main(["run", RECIPE, *options]) == 0
    path = Path("runs/evaluate/predictions.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(Path("runs/evaluate/metrics.json").read_text(encoding="utf-8")), list(map(json.loads, lines))


def test_every_row_is_predicted_once_and_the_scores_are_those_of_the_predictions(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, rows = run()
    expected = list(corpus.rows("runs/tasks", "test"))
    assert [row["references"] for row in rows] == [[each["answer"]] for each in expected]
    assert all(row["prompt"] == f"{each['question']} ->" for row, each in zip(rows, expected, strict=True))
    assert found["rows"] == len(rows) and set(rows[0]) == {"prompt", "prediction", "references", "scores"}

    predictions, references = [row["prediction"] for row in rows], [[row["references"][0] for row in rows]]
    assert found["bleu"] == pytest.approx(
        sacrebleu.BLEU(effective_order=True).corpus_score(predictions, references).score
    )
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, references).score)
    for name in ("rouge1", "rougeL", "bleu", "chrf", "exact_match", "perplexity"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert np.mean([row["scores"]["rouge1"] for row in rows]) == pytest.approx(found["rouge1"], abs=1e-5)
    shown = capsys.readouterr().out
    assert "95 %" in shown and "best" in shown and "worst" in shown and "sacrebleu|nrefs:1" in shown


def test_generation_gives_what_each_prompt_alone_would_give(recipe: Path) -> None:
    """Sorting, padding on the left and the cache change nothing under greedy decoding."""
    model, tokenizer = load_model("runs/pretrain").eval(), AutoTokenizer.from_pretrained("runs/pretrain")
    prompts = [tokenizer(row["question"])["input_ids"] for row in corpus.rows("runs/tasks", "validation")]
    found = generate(model, tokenizer, prompts, 5, {"max_new_tokens": 6})
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def test_perplexity_is_a_sum_over_the_tokens_whatever_the_batch(recipe: Path) -> None:
    found, rows = run("task=text", "data=data.yaml", "metrics=[perplexity, bits_per_byte]")
    assert rows == []
    model, tokenizer = load_model("runs/pretrain").eval(), AutoTokenizer.from_pretrained("runs/pretrain")
    nats = tokens = size = 0.0
    for text in corpus.texts("runs/data", "test"):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, 31):  # windows of 32 that share one token
            piece = torch.tensor([ids[start : start + 32]])
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            nats += functional.cross_entropy(logits.double(), piece[0, 1:], reduction="sum").item()
        tokens += len(ids) - 1
        size += len(text.encode())
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_windows_predict_every_token_once() -> None:
    for length in (1, 2, 7, 8, 9, 30):
        pieces = list(windows(list(range(length)), 8))
        assert [token for piece in pieces for token in piece.ids[1:]] == list(range(1, length))
        assert all(len(piece.ids) <= 8 for piece in pieces)


def test_a_model_against_itself_and_against_a_better_one(recipe: Path) -> None:
    same, _ = run("against=runs/pretrain")
    assert same["rouge1_difference"] == 0 and same["rouge1_p"] == 1 and same["perplexity_p"] == 1
    train = ["train.max_steps=150", "train.learning_rate=5e-3", "train.save_strategy=no", "lora=null"]
    assert cli.main(["run", "recipes/finetune.yaml", *train]) == 0
    better, _ = run("model=runs/finetune", "against=runs/pretrain", "--rebuild")
    assert better["perplexity_difference_high"] < 0 and better["perplexity_p"] < 0.01


def test_classes_are_scored_by_name(recipe: Path) -> None:
    train = ["train.max_steps=80", "train.learning_rate=3e-3", "train.save_strategy=no"]
    assert cli.main(["run", "recipes/classify.yaml", *train]) == 0
    found, rows = run("model=runs/classify", "task=classify", f"prompt={json.dumps('{question}')}", "label=topic")
    assert found["accuracy"] == pytest.approx(np.mean([row["prediction"] == row["references"][0] for row in rows]))
    assert found["accuracy"] > 0.8 and {row["prediction"] for row in rows} <= {"animal", "other"}


@pytest.mark.parametrize("options", [["quantization.load_in_8bit=true"], ["lora.r=2"]])
def test_adapters_and_quantized_models_are_evaluated_too(recipe: Path, options: list[str]) -> None:
    assert cli.main(["run", "recipes/finetune.yaml", *options]) == 0
    found, rows = run("model=runs/finetune", "limit=5")
    assert len(rows) == 5 and found["perplexity"] > 1


def test_what_is_counted_in_other_tokens_is_not_compared(recipe: Path) -> None:
    save_foreign("llama", Path("foreign"))
    found, _ = run("against=foreign", "metrics=[perplexity, bits_per_byte]", "limit=4")
    assert "bits_per_byte_p" in found and "perplexity_high" in found
    assert not any(name.startswith(("perplexity_difference", "perplexity_p")) for name in found)


# ---- models that hfkit did not make


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}


def bpe(before: str, after: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that puts special tokens around a text, as those of many models do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = [*dict.fromkeys(special.values())]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    backend.decoder = decoders.ByteLevel()
    if before or after:
        ids = [(mark, backend.token_to_id(mark)) for mark in (before, after) if mark]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=ids
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def save_foreign(kind: str, folder: Path) -> None:
    """A small model with random weights and its tokenizer, as transformers saves them."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 320}
    if kind == "gpt2":
        tokenizer = bpe("", "", bos_token="<end>", eos_token="<end>", unk_token="<end>")  # and no padding
        config: Any = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)
        model: Any = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        tokenizer = bpe("<s>", "", bos_token="<s>", eos_token="</s>")
        config = transformers.LlamaConfig(**SMALL, **sizes, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
        model = transformers.LlamaForCausalLM(config)
    elif kind == "t5":
        tokenizer = transformers.ByT5Tokenizer()  # which is not fast
        config = transformers.T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        config.decoder_start_token_id = 0
        model = transformers.T5ForConditionalGeneration(config)
    elif kind == "bart":
        tokenizer = bpe("<s>", "</s>", bos_token="<s>", pad_token="<pad>", eos_token="</s>")
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART, **sizes))
    elif kind == "marian":
        tokenizer = bpe("", "</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
        ends = {"pad_token_id": 2, "decoder_start_token_id": 2, "eos_token_id": 0, "forced_eos_token_id": 0}
        model = transformers.MarianMTModel(transformers.MarianConfig(**BART, **sizes, **ends))
    else:
        marks = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        tokenizer = bpe("[CLS]", "[SEP]", **marks)  # and no EOS
        config = transformers.BertConfig(**SMALL, **sizes, max_position_embeddings=64, pad_token_id=2, num_labels=2)
        config.id2label, config.label2id = {0: "animal", 1: "other"}, {"animal": 0, "other": 1}
        model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that what is written differs with what is read
            parameter.mul_(4 if parameter.dim() > 1 else 1)
            is_of_encoder = "encoder_attn" in name or "EncDecAttention" in name
            is_output = name.endswith(("v.weight", "v_proj.weight", "o.weight", "out_proj.weight"))
            parameter.mul_(5 if is_of_encoder and is_output else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_decoders_of_others_are_evaluated(recipe: Path, kind: str) -> None:
    """Also with a tokenizer that has no padding: EOS is taken."""
    save_foreign(kind, Path("foreign"))
    found, rows = run("model=foreign", "metrics=[exact_match, perplexity]")
    model, tokenizer = load_model("foreign").eval(), AutoTokenizer.from_pretrained("foreign")
    nats = tokens = 0.0
    for row, each in zip(rows, corpus.rows("runs/tasks", "test"), strict=True):
        prompt = tokenizer(f"{each['question']} ->")["input_ids"]
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert row["prediction"] == tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
        answer = [*tokenizer(f" {each['answer']}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        nats += functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        tokens += len(answer)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
def test_an_encoder_decoder_is_held_to_the_completion_given_the_prompt(recipe: Path, kind: str) -> None:
    save_foreign(kind, Path("foreign"))
    found, rows = run("model=foreign", "metrics=[perplexity, bits_per_byte]", "prompt='{question}'")
    model, tokenizer = load_model("foreign").eval(), AutoTokenizer.from_pretrained("foreign")
    nats = tokens = size = 0.0
    for each in corpus.rows("runs/tasks", "test"):
        source, target = tokenizer(each["question"])["input_ids"], tokenizer(each["answer"])["input_ids"]
        assert source[-1] == target[-1] == tokenizer.eos_token_id
        written = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=written).logits[0]
        learned = slice(1 if target[0] == tokenizer.bos_token_id else 0, None)
        nats += functional.cross_entropy(logits[learned], torch.tensor(target[learned]), reduction="sum").item()
        tokens += len(target[learned])
        size += len(each["answer"].encode())
    assert rows == [] and found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
def test_an_encoder_decoder_answers_as_it_would_to_each_prompt_alone(recipe: Path, kind: str) -> None:
    """Also where positions are absolute, so that padding on the left would move them."""
    save_foreign(kind, Path("foreign"))
    _, rows = run("model=foreign", "metrics=[length]", "prompt='{question}'")
    model, tokenizer = load_model("foreign").eval(), AutoTokenizer.from_pretrained("foreign")
    for row, each in zip(rows, corpus.rows("runs/tasks", "test"), strict=True):
        ids = torch.tensor([tokenizer(each["question"])["input_ids"]])
        output = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert row["prediction"] == tokenizer.decode(output[0], skip_special_tokens=True).strip()
    assert len({row["prediction"] for row in rows}) > 1  # else padding could not change them


def test_a_classifier_without_an_end_of_text_is_evaluated(recipe: Path) -> None:
    save_foreign("bert", Path("foreign"))
    found, rows = run("model=foreign", "task=classify", "prompt='{question}'", "label=topic")
    model = load_model("foreign", has_classes=True).eval()
    tokenizer = AutoTokenizer.from_pretrained("foreign")
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["prompt"], return_tensors="pt")).logits
        assert row["prediction"] == model.config.id2label[logits.argmax().item()]
    expected, predicted = [row["references"][0] for row in rows], [row["prediction"] for row in rows]
    for average in ("micro", "macro", "weighted"):
        value = sklearn.metrics.f1_score(expected, predicted, average=average, zero_division=0)
        assert found[f"f1_{average}"] == pytest.approx(value)
        assert found[f"f1_{average}_low"] <= value <= found[f"f1_{average}_high"]
    assert found["f1"] == found["f1_macro"]
    labels = found["confusion"]["labels"]
    assert (
        found["confusion"]["counts"] == sklearn.metrics.confusion_matrix(expected, predicted, labels=labels).tolist()
    )
    each_f1 = sklearn.metrics.f1_score(expected, predicted, average=None, labels=labels, zero_division=0)
    assert found["f1_per_label"] == pytest.approx(dict(zip(labels, each_f1, strict=True)))


def test_a_tokenizer_is_taken_as_its_use_allows(tmp_path: Path) -> None:
    for kind, use in (("gpt2", "train"), ("bert", "train"), ("bert", "generate"), ("t5", "train")):
        save_foreign(kind, tmp_path / kind)
        with pytest.raises(HfkitError):
            load_tokenizer(str(tmp_path / kind), use)  # type: ignore[arg-type]
    assert load_tokenizer(str(tmp_path / "gpt2"), "generate").pad_token == "<end>"
    assert load_tokenizer(str(tmp_path / "bert"), "classify").pad_token == "[PAD]"


def test_an_adapter_keeps_the_names_of_its_classes(recipe: Path) -> None:
    """The base has two classes without names; the data three."""
    lines = [json.loads(line) for line in Path("tasks.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["topic"] = f"topic {number % 3}"
    Path("tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["lora={r: 4}", "merge=true", "train.save_strategy=no", "--rebuild"]
    assert cli.main(["run", "recipes/classify.yaml", *options]) == 0
    classes = ["task=classify", "prompt='{question}'", "label=topic", "metrics=[accuracy]"]
    for folder in ("runs/classify", "runs/classify/merged"):
        found, rows = run(f"model={folder}", *classes, "--rebuild")
        assert {row["prediction"] for row in rows} <= {"topic 0", "topic 1", "topic 2"}


# ---- scores and the report


def test_words_are_cut_as_the_recipe_says(recipe: Path) -> None:
    found, rows = run("metrics=[bleu, rouge, length]", "tokenize=char")
    predictions, references = [row["prediction"] for row in rows], [[row["references"][0] for row in rows]]
    bleu = sacrebleu.BLEU(effective_order=True, tokenize="char")
    assert found["bleu"] == pytest.approx(bleu.corpus_score(predictions, references).score)
    assert found["length_words"] == pytest.approx(np.mean([len(text.replace(" ", "")) for text in predictions]))
    assert all("tok:char" in signature for signature in found["signatures"])


def test_the_card_tells_what_a_person_wants_to_know(recipe: Path) -> None:
    found, rows = run("against=runs/pretrain", "metrics=[chrf, exact_match]")
    card = Path("runs/evaluate/README.md").read_text(encoding="utf-8")
    assert f"The model `runs/pretrain` on {len(rows)} rows of the test split of `runs/tasks`" in card
    row = next(line for line in card.splitlines() if line.startswith("| `chrf`"))
    shown = [f"{found['chrf']:.4g}", f"{found['chrf_low']:.4g} to {found['chrf_high']:.4g}", "+0", "0 to 0", "1"]
    assert [text.strip() for text in row.strip("|").split("|")[1:]] == shown
    best = max(rows, key=lambda each: each["scores"]["chrf"])
    for heading in ("## Results", "## Answers", "### Best", "### Worst", "### Random", "## How it was scored"):
        assert card.count(f"{heading}\n") == 1
    assert (
        f"[answer]\n{best['prediction']}\n[expected]\n{best['references'][0]}\n"
        in card.split("### Best")[1].split("### Worst")[0]
    )
    assert found["signatures"][0] in card


def test_no_text_breaks_the_card() -> None:
    nasty = "a | b\n```\n# no heading\n<b>`x`</b> $y$ ````` *z* [l](m)"
    block = fenced(nasty, "text")
    fence = block.split("text")[0]
    assert block.count(fence) == 2 and block == f"{fence}text\n{nasty}\n{fence}"
    assert "\n" not in cell(nasty) and "\\|" in cell(nasty) and "\\<b\\>" in cell(nasty)
    results: dict[str, Any] = {
        "rows": 1,
        "cut": 1,
        "window": 9,
        "exact_match": 0.0,
        "exact_match_low": 0.0,
        "exact_match_high": 0.0,
        "signatures": ["s"],
    }
    results |= {
        "f1_per_label": {nasty: 0.5, "c": 1.0},
        "confusion": {"labels": [nasty, "c"], "counts": [[1, 2], [0, 4]]},
    }
    recipe = {"split": "test", "task": "generate", "benchmarks": None, "limit": None}
    content = {"metrics": results, "recipe": recipe, "inputs": {"model": {"place": "m"}, "data": {"place": "d"}}}
    rows = [{"prompt": nasty * 9, "prediction": nasty, "references": [nasty], "scores": {"exact_match": 0.0}}]
    text = evaluation.card(content, rows)
    outside, fence = [], ""
    for line in text.splitlines():
        if line.startswith("```") and (not fence or line == fence):
            fence = "" if fence else line.removesuffix("text")
        elif not fence:
            outside.append(line)
    assert not fence and not any(line.startswith("# ") or "<b>" in line for line in outside)
    assert {line.count("|") - line.count("\\|") for line in outside if line.startswith("|")} == {4}


def test_the_worst_classes_and_what_they_are_taken_for_come_first() -> None:
    labels = [f"c{number}" for number in range(30)]
    counts = np.diag([9] * 30)
    counts[3] = 0
    counts[3, 4], counts[5, 6] = 9, 2
    results = {"f1_per_label": {label: 0.0 if label == "c3" else 0.5 for label in labels}}
    results |= {"confusion": {"labels": labels, "counts": counts.tolist()}, "rows": 270, "signatures": []}
    assert evaluation.worst_classes(results)[0] == ("c3", 0.0, 9) and len(evaluation.worst_classes(results)) == 10
    assert evaluation.confusions(results) == [("c3", "c4", 9), ("c5", "c6", 2)]
    assert "c3 taken for c4" in evaluation.screen(results, [])


def test_the_answer_of_a_chat_ends_with_its_turn(recipe: Path) -> None:
    """What the model was taught to write ends with <|im_end|> and a new line, not with EOS."""
    lines = [json.loads(line) for line in Path("tasks.jsonl").read_text().splitlines()]
    for line in lines:
        line["messages"][0]["content"] = line["answer"]
    Path("tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert cli.main(["run", "recipes/tasks.yaml", "--rebuild"]) == 0
    train = ["task=chat", "prompt=null", "lora=null", "train.save_strategy=no", "generation.max_new_tokens=8"]
    train += ["train.max_steps=60", "train.learning_rate=1e-2", "packing=false"]
    assert cli.main(["run", "recipes/finetune.yaml", *train]) == 0
    found, rows = run("model=runs/finetune", "task=chat", "prompt=null", "generation.max_new_tokens=8")
    assert [row["references"] for row in rows] == [[each["answer"]] for each in corpus.rows("runs/tasks", "test")]
    tokenizer = AutoTokenizer.from_pretrained("runs/finetune")
    lengths = [len(tokenizer(row["prediction"])["input_ids"]) for row in rows]
    assert found["length_words"] == 1 and max(lengths) < 6, rows  # else they will resume for 8 tokens
    assert all("user" in row["prompt"] and "assistant" in row["prompt"] for row in rows)


# ---- benchmarks


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {file}}}
test_split: train
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1.0}}
"""
CHOICE = (
    TASK
    + """\
output_type: multiple_choice
doc_to_choice: ["cat", "dog", "small river"]
doc_to_target: "{{{{number}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
)
WRITE = (
    TASK
    + """\
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
)


@pytest.fixture
def tasks(recipe: Path) -> Path:
    """Two tasks in the format of lm-evaluation-harness, on rows that are there."""
    random.seed(0)
    rows = [{"question": random.choice(WORDS), "number": number % 3, "answer": "cat"} for number in range(12)]
    (recipe / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (recipe / "benchmarks").mkdir()
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (recipe / f"benchmarks/{name}.yaml").write_text(text.format(name=f"toy_{name}", file=recipe / "rows.jsonl"))
    return recipe


def test_benchmarks_run_on_the_loaded_model(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    loaded = []
    monkeypatch.setattr("hfkit.model.loading.load_model", lambda *args, **others: loaded.append(args) or model)
    model = load_model("runs/pretrain")
    found, rows = run("data=null", "benchmarks=[benchmarks]", "against=runs/pretrain")
    assert len(loaded) == 2 and rows == [] and found["rows"] == 0
    tokenizer, right = AutoTokenizer.from_pretrained("runs/pretrain"), []
    for line in map(json.loads, Path("rows.jsonl").read_text().splitlines()):
        sums = []
        for choice in ("cat", "dog", "small river"):
            ids = tokenizer(f"{line['question']} {choice}")["input_ids"]
            context = len(tokenizer(line["question"])["input_ids"])
            with torch.no_grad():
                logits = model.eval()(torch.tensor([ids])).logits[0, context - 1 : -1].log_softmax(-1)
            sums.append(sum(logits[place, token].item() for place, token in enumerate(ids[context:])))
        right.append(int(np.argmax(sums)) == line["number"])
    assert found["toy_choice/acc"] == pytest.approx(np.mean(right))
    half = 1.96 * np.std(right, ddof=1) / math.sqrt(12)
    assert found["toy_choice/acc_high"] == pytest.approx(np.mean(right) + half, abs=1e-4)
    assert found["toy_choice/acc_difference"] == 0 and found["toy_choice/acc_p"] == 1
    assert 0 <= found["toy_write/exact_match"] <= 1
    card = Path("runs/evaluate/README.md").read_text(encoding="utf-8")
    assert "| `toy_choice/acc` |" in card and "lm-eval|task:toy_write|version:1.0|fewshot:0|lm_eval-" in card

    (tasks / "benchmarks/choice.yaml").unlink()  # the folder is an input like any other
    assert cli.main(["run", RECIPE, "data=null", "benchmarks=[benchmarks]", "against=runs/pretrain"]) == 2


def test_benchmarks_that_are_not_there_are_told(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    assert cli.main(["run", RECIPE, "benchmarks=[hellaswg, runs]"]) == 2
    told = capsys.readouterr().err
    assert "benchmarks.0" in told and 'did you mean "hellaswag"?' in told
    assert "benchmarks.1" in told and "runs: no YAML file in this folder describes a task" in told


def test_without_the_harness_the_command_that_installs_it_is_told(
    tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["run", RECIPE, "benchmarks=[benchmarks]"]) == 2
    told = capsys.readouterr().err
    assert "benchmarks" in told and 'which is not installed; pip install "hfkit[lm-eval]"' in told


# ---- bad input


CLASSIFY = ["task=classify", "prompt='{question}'"]


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **others: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("hfkit.model.loading.load_model", load)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["metrics=[rouge, acuracy]"], ["metrics.1", 'did you mean "accuracy"?']),
        (["metrics=[rouge, f1]"], ["metrics.1", "f1 does not fit `task: generate`; those that do: rouge, bleu"]),
        (
            ["task=text", "data=data.yaml", "metrics=[rouge]"],
            ["rouge does not fit `task: text`; those that do: bits_per_byte, perplexity"],
        ),
        (["completion='{ansr}'"], ["completion", 'did you mean "answer"?']),
        (["prompt='{question'"], ["prompt", "is not a template"]),
        (["prompt='{messages}'"], ["prompt", "the column 'messages' of the data is a chat; name another"]),
        (["task=chat", "messages=question"], ["messages", "the column 'question' of the data is no chat"]),
        (["task=text"], ["data", "the data has no column 'text'"]),
        (["split=valid"], ["split", 'did you mean "validation"?']),
        (["model=runs/nothere"], ["model", "no such folder"]),
        (["against=runs/tasks"], ["against", "is a data set, but against must be a model"]),
        (["generation.max_tokens=3"], ["generation.max_tokens", "unknown key"]),
        (["generation.max_new_tokens=32"], ["max_new_tokens", "room for a prompt in the window of 32, got 32"]),
        ([f"prompt='{'the cat ' * 30}{{question}}'"], ["prompt", "fills the window: ", "there is room for 28"]),
        (
            ["task=chat", "generation.max_new_tokens=20"],
            ["max_new_tokens: ", "and no prompt fits into the rest; lower it"],
        ),
        (["tokenize=chr"], ["tokenize", "'chr' is not known, did you mean \"char\"?"]),
        (["tokenize=turkish"], ["tokenize", "'turkish' is not known, known: "]),
        (["tokenize=ascii"], ["tokenize", "not for bleu; use 'auto' or '13a'"]),
        ([*CLASSIFY, "label=topic"], ["model", "has no head of classes, it is HfkitForCausalLM; fine-tune it with"]),
        (["model=bert"], ["model", "bert: is a classifier and writes no texts; choose `task: classify`"]),
        (["task=text", "data=data.yaml", "model=t5"], ["model", "for which a text by itself has no likelihood"]),
        (["model=bert", *CLASSIFY, "label=answer"], ["model", "bert: has no class '", "of row 1 of the test split"]),
        (["data=null"], ["data", "is missing; name the rows to evaluate on, or `benchmarks:`"]),
        (["data=null", "metrics=[rouge]"], ["metrics", "have no rows to be taken on; name `data:`"]),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(
    recipe: Path, capsys: pytest.CaptureFixture[str], nothing_loads: None, options: list[str], messages: list[str]
) -> None:
    for kind in ("bert", "t5"):
        if any(kind in option for option in options):
            save_foreign(kind, Path(kind))
    assert cli.main(["run", RECIPE, *options]) == 2
    told = capsys.readouterr().err
    assert all(message in told for message in messages), told
    assert not Path("runs/evaluate").exists() and "Traceback" not in told


def test_rows_without_an_answer_are_told(
    recipe: Path, capsys: pytest.CaptureFixture[str], nothing_loads: None
) -> None:
    """Where the data is there already by `check`, else before the first model is loaded. By finetune too, which would
    come upon them in the middle of its training."""
    chats = [json.loads(line) for line in Path("tasks.jsonl").read_text().splitlines()]
    for line in chats:
        line["messages"] = line["messages"][:1]
    Path("tasks.jsonl").write_text("\n".join(map(json.dumps, chats)))
    assert cli.main(["run", "recipes/tasks.yaml", "--rebuild"]) == 0
    Path("rows").mkdir()
    for split in corpus.SPLITS:
        table = pyarrow.parquet.read_table(f"runs/tasks/{split}.parquet").drop_columns("answer")
        answers = pyarrow.array([["", "x"] if number else [" "] for number in range(len(table))])
        pyarrow.parquet.write_table(table.append_column("answer", answers), f"rows/{split}.parquet")
    for path, split in ((RECIPE, "test"), ("recipes/finetune.yaml", "validation")):
        for options, message in (
            (["task=chat"], f"messages: row 1 of the {split} split has no answer, as in "),
            (["data=rows"], f"completion: row 1 of the {split} split has no answer; leave such rows out of the data"),
        ):
            capsys.readouterr()
            assert cli.main(["run", path, *options]) == 2
            assert message in capsys.readouterr().err.replace("=' {answer}'", "").replace('=" {answer}"', "")


def test_a_model_that_its_recipe_has_not_finished_is_not_looked_at(recipe: Path) -> None:
    """Else an evaluation could not go on from where the training of its model was stopped."""
    Path("runs/finetune").mkdir()
    graph.resolve(Path(RECIPE), ["model=finetune.yaml"])
    with pytest.raises(HfkitError, match="runs/finetune: no model can be loaded"):
        graph.resolve(Path(RECIPE), ["model=runs/finetune"])


def test_an_adapter_must_fit_its_base(recipe: Path, capsys: pytest.CaptureFixture[str], nothing_loads: None) -> None:
    """By the digest of the base where hfkit made the adapter, else by the sizes of the weights."""
    import peft

    save_foreign("llama", Path("base"))
    model = transformers.AutoModelForCausalLM.from_pretrained("base")
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained("adapter")
    AutoTokenizer.from_pretrained("base").save_pretrained("adapter")
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 64}, vocab_size=320)
    transformers.LlamaForCausalLM(config).save_pretrained("wider")
    described = manifest.read_json(Path("adapter"), "adapter_config.json") or {}
    for base, message in (
        ("wider", "adapter: does not fit its base model wider: model.layers.0.self_attn."),
        ("./gone", "adapter: its base model ./gone is not there; put it back"),
    ):
        manifest.write_json(Path("adapter/adapter_config.json"), {**described, "base_model_name_or_path": base})
        assert cli.main(["run", RECIPE, "model=adapter"]) == 2
        assert message in capsys.readouterr().err
    made = {"stage": "finetune", "fingerprint": "", "inputs": {"model": {"digest": "0" * 64}}}
    manifest.write_json(Path("adapter/hfkit.json"), made)
    manifest.write_json(Path("adapter/adapter_config.json"), {**described, "base_model_name_or_path": "base"})
    assert cli.main(["run", RECIPE, "model=adapter"]) == 2
    assert "adapter: was trained on another base model than base is now" in capsys.readouterr().err


def test_finetune_tells_where_there_is_no_room(
    recipe: Path, capsys: pytest.CaptureFixture[str], nothing_loads: None
) -> None:
    for option, message in (
        ("generation.max_new_tokens=32", "must leave room for a prompt in the window of 32, got 32"),
        (f"prompt='{'the cat ' * 30}{{question}}'", "fills the window: "),
        ("task=chat", "the answer may have 16 of 32 tokens, and no prompt fits into the rest"),
    ):
        assert cli.main(["run", "recipes/finetune.yaml", option]) == 2
        assert message in capsys.readouterr().err
