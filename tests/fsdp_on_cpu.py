"""`hfkit run` under FSDP2 on CPUs: Accelerate, which shards on accelerators only, is told that there are some."""

import sys
from typing import Any

from accelerate.state import DistributedType, PartialState

from hfkit.cli import main

prepare = PartialState.__init__


def __init__(self: PartialState, *args: Any, **kwargs: Any) -> None:
    prepare(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = __init__
    raise SystemExit(main(["run", *sys.argv[1:]]))
