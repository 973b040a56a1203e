"""What the design promises of the code itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hfkit"

# Each layer may import those after it; within a layer, see below.
LAYERS = [
    {"cli", "__main__"},
    {"runner", "plan", "schema"},
    {"states"},
    {"graph"},
    {"stages"},
    {"training", "distillation", "compression", "evaluation", "data", "hub", "planning", "serving"},
    {"model"},
    {"recipe"},
    {"recipe_yaml", "manifest", "ranks", "bars", "stopping", "usage"},
    {"errors", "privacy", "cores"},
]


def layer(name: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if name in names)


def imports_of(path: Path) -> Iterator[str]:
    """The hfkit modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("hfkit."))
        elif isinstance(node, ast.ImportFrom) and node.module == "hfkit":
            yield from (f"hfkit.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hfkit."):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for imported in imports_of(path):
        other = imported.split(".")[1]
        if own == "recipe_hook" or other == "__version__":
            continue
        if own == "stages":
            assert other != "stages", f"{path.name} imports another stage"
        if own != other:
            assert layer(own) <= layer(other), f"{path} imports {imported}, which lies above it"


def test_the_model_loads_alone() -> None:
    for path in (PACKAGE / "model").glob("*_hfkit.py"):
        assert not list(imports_of(path)), "a pushed model must load where hfkit is not installed"


def test_a_stage_has_its_parts() -> None:
    from hfkit import graph

    for name in graph.stage_names():
        stage = graph.load_stage(name)
        assert stage.MAKES in ("data set", "tokenizer", "model", "evaluation") and isinstance(stage.DISTRIBUTED, bool)
        assert all(
            callable(getattr(stage, part)) for part in ("Recipe", "check", "external", "describe", "work", "run")
        )
        assert stage.Recipe.model_fields["stage"].annotation.__args__ == (name,)


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.distributed_type.value == written["distributed_type"]
    assert config.num_processes == written["num_processes"] and config.use_cpu == (path.stem == "cpu")
    for section in ("fsdp_config", "deepspeed_config"):
        assert getattr(config, section) == written.get(section, {})
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_files_and_functions_stay_readable() -> None:
    for path in modules():
        text = path.read_text(encoding="utf-8")
        limit = 600 if path.parent.name == "model" else 320
        assert len(text.splitlines()) <= limit, f"{path} is too long to read in one go"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 80, f"{path}: {node.name} has {length} lines"
