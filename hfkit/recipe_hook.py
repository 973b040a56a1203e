"""Lets Python run a recipe: `python recipes/pretrain.yaml`, and so `accelerate launch recipes/pretrain.yaml`.

A `.pth` file imports this module whenever Python starts in an environment where hfkit is installed. Python asks
`sys.path_hooks` about the path of a script before it reads it as source; the hook below answers for `*.yaml` files
only, after every hook that was there before. It imports nothing that Python has not already loaded.
"""

import sys


class RecipeLoader:
    """Finder and loader in one: its `__main__` hands the recipe over to hfkit."""

    def __init__(self, path):
        if not path.endswith((".yaml", ".yml")):
            raise ImportError("not a recipe", path=path)
        self.path = path

    def find_spec(self, fullname, target=None):
        if fullname != "__main__":
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(fullname, self, origin=self.path)

    def create_module(self, spec):
        return None

    def get_code(self, fullname):
        source = (
            "import sys\n"
            "from hfkit.cli import main\n"
            f"sys.path.remove({self.path!r})\n"  # Python put the recipe where the script's folder stands
            "raise SystemExit(main(['run', *sys.argv]))\n"
        )
        return compile(source, self.path, "exec")


if RecipeLoader not in sys.path_hooks:
    sys.path_hooks.append(RecipeLoader)
