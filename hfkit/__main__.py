"""`python -m hfkit` and `accelerate launch -m hfkit`: the same as the `hfkit` command."""

from hfkit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
