"""NaN and Inf in a step: the step is left out, told and counted; too many in a row stop the run."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.numpy

from tests.faults.conftest import Ledger
from tests.faults.world import World, must_tell, two_at_a_time

pytestmark = pytest.mark.faults
NewWorld = Callable[..., World]
CASES = [(what, value, step) for what in ("loss", "gradient") for value in ("nan", "inf") for step in (1, 7, 8, 20)]


def has_finite_weights(world: World) -> bool:
    weights = safetensors.numpy.load_file(world.out / "model.safetensors")
    return all(math.isfinite(float(abs(array).sum())) for array in weights.values())


def survive(ledger: Ledger, new: NewWorld, what: str, value: str, step: int) -> None:
    with ledger.faults(f"{what} is {value} at a step"):
        world = new()
        text = world.run(fault={"do": what, "value": value, "steps": [step]})
        assert has_finite_weights(world)
        lines = [json.loads(line) for line in (world.out / "metrics.jsonl").read_text().splitlines()]
        skipped = [line for line in lines if "skipped" in line]
        must_tell([line["step"] for line in skipped] == [step], f"not in the log: {skipped}")
        # NaN in place of an infinite loss's gradient is as bad: what is told must name the one that was put there.
        told = f"loss is {value}" if what == "loss" else f"gradient norm is {value}"
        must_tell(told in skipped[0]["skipped"], f"{told!r} is not in {skipped}")
        must_tell(f"skipped step {step}: {skipped[0]['skipped']}" in text, f"not on the screen:\n{text}")
        metrics = json.loads((world.out / "metrics.json").read_text())
        must_tell(metrics["skipped_steps"] == 1, f"not counted: {metrics['skipped_steps']}")
        assert metrics["steps"] == 20 and lines[-1]["step"] == 20


@pytest.mark.quick
def test_one_bad_step(ledger: Ledger, new: NewWorld) -> None:
    two_at_a_time([("loss", "nan", 7), ("gradient", "inf", 8)], lambda case: survive(ledger, new, *case))


def test_every_kind_of_bad_step(ledger: Ledger, new: NewWorld) -> None:
    two_at_a_time(CASES, lambda case: survive(ledger, new, *case))


def test_a_bad_step_and_a_kill(ledger: Ledger, new: NewWorld, base: World) -> None:
    """The count of bad steps is the same, whether the run was killed after them or not."""
    bad: dict[str, Any] = {"do": "loss", "value": "nan", "steps": [6, 7]}
    with ledger.faults("bad steps, then kill -9", 3):
        whole = new()
        whole.run(fault=bad)
        world = new()
        process = world.start(fault={**bad, "die": 14})
        assert process.wait() == -9, process.text
        world.ends_as(whole.result())
        assert json.loads((world.out / "metrics.json").read_text())["skipped_steps"] == 2


def test_only_bad_steps(ledger: Ledger, new: NewWorld) -> None:
    """Ten in a row end the run with the last good checkpoint; all that are there verify."""

    def check(case: tuple[str, str, int]) -> None:
        what, value, first = case
        with ledger.faults(f"{what} is {value} from a step on", 10):
            world = new()
            text = world.run(code=2, fault={"do": what, "value": value, "steps": list(range(first, 21))})
            last = first + 9
            must_tell(f"10 steps in a row were left out, up to step {last}: " in text, text)
            good = (first - 1) // 4 * 4
            named = f"the last good checkpoint is {world.out.relative_to(world.folder)}/checkpoint-"
            must_tell(named in text if good else "the last good checkpoint is " in text, text)
            assert f"The weights are those after step {first - 1}" in text and "Traceback" not in text, text
            assert not world.is_finished()
            world.check_committed()

    two_at_a_time([("loss", "nan", 1), ("loss", "inf", 9), ("gradient", "nan", 5), ("gradient", "inf", 10)], check)
