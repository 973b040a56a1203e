"""A project of one's own: recipes to change, a folder for data, and what to run."""

import re
import shutil
import sysconfig
from pathlib import Path

from hfkit.errors import HfkitError, did_you_mean

README = """# {name}

    accelerate launch recipes/{template}.yaml

makes everything that the recipe needs, and then what it says; run again, it resumes or is up to date. `hfkit plan
recipes/{template}.yaml` shows before what that takes. Results are in `runs/`.

The recipes learn from the Python standard library until `recipes/data.yaml` names your own text:

    sources:
      - files: data/*.txt        # .txt .md .py .jsonl .csv .parquet, also .gz and .zst
"""


def new(folder: Path, template: str) -> list[Path]:
    """Write a project: a recipe, those that it needs, their schemas, `data/`, `.gitignore` and a README.

    Args:
        template: the name of one of hfkit's own recipes.

    Returns:
        The recipes, in the order in which they were found to be needed.

    Raises:
        HfkitError: if there is no such recipe, or the folder holds something.
    """
    shipped = _shipped()
    templates = sorted(path.stem for path in shipped.glob("*.yaml"))
    if template not in templates:
        raise HfkitError(f"--template {template}: there is no such recipe, {did_you_mean(template, templates)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HfkitError(f"{folder}: is not empty; name a new folder")
    names = _needed(shipped, template)
    (folder / "recipes" / "schema").mkdir(parents=True)
    (folder / "data").mkdir()
    for name in names:
        shutil.copy(shipped / f"{name}.yaml", folder / "recipes")
        stage = re.search(r"^stage: (\w+)", (shipped / f"{name}.yaml").read_text(encoding="utf-8"), re.M)
        assert stage is not None, f"{name}.yaml names no stage"
        shutil.copy(shipped / "schema" / f"{stage[1]}.json", folder / "recipes" / "schema")
    (folder / ".gitignore").write_text("runs/\n", encoding="utf-8")
    (folder / "README.md").write_text(README.format(name=folder.resolve().name, template=template), encoding="utf-8")
    return [folder / "recipes" / f"{name}.yaml" for name in names]


def _shipped() -> Path:
    """Return the recipes that came with hfkit: beside its sources, or where a wheel puts them."""
    candidates = (
        Path(__file__).parents[2] / "recipes",
        Path(sysconfig.get_path("data")) / "share" / "hfkit" / "recipes",
    )
    folders = [path for path in candidates if (path / "pretrain.yaml").is_file()]
    if not folders:
        raise HfkitError(f"{candidates[1]}: hfkit's recipes are not there; install hfkit again")
    return folders[0]


def _needed(shipped: Path, name: str) -> list[str]:
    """Return a recipe and all that it names."""
    names = [name]
    for recipe in names:
        text = (shipped / f"{recipe}.yaml").read_text(encoding="utf-8")
        names += [other for other in re.findall(r"(?:: |- )([\w-]+)\.yaml", text) if other not in names]
    return names
