"""Every way to start a recipe, and that Python is otherwise left as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRETRAIN = "recipes/pretrain.yaml"
TWO_STEPS = ["train.max_steps=2", "train.save_strategy=no"]


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def is_finished(folder: str = "runs/pretrain") -> bool:
    return (Path(folder) / "hfkit.json").exists() and (Path(folder) / "model.safetensors").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["accelerate", "launch", PRETRAIN],
        [
            "accelerate",
            "launch",
            "--config_file",
            str(ROOT / "accelerate_configs/cpu.yaml"),
            "-m",
            "hfkit",
            "run",
            PRETRAIN,
        ],
        ["hfkit", "run", PRETRAIN],
        [sys.executable, PRETRAIN],
    ],
    ids=["accelerate launch x.yaml", "accelerate launch -m hfkit", "hfkit run", "python x.yaml"],
)
def test_every_way_to_start_trains_the_model(ready: Path, command: list[str]) -> None:
    done = start(*command, *TWO_STEPS)
    assert done.returncode == 0, done.stderr
    assert is_finished() and "bits per byte" in done.stdout
    assert json.loads(Path("runs/pretrain/hfkit.json").read_text())["recipe"]["train"]["max_steps"] == 2


def test_two_machines_train_one_model(world: Path) -> None:
    """From nothing, by a launcher on each: one process prepares and tokenizes, both train, workers are spawned."""
    workers = ["train.dataloader_num_workers=1", "train.dataloader_multiprocessing_context=spawn"]
    config = [f"--config_file={ROOT / 'accelerate_configs/multi_node.yaml'}", "--num_processes=2"]
    here = [
        "--main_process_ip=127.0.0.1",
        f"--main_process_port={os.environ['PET_MASTER_PORT']}",
        "--mixed_precision=no",
    ]
    processes = [
        subprocess.Popen(
            ["accelerate", "launch", *config, *here, f"--machine_rank={rank}", PRETRAIN, *TWO_STEPS, *workers]
            + ["optimizer=muon", "train.use_cpu=true"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert is_finished() and outputs[0][0].count("documents given back exactly") == 1
    assert "2 steps of 256 tokens" in outputs[0][0]  # 2 ranks * 4 rows * 32 tokens
    assert not outputs[1][0]


def test_a_mistake_under_two_ranks_is_told_once(world: Path) -> None:
    done = start("torchrun", "--nproc_per_node", "2", PRETRAIN, "train.max_stesp=3")
    assert done.returncode != 0
    assert done.stderr.count('unknown key, did you mean "max_steps"?') == 1


def test_a_failure_of_the_main_process_ends_the_others(world: Path) -> None:
    (world / "texts.txt").write_text("", encoding="utf-8")
    done = start("torchrun", "--nproc_per_node", "2", PRETRAIN)
    assert done.returncode != 0 and done.stderr.count("give more data") == 1


@pytest.mark.parametrize("text", ["task: 1\n", "- 1\n", "", "print('hello')\n"])
def test_a_yaml_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    """Python would take `task: 1` for an annotation, and end with 0 having done nothing."""
    (tmp_path / "notes.yaml").write_text(text, encoding="utf-8")
    done = start(sys.executable, str(tmp_path / "notes.yaml"))
    assert done.returncode == 2
    assert "notes.yaml: not a recipe" in done.stderr and "Traceback" not in done.stderr


def test_an_absent_recipe_is_refused(tmp_path: Path) -> None:
    done = start(sys.executable, str(tmp_path / "nothere.yaml"))
    assert done.returncode == 2 and "there is no such recipe" in done.stderr


STATE = """
import json, sys
print(json.dumps({
    "modules": sorted(sys.modules), "path": sys.path, "argv": sys.argv, "main": sorted(vars(sys.modules["__main__"])),
    "hooks": [getattr(hook, "__qualname__", "") for hook in sys.path_hooks], "finders": list(map(str, sys.meta_path)),
}))
"""


def test_other_software_is_untouched_by_the_hook(tmp_path: Path) -> None:
    """Python started with the hook and without differs in the hook alone."""
    (tmp_path / "script.py").write_text(STATE, encoding="utf-8")
    without = json.loads(start(sys.executable, "-I", "-S", str(tmp_path / "script.py"), "x").stdout)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hfkit.recipe_hook; del sys.path[0]\n"
    (tmp_path / "script.py").write_text(code + STATE, encoding="utf-8")
    with_hook = json.loads(start(sys.executable, "-I", "-S", str(tmp_path / "script.py"), "x").stdout)

    added = set(with_hook.pop("modules")) - set(without.pop("modules"))
    assert {name for name in added if name.split(".")[0] not in sys.stdlib_module_names} == {
        "hfkit",
        "hfkit.recipe_hook",
        "hfkit.version",
    }
    assert with_hook.pop("hooks") == [*without.pop("hooks"), "RecipeLoader"]
    with_hook["main"].remove("hfkit")
    assert with_hook == without


def test_the_hook_answers_for_recipes_only() -> None:
    from hfkit.recipe_hook import RecipeLoader

    assert RecipeLoader in sys.path_hooks
    for path in ("/usr/lib/python3", "x.zip", "x.py", "x.yaml.d", ""):
        with pytest.raises(ImportError):
            RecipeLoader(path)
    assert RecipeLoader("x.yaml").find_spec("os") is None


def test_the_pth_line_is_silent_where_hfkit_is_gone() -> None:
    line = (ROOT / "hfkit_recipes.pth").read_text(encoding="utf-8").strip()
    assert line.startswith("import ") and "\n" not in line
    done = start(sys.executable, "-I", "-S", "-c", line)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "code", ["import hfkit", "from hfkit.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"]
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code: str) -> None:
    done = start(sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')")
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()}
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "pydantic", "yaml", "pyarrow"}


def test_help_names_the_commands() -> None:
    done = start("hfkit", "--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("run", "plan", "schema", "accelerate launch"))


def test_data_is_prepared_without_the_libraries_of_models(world: Path) -> None:
    heavy = "{'torch', 'transformers'} & {*sys.modules}"
    code = f"import sys; from hfkit import cli; cli.main(sys.argv[1:]); assert not {heavy}"
    done = subprocess.run([sys.executable, "-c", code, "run", "recipes/data.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("runs/data/README.md").is_file()
