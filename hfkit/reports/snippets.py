"""The lines of a card that use what a folder holds. They run as they stand, where hfkit is not installed."""

import json
from pathlib import Path

from hfkit.artifacts.kinds import KINDS
from hfkit.artifacts.manifest import ADAPTER, Json, Manifest, is_adapter, read_json
from hfkit.data import corpus
from hfkit.data.tasks import task_in

WORDS = 4  # of a text to go on with


def snippet(folder: Path, content: Manifest, path: str) -> str:
    """
    Args:
        folder: where the files lie.
        content: what its manifest says, or will say.
        path: what the folder is called in the lines: a path, or an id on the Hub.
    """
    text, name = json.dumps(beginning(content), ensure_ascii=False), json.dumps(path)
    if template := KINDS[content["makes"]].snippet:
        columns = ", ".join(content["recipe"].get("columns", {"text": ""}))
        file = f"{path}/{'report' if content['stage'] == 'compare' else 'metrics'}.json"
        return template.format(name=name, text=text, columns=columns, file=file)
    config = read_json(folder, "config.json") or {}
    if task_in(content["recipe"]).has_classes:
        if is_adapter(folder):
            return _adapted_classifier(folder, name, text)
        opened = f'from transformers import pipeline\n\nclassify = pipeline("text-classification", {name}, '
        return f"{opened}trust_remote_code=True)\n{_classified(config, text)}"
    if config.get("is_encoder_decoder"):
        return _sequence_to_sequence(name, text)
    is_chat = task_in(content["recipe"]).is_chat
    asked = f'[{{"role": "user", "content": {text}}}]' if is_chat else text
    answer = '["generated_text"][-1]["content"]' if is_chat else '["generated_text"]'
    if is_chat and is_adapter(folder):  # transformers takes the generation_config of its base
        return (
            "from transformers import GenerationConfig, pipeline\n\n"
            f"config = GenerationConfig.from_pretrained({name}, max_new_tokens=40)  # and the end of a turn\n"
            f'generate = pipeline("text-generation", {name}, trust_remote_code=True)\n'
            f"print(generate({asked}, generation_config=config)[0]{answer})"
        )
    return (
        f'from transformers import pipeline\n\ngenerate = pipeline("text-generation", {name}, '
        f"trust_remote_code=True)\nprint(generate({asked}, max_new_tokens=40)[0]{answer})"
    )


def _adapted_classifier(folder: Path, name: str, text: str) -> str:
    """Return the lines for an adapter of a classifier. Its head is in the adapter: a pipeline would make one with
    other classes."""
    base = json.dumps((read_json(folder, ADAPTER) or {})["base_model_name_or_path"])
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline\n\n"
        f"config = AutoConfig.from_pretrained({name}, trust_remote_code=True)\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({base}, config=config, trust_remote_code=True)\n"
        f"model = PeftModel.from_pretrained(model, {name})\n"
        f'classify = pipeline("text-classification", model, tokenizer=AutoTokenizer.from_pretrained({name}))\n'
        f"{_classified(read_json(folder, 'config.json') or {}, text)}"
    )


def _classified(config: Json, text: str) -> str:
    """Return the last lines: the likeliest class, or all that reach their threshold."""
    if "thresholds" not in config:
        return f"print(classify({text}))"
    return (
        "config = classify.model.config\n"
        f"for found in classify([{text}], top_k=None)[0]:\n"
        '    if found["score"] >= config.thresholds[config.label2id[found["label"]]]:\n'
        "        print(found)"
    )


def _sequence_to_sequence(name: str, text: str) -> str:
    return (
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n\n"
        f"model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained({name}), AutoTokenizer.from_pretrained({name})\n"
        f'print(tokenizer.decode(model.generate(**tokenizer({text}, return_tensors="pt"))[0]))'
    )


def beginning(content: Manifest) -> str:
    """Return the first words of the first test text of the data that a result was made with, where they are still
    there."""
    path = content["inputs"].get("data", {}).get("place")
    if path and (Path(path) / "test.parquet").is_file():
        row = next(corpus.rows(path, "test"), {})
        texts = [value for key, value in row.items() if key != "source" and isinstance(value, str)]
        if texts and texts[0].split():
            return " ".join(texts[0].split()[:WORDS])
    return "Once upon a time"
