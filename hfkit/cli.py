"""The command line. The only place that turns an error into an exit code."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from hfkit.errors import HfkitError
from hfkit.runtime import cores, signals
from hfkit.runtime.distributed import is_main, is_terminal
from hfkit.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 2 a mistake that the message explains, 3 done, but the result misses what the recipe
        accepts, 75 stopped by a signal, to be run again.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)  # overrides may stand before and after an option
    takes_overrides = options.command in ("run", "plan")
    if unknown := [item for item in rest if item.startswith("-") or not takes_overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    cores.set_openmp()  # before anything loads torch
    # Libraries speak of what they could not load and of what does not matter here; hfkit says what does.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # is for those who write the libraries' callers
    if not is_terminal():  # neither are the libraries' bars for a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers follows it
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        with signals.handled():
            _do(options, [*options.overrides, *rest] if takes_overrides else [])
    except HfkitError as error:
        return _fail(error.problems, error.exit_code)
    except (signals.Stopped, KeyboardInterrupt) as error:
        return _fail([f"stopped by {str(error) or 'SIGINT'}; rerun the same command to resume"], signals.EXIT_CODE)
    except BrokenPipeError:  # whoever reads the output has enough of it, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or else Python complains at its end
        return 141  # as a shell says it: 128 + SIGPIPE
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        return _fail([f"{error.filename or 'disk'}: {error.strerror}; make room or choose another output_dir=..."], 2)
    return 0


def _do(options: argparse.Namespace, overrides: list[str]) -> None:
    """Run the command itself. What it needs is imported here: `hfkit --help` answers at once."""
    if options.command == "run":
        from hfkit.engine import runner

        runner.run(options.recipe, overrides, rebuild=options.rebuild, fresh=options.fresh, force=options.force)
    elif options.command == "plan":
        from hfkit.planning.plan import plan

        plan(options.recipe, overrides, on=options.on, config=options.config)
    elif options.command == "push":
        from hfkit.hub.push import push

        print(push(options.folder, options.repo, options.private, options.revision))
    elif options.command == "serve":
        from hfkit.engine import runner
        from hfkit.recipe.yaml_source import Source

        names = ("host", "port", "open", "tokens", "slots", "threads", "output_dir")
        keys = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        runner.run(Source(Path("serve"), {"stage": "serve", "model": options.model, **keys}))
    elif options.command == "chat":
        from hfkit.serving.terminal import chat

        chat(options.model, options.temperature, options.max_tokens, options.seed)
    elif options.command == "log":
        from hfkit.serving.export import export

        export(options.folder, options.since, sys.stdout)
    elif options.command == "lineage":
        from hfkit.artifacts import lineage

        print(lineage.of(options.folder))
    elif options.command == "new":
        from hfkit.engine.new import new

        recipes = new(options.folder, options.template)
        print(f"wrote {', '.join(map(str, reversed(recipes)))}")
        print(f"next: cd {options.folder} && accelerate launch recipes/{options.template}.yaml")
    else:
        from hfkit.engine import schema

        schema.write(options.folder, options.reference)


def _fail(problems: Sequence[str], exit_code: int) -> int:
    if is_main():
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfkit",
        description="Raw text to a small, tested language model, one YAML recipe a step.",
        epilog="`accelerate launch RECIPE key.sub=value` runs a recipe on all the devices of the machine.",
    )
    parser.add_argument("--version", action="version", version=f"hfkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in (
        ("run", "run a recipe, after the recipes that it needs"),
        ("plan", "check a recipe and show what running it would do and cost"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("recipe", type=Path, help="a .yaml file")
        command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values to set in the recipe")
        if name == "run":
            command.add_argument("--rebuild", action="store_true", help="move the old result aside and rebuild it")
            command.add_argument("--fresh", action="store_true", help="move an unfinished run aside and start over")
            command.add_argument(
                "--force", action="store_true", help="resume from checkpoints even though the recipe changed"
            )
        else:
            command.add_argument("--on", metavar="MACHINE", help="another machine than this one, such as h100x8")
            command.add_argument("--config", type=Path, help="the configuration that `accelerate launch` would get")
    text = "push a finished folder to the Hub, in one commit"
    command = commands.add_parser("push", help=text, description=text)
    command.add_argument("folder", type=Path, help="such as runs/pretrain")
    command.add_argument("repo", help="the repository, organization/name; it is made if it is not there")
    command.add_argument("--private", action="store_true", help="make a new repository that others cannot see")
    command.add_argument("--revision", help="a branch, by default the main one")
    text = "serve a model: an OpenAI-compatible API, a page, a log"
    command = commands.add_parser("serve", help=text, description=text)
    command.add_argument("model", help="a folder such as runs/finetune, an id on the Hub, or the recipe that makes it")
    command.add_argument("--host", help="by default 127.0.0.1; another address needs HFKIT_TOKENS, or --open")
    command.add_argument("--port", type=int, help="by default 8000; 0 takes one that is free")
    command.add_argument("--open", action="store_true", default=None, help="let everybody ask, without a token")
    command.add_argument("--tokens", help="a file with lines name:token, by default the environment's HFKIT_TOKENS")
    command.add_argument("--slots", type=int, help="answers that are written at the same time, by default 32")
    command.add_argument("--threads", type=int, help="of the CPU, by default the cores of the container")
    command.add_argument("--output-dir", help="folder of the log, by default runs/serve")
    text = "talk to a model in the terminal"
    command = commands.add_parser("chat", help=text, description=text)
    command.add_argument("model", help="a folder such as runs/finetune, or an id on the Hub")
    command.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    command.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    command.add_argument("--seed", type=int, help="the same seed gives the same answers")
    text = "export the log of a server as JSON lines"
    command = commands.add_parser("log", help=text, description=text)
    command.add_argument("folder", type=Path, help="such as runs/serve")
    command.add_argument("--since", default="", help="such as 90m, 12h or 7d; by default all")
    command.add_argument("--format", choices=["jsonl"], default="jsonl", help="one record a line")
    text = "show what a folder was made of, and which of that has changed since"
    command = commands.add_parser("lineage", help=text, description=text)
    command.add_argument("folder", type=Path, help="such as runs/pretrain")
    text = "write a project of your own: recipes, a folder for data, a README"
    command = commands.add_parser("new", help=text, description=text)
    command.add_argument("folder", type=Path, help="a folder that is not there yet")
    command.add_argument(
        "--template", default="pretrain", help="the recipe to begin with, such as finetune or distill"
    )
    command = commands.add_parser("schema", help="write the JSON schemas that editors complete and check recipes with")
    command.add_argument("folder", type=Path, nargs="?", default=Path("recipes/schema"))
    command.add_argument("--reference", type=Path, help="also write a page of all keys, such as docs/recipes.md")
    return parser
