"""What the design promises of the code itself."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hfkit"

# Each layer may import those after it; within a layer, see below.
LAYERS = [
    "errors version",
    "artifacts",
    "runtime",
    "metrics",
    "privacy",
    "recipe",
    "data",
    "model",
    "inference",
    "training",
    "distillation",
    "compression",
    "evaluation",
    "reports",
    "hub",
    "serving",
    "stages",
    "engine",
    "planning",
    "cli",
    "__main__ recipe_hook",
]


def layer(name: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if name in names.split())


def imports_of(path: Path) -> Iterator[str]:
    """The hfkit modules that a file imports, anywhere in it: `data.rows.packing`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("hfkit.") for alias in node.names if alias.name.startswith("hfkit."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hfkit":
            package = ".".join((node.module or "").split(".")[1:])
            for alias in node.names:
                name = f"{package}.{alias.name}".strip(".")
                yield name if name in NAMES else package


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


NAMES = {name_of(path) for path in modules()}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    """A package imports those above it alone."""
    own = name_of(path)
    for imported in filter(None, imports_of(path)):
        assert not (own.startswith("stages.") and imported.startswith("stages.")), f"{path} imports another stage"
        first, second = own.split(".")[0], imported.split(".")[0]
        assert first == second or layer(first) > layer(second), f"{path} imports {imported}, which lies below it"


def test_no_files_import_each_other() -> None:
    """Not even by way of others, or inside a function."""
    edges = {name_of(path): set(imports_of(path)) - {name_of(path)} for path in modules()}
    waiting = dict(edges)
    while free := [name for name, needed in waiting.items() if not needed & waiting.keys()]:
        for name in free:
            del waiting[name]
    circle = {name: sorted(needed & waiting.keys()) for name, needed in waiting.items()}
    assert not circle, f"these files import each other, or what lies in such a circle: {circle}"


def test_the_model_loads_alone() -> None:
    for path in (PACKAGE / "model").glob("*_hfkit.py"):
        assert not list(imports_of(path)), "a pushed model must load where hfkit is not installed"


def test_a_stage_has_its_parts() -> None:
    from hfkit.artifacts.kinds import KINDS
    from hfkit.engine import graph

    for name in graph.stage_names():
        stage = graph.load_stage(name)
        assert stage.Recipe.MAKES in KINDS and isinstance(stage.Recipe.DISTRIBUTED, bool) and stage.Recipe.SUMMARY
        assert callable(stage.check) and callable(stage.run)
        assert stage.Recipe.model_fields["stage"].annotation.__args__ == (name,)
        costs = importlib.import_module(f"hfkit.planning.stages.{name}")
        assert callable(costs.work) and callable(costs.describe)


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
