"""Cards that the Hub understands, and the lineage of a folder."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard

from hfkit import cli
from hfkit.artifacts import manifest
from hfkit.reports import card


@pytest.fixture
def trained(ready: Path) -> Path:
    assert cli.main(["run", "recipes/pretrain.yaml", "train.max_steps=2"]) == 0
    return ready


def test_the_card_of_a_model_says_how_good_it_is_and_what_of(trained: Path) -> None:
    found = ModelCard.load("runs/pretrain/README.md")
    assert (found.data.library_name, found.data.pipeline_tag) == ("transformers", "text-generation")
    assert (
        "base_model" not in found.data.to_dict() and "datasets" not in found.data.to_dict()
    )  # they are not on the Hub
    metrics = json.loads(Path("runs/pretrain/metrics.json").read_text(encoding="utf-8"))
    scores = {result.metric_type: result for result in found.data.eval_results}
    assert set(scores) == {"bits_per_byte", "perplexity"}
    for name, result in scores.items():
        assert result.metric_value == metrics[name] and result.dataset_split == "test"
        assert result.metric_args["low"] == metrics[f"{name}_low"] < metrics[name] < metrics[f"{name}_high"]
    text = found.content
    data = json.loads(Path("runs/data/metrics.json").read_text(encoding="utf-8"))
    assert f"{data['rows']:,} rows kept; left out: " in text and "| train |" in text
    assert "![Loss over the steps](loss.png)" in text and "## Use and limits" in text
    for heading in ("Results", "Data", "Making", "Lineage"):
        assert f"## {heading}\n" in text
    # The recipe in it makes the same thing.
    recipe = re.search(r"```yaml\n(stage: pretrain\n.*?)```", text, re.DOTALL)
    assert recipe
    Path("again.yaml").write_text(recipe[1], encoding="utf-8")
    assert cli.main(["run", "again.yaml", "output_dir=runs/again"]) == 0
    one, other = (Path(f"runs/{name}/model.safetensors").read_bytes() for name in ("pretrain", "again"))
    assert one == other


def test_the_card_of_data_counts_what_was_left_out(world: Path) -> None:
    texts = Path("texts.txt")
    lines = texts.read_text(encoding="utf-8").splitlines()
    texts.write_text("\n".join([*lines, *lines[:7], " ", "x"]), encoding="utf-8")
    assert cli.main(["run", "recipes/data.yaml", "min_characters=2"]) == 0
    found = DatasetCard.load("runs/data/README.md")
    assert found.data.size_categories == "n<1K"
    files = found.data.configs[0]["data_files"]
    assert [each["path"] for each in files] == ["train.parquet", "validation.parquet", "test.parquet"]
    assert "400 rows kept; left out: 7 duplicate, 1 empty, 1 too short." in found.content


def test_planned_stands_beside_actual(trained: Path) -> None:
    made = manifest.read_json(Path("runs/pretrain")) or {}
    usage = {
        "peak_memory_bytes": 800_000_000,
        "energy_kwh": 0.002,
        "hardware": {"processor": "a Z80", "cores": 1, "memory_bytes": 2**31},
    }
    planned = {"seconds": 12.0, "peak_memory_bytes": 900_000_000}
    text = card.text(Path("runs/pretrain"), {**made, "usage": usage, "planned": planned}, "lab/tiny")
    assert "|  | actual | planned |" in text and "| peak memory, MB | 800 | 900 |" in text
    assert (
        "| energy, kWh | 0.002 |  |" in text
        and ", on a Z80 with 1 cores, 2 GiB of memory." in text
        and '"lab/tiny"' in text
    )
    text = card.text(Path("runs/pretrain"), {**made, "usage": usage, "planned": None}, "lab/tiny")
    assert "|  | actual |\n" in text


def lineage(capsys: pytest.CaptureFixture[str], folder: str = "runs/pretrain") -> list[str]:
    capsys.readouterr()
    assert cli.main(["lineage", folder]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_lineage_goes_back_to_the_raw_data(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digests = {name: (manifest.read_json(Path("runs") / name) or {})["digest"][:12] for name in ("data", "tokenizer")}
    raw = manifest.sha256_of(Path("texts.txt"))[:12]
    root, *rest = lineage(capsys)
    assert root.startswith("runs/pretrain  pretrain  sha256 ") and root.endswith("  ok")
    assert rest == [
        f"├─ data: runs/data  prepare  sha256 {digests['data']}  ok",
        f"│  └─ texts.txt  sha256 {raw}  ok",
        f"└─ tokenizer: runs/tokenizer  tokenizer  sha256 {digests['tokenizer']}  ok",
        f"   └─ data: runs/data  prepare  sha256 {digests['data']}  ok  (as above)",
    ]
    tree = "\n".join(rest).replace("  ok", "")
    assert tree in Path("runs/pretrain/README.md").read_text(encoding="utf-8")


def test_the_lineage_says_what_has_changed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts.txt").write_text("other texts\n" * 3, encoding="utf-8")
    assert "CHANGED: its sha256 is " in lineage(capsys)[2]
    (Path("runs/tokenizer") / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "CHANGED: tokenizer.json differs from its hfkit.json" in lineage(capsys)[3]
    shutil.rmtree("runs/data")
    found = lineage(capsys)
    assert found[1].endswith("CHANGED: it is gone") and "texts.txt" in found[2]  # it is known all the same
    for folder, message in (("runs/none", "holds no hfkit.json"), ("runs", "holds no hfkit.json")):
        assert cli.main(["lineage", folder]) == 2
        assert message in capsys.readouterr().err
