"""Progress: a bar on a terminal; in a log file a line now and then, without carriage returns."""

from typing import Any

from tqdm import tqdm

from hfkit.runtime.distributed import is_main, is_terminal, say

LINE_SECONDS = 60.0


class Bar(tqdm):
    """tqdm's bar on the main process. In a log file it prints a line a minute, so nothing for what takes less."""

    def __init__(self, *args: Any, **options: Any):
        self.is_drawn = is_terminal()
        options = {"leave": False, "mininterval": 1, "disable": not is_main(), **options}
        if not self.is_drawn:
            seconds = dict.fromkeys(("mininterval", "maxinterval", "delay"), LINE_SECONDS)
            options |= {**seconds, "leave": False}
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.is_drawn:
            return bool(super().display(msg, pos))
        if msg is None:  # an empty message clears the bar
            say(self._line())
        return False

    def clear(self, nolock: bool = False) -> None:
        if self.is_drawn:
            super().clear(nolock)

    def _line(self) -> str:
        state = self.format_dict
        unit = "" if state["unit"] == "it" else f" {state['unit'].strip()}"
        count = (lambda number: self.format_sizeof(number)) if state["unit_scale"] else "{:,}".format
        of_total, left = "", ""
        if state["total"]:
            of_total = f" of {count(state['total'])}"
            left = f", {duration(state['elapsed'] * (state['total'] / max(state['n'], 1) - 1))} left"
        title = state["prefix"].removesuffix(": ")
        return f"  {title}: {count(state['n'])}{of_total}{unit} in {duration(state['elapsed'])}{left}"


def duration(seconds: float) -> str:
    """Return `m:ss`, or `h:mm:ss`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
