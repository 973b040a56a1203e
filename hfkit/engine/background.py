"""A server of models, from Python."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkit.artifacts.result import Result
from hfkit.engine import graph, runner
from hfkit.recipe.plain import plain
from hfkit.recipe.yaml_source import Source

if TYPE_CHECKING:
    from hfkit.serving.listen import Background


def serve(output_dir: str | Path, model: Result | str | Path, **keys: Any) -> "Background":
    """Serve a model in a thread, with the API of OpenAI, a page and a log.

    Args:
        output_dir: folder of the log.
        model: a result, a folder, or an id on the Hub.
        keys: the further keys of a recipe of `stage: serve`: `port` (0 for a free one), `slots`, `tokens`, `log` ...

    Returns:
        The server, with its `address`; `stop()`, or the end of `with`, ends it.

    Raises:
        HfkitError: for a key or a value that is wrong, or a port that is taken.

    Example:
        >>> from urllib.request import urlopen
        >>> with serve("runs/serve", "runs/model", port=0) as server:
        ...     urlopen(f"{server.address}/health/ready").status
        200
    """
    values = {"stage": "serve", "output_dir": str(output_dir), **plain({"model": model}), **plain(keys)}
    node = graph.resolve(Source(Path(output_dir), values))
    runner.run_inputs(node)
    from hfkit.serving.listen import Background

    return Background(*node.stage.ready(node.recipe, node.resolved(), node.output_dir))
