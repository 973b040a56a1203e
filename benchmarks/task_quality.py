"""Three tasks with a model that hfkit pretrains and fine-tunes in minutes, each beside a simple baseline: who wins?

    python benchmarks/task_quality.py DATA      # writes benchmarks/results/task_quality.json

DATA is a folder that holds four data sets, as their authors publish them:

    gutenberg_books/*.txt                       English novels, which the model is pretrained on
    banking77/{train,test}.csv                  questions to a bank and their 77 intents: accuracy and macro F1
    scitldr/{train,dev,test}.jsonl              abstracts of papers and summaries in a sentence: ROUGE
    tatoeba_laser/deu-eng.{deu,eng}             1,000 sentences with their translations: BLEU and chrF

The baselines are TF-IDF and logistic regression, the abstract's first sentence, and the German sentence as it is. Both
sides are scored on the same test rows by the same metrics; a p-value below 0.05 makes a winner. No test row had a part
in choosing anything, of the models or of the baselines. The recipes are run by `hfkit run` in a folder of their own:
with `--work` it is kept, and what is up to date there is not made again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hfkit.artifacts import manifest
from hfkit.data import corpus
from hfkit.metrics import scoring

SIDES = ("model", "baseline", "difference")
STEPS = ("data", "finetune", "evaluate")
RESULT = Path(__file__).parent / "results" / "task_quality.json"
Rows = list[dict[str, Any]]

SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05}
PRETRAIN = {
    "model": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "residual_initialization": "zero",
    },
    "sequence_length": 512,
    "optimizer": "muon",
    "train": {"max_steps": 1100, "per_device_train_batch_size": 8, "learning_rate": 8e-3, **SCHEDULE}
    | {"logging_steps": 50, "eval_strategy": "steps", "eval_steps": 550, "save_steps": 550},
}

# Of each task: what is asked, how it is learned and scored, and what its numbers do not say. All weights are trained:
# LoRA was no better for tatoeba on validation, and learned more slowly in half an epoch of scitldr.
EPOCHS = {**SCHEDULE, "logging_steps": 20, "eval_strategy": "epoch", "save_strategy": "epoch"}
TASKS: dict[str, dict[str, Any]] = {
    "banking77": {
        "title": "intents of questions",
        "baseline": "TF-IDF of words and pairs of words, logistic regression",
        "task": {"task": "classify", "prompt": "{text}", "label": "intent"},
        "finetune": {"sequence_length": 128},
        "train": {"num_train_epochs": 3, "per_device_train_batch_size": 32, "learning_rate": 2e-3},
        "evaluate": {"metrics": ["accuracy", "f1"]},
        "scores": ["accuracy", "f1_macro"],
        "note": "The test rows are the official ones.",
    },
    "scitldr": {
        "title": "abstracts in a sentence",
        "baseline": "the first sentence of the abstract",
        "task": {"task": "generate", "prompt": "{abstract}\nIn short: ", "completion": "{summary}"},
        "finetune": {"sequence_length": 512},
        "train": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 2e-3},
        "evaluate": {"metrics": ["rouge"], "generation": {"max_new_tokens": 64}},
        "scores": ["rouge1", "rouge2", "rougeL"],
        "note": "The test rows are the official ones; of several summaries the nearest counts.",
    },
    "tatoeba": {
        "title": "German into English",
        "baseline": "the German sentence as it is",
        "task": {"task": "generate", "prompt": "{german}\nIn English: ", "completion": "{english}"},
        "finetune": {"sequence_length": 128},
        "train": {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-3},
        "evaluate": {"metrics": ["bleu", "chrf"], "generation": {"max_new_tokens": 48}},
        "scores": ["bleu", "chrf"],
        "note": "A model that has read English only, and 800 pairs, cannot translate, whatever the numbers say.",
    },
}


def write_recipes(data: Path, work: Path) -> None:
    """The recipes of everything, as a user would write them, into `work`; JSON is YAML too."""
    novels = {"files": str(data / "gutenberg_books" / "*.txt"), "document": "passage"}
    bank = {"columns": {"intent": "category"}}
    recipes: dict[str, dict[str, Any]] = {
        "books": {"stage": "prepare", "sources": [novels]},
        "tokenizer": {"stage": "tokenizer", "data": "books.yaml", "vocab_size": 4096},
        "pretrain": {"stage": "pretrain", "data": "books.yaml", "tokenizer": "tokenizer.yaml", **PRETRAIN},
        "banking77-data": {
            "stage": "prepare",
            "columns": {"text": "text", "intent": "label"},
            "sources": [
                {"files": str(data / "banking77" / "train.csv"), **bank},
                {"files": str(data / "banking77" / "test.csv"), **bank, "into": "test"},
            ],
            "deduplicate": ["text"],
            "split": {"validation": 0.1},
        },
        "scitldr-data": {
            "stage": "prepare",
            "columns": {"abstract": "text", "first": "text", "summary": "texts"},
            "sources": [
                {"files": f"scitldr/{name}.jsonl", "into": split}
                for name, split in (("train", "train"), ("dev", "validation"), ("test", "test"))
            ],
            "deduplicate": ["abstract"],
        },
        "tatoeba-data": {
            "stage": "prepare",
            "columns": {"german": "text", "english": "text"},
            "sources": [{"files": "tatoeba/pairs.jsonl"}],
            "deduplicate": ["german"],
            "split": {"validation": 0.1, "test": 0.1},
        },
    }
    for name, each in TASKS.items():
        inputs = {"model": "pretrain.yaml", "data": f"{name}-data.yaml"}
        learned = {**each["task"], **each["finetune"], "train": {**each["train"], **EPOCHS}}
        recipes[f"{name}-finetune"] = {"stage": "finetune", **inputs, **learned}
        inputs["model"] = f"{name}-finetune.yaml"
        recipes[f"{name}-evaluate"] = {"stage": "evaluate", **inputs, **each["task"], **each["evaluate"]}
    for name, recipe in recipes.items():
        (work / f"{name}.yaml").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def convert(data: Path, work: Path) -> None:
    """What `prepare` cannot read as it is published, as JSON lines."""
    for name in ("train", "dev", "test"):
        papers = map(json.loads, (data / "scitldr" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
        rows = [
            {"abstract": " ".join(paper["source"]), "first": paper["source"][0], "summary": paper["target"]}
            for paper in papers
        ]
        write_lines(work / "scitldr" / f"{name}.jsonl", rows)
    files = [data / "tatoeba_laser" / f"deu-eng.{code}" for code in ("deu", "eng")]
    sides = [file.read_text(encoding="utf-8").splitlines() for file in files]
    pairs = [{"german": german, "english": english} for german, english in zip(*sides, strict=True)]
    write_lines(work / "tatoeba" / "pairs.jsonl", pairs)


def write_lines(path: Path, rows: Rows) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def tfidf(splits: dict[str, Rows]) -> tuple[list[str], dict[str, Any]]:
    """The intents that logistic regression predicts for the test rows; its strength is chosen on validation."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    texts = {name: [row["text"] for row in rows] for name, rows in splits.items()}
    intents = {name: [row["intent"] for row in rows] for name, rows in splits.items()}
    train, validation = vectorizer.fit_transform(texts["train"]), vectorizer.transform(texts["validation"])
    tried = {}
    for strength in (1.0, 10.0, 100.0):
        model = LogisticRegression(C=strength, max_iter=1000).fit(train, intents["train"])
        tried[strength] = (model.score(validation, intents["validation"]), model)
    best = max(tried, key=lambda strength: tried[strength][0])
    chosen = {"C": best, "validation_accuracy": {strength: score for strength, (score, _) in tried.items()}}
    return tried[best][1].predict(vectorizer.transform(texts["test"])).tolist(), chosen


def baseline(name: str, splits: dict[str, Rows]) -> tuple[list[str], dict[str, Any]]:
    """What the baseline answers to the test rows, and what was chosen for it."""
    if name == "banking77":
        return tfidf(splits)
    column = {"scitldr": "first", "tatoeba": "german"}[name]
    return [row[column].strip() for row in splits["test"]], {}


def compare(name: str, work: Path) -> dict[str, Any]:
    """The scores of the model and of the baseline on the test rows, and what the model has over it."""
    each, runs = TASKS[name], work / "runs"
    splits = {split: list(corpus.rows(str(runs / f"{name}-data"), split)) for split in corpus.SPLITS}
    lines = (runs / f"{name}-evaluate" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    predictions = [json.loads(line) for line in lines]
    references = [row["references"] for row in predictions]
    classes = sorted({row["intent"] for row in splits["train"]}) if name == "banking77" else None
    answers, chosen = baseline(name, splits)
    metrics = each["evaluate"]["metrics"]
    simple = scoring.statistics(metrics, answers, references, classes)
    model = scoring.statistics(metrics, [row["prediction"] for row in predictions], references, classes)
    ours, theirs = scoring.scores(model, simple), scoring.scores(simple)

    scores = {}
    for key in each["scores"]:
        difference, p_value = ours[f"{key}_difference"], ours[f"{key}_p"]
        scores[key] = {
            "model": [ours[key], ours[f"{key}_low"], ours[f"{key}_high"]],
            "baseline": [theirs[key], theirs[f"{key}_low"], theirs[f"{key}_high"]],
            "difference": [difference, ours[f"{key}_difference_low"], ours[f"{key}_difference_high"]],
            "p": p_value,
            "better": "neither" if p_value >= 0.05 else "model" if difference > 0 else "baseline",
        }
    made = {step: manifest.read_json(runs / f"{name}-{step}") or {} for step in STEPS}
    return {
        "rows": {split: len(rows) for split, rows in splits.items()},
        "baseline": {"name": each["baseline"], **chosen},
        "scores": scores,
        "signatures": [statistics.signature for statistics in model.values()],
        "finetune": {**each["finetune"], **each["train"], "steps": made["finetune"]["metrics"]["steps"]},
        "generation": each["evaluate"].get("generation"),
        "seconds": {step: made[step]["seconds"] for step in STEPS},
        "verdict": verdict(scores),
        "note": each["note"],
    }


def verdict(scores: dict[str, Any]) -> str:
    """Who wins, in words."""
    won = {side: [key for key, score in scores.items() if score["better"] == side] for side in ("model", "baseline")}
    parts = [f"The {side} wins in {', '.join(keys)}." for side, keys in won.items() if keys]
    if open_ones := [key for key, score in scores.items() if score["better"] == "neither"]:
        parts.append(f"No difference is shown in {', '.join(open_ones)}.")
    return " ".join(parts)


def pretrained(runs: Path) -> dict[str, Any]:
    """What the pretrained model is and cost."""
    made = manifest.read_json(runs / "pretrain") or {}
    metrics = made["metrics"]
    return {
        **PRETRAIN,
        "parameters": metrics["parameters"],
        "tokens": metrics["steps"] * metrics["rows_a_step"] * PRETRAIN["sequence_length"],
        "test_bits_per_byte": metrics["bits_per_byte"],
        "seconds": made["seconds"],
        "hardware": made["hardware"],
        "versions": made["versions"],
    }


def show(result: dict[str, Any]) -> None:
    """A table of the scores, and in words who wins."""
    made = result["pretrain"]
    print(
        f"\n{made['parameters']:,} parameters, pretrained on {made['tokens']:,} tokens of novels, "
        f"{made['test_bits_per_byte']:.3f} bits per byte; 95 % intervals\n"
    )
    print(f"{'':10} {'':9} {'model':>24} {'baseline':>24} {'difference':>26} {'p':>7}  better")
    for name, task in result["tasks"].items():
        for key, score in task["scores"].items():
            cells = ["{:.3g} ({:.3g} to {:.3g})".format(*score[side]) for side in SIDES]
            print(
                f"{name:10} {key:9} {cells[0]:>24} {cells[1]:>24} {cells[2]:>26} {score['p']:7.3f}  {score['better']}"
            )
    for name, task in result["tasks"].items():
        print(
            f"\n{name}: {TASKS[name]['title']}, {task['rows']['test']:,} test rows. {task['verdict']} {task['note']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of the data sets")
    parser.add_argument("--work", type=Path, help="folder for recipes and their results; kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        convert(options.data, work)
        write_recipes(options.data.resolve(), work)
        for name in TASKS:  # each runs what it needs first
            subprocess.run([sys.executable, "-m", "hfkit", "run", f"{name}-evaluate.yaml"], cwd=work, check=True)
        result = {"pretrain": pretrained(work / "runs"), "tasks": {name: compare(name, work) for name in TASKS}}
    RESULT.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    show(result)


if __name__ == "__main__":
    main()
