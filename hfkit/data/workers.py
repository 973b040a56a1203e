"""Processes that call one function, each on its share of the items; results come in the order of the items.

They are plain processes that talk through their standard input and output, not those of `multiprocessing`: these do
not import the user's script again, and they end by themselves when their input does, however this process ends.
"""

import collections
import concurrent.futures
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Generic, TypeVar

from hfkit.errors import HfkitError

Item = TypeVar("Item")
Result = TypeVar("Result")
PIPE_BYTES = 1 << 20  # that a message fits into: nobody waits for a reader that is busy
WAITING_PER_PROCESS = 2  # items that are worked on or done: so memory does not grow with their number


class Workers(Generic[Item, Result]):
    """
    Args:
        function: it is pickled once for each process.
        count: of the processes.
    """

    def __init__(self, function: Callable[[Item], Result], count: int):
        self.function, self.count = function, count

    def __enter__(self) -> "Workers[Item, Result]":
        code = f"import sys; sys.path[:] = {sys.path!r}; from hfkit.data import workers; workers.serve()"
        command = [sys.executable, "-c", code]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pipesize=PIPE_BYTES)
            for _ in range(self.count)
        ]
        self.idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self.threads = concurrent.futures.ThreadPoolExecutor(self.count)
        for process in self.processes:
            self.idle.put(process)
        for process in self.processes:
            _send(process.stdin, self.function)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:  # at the end of all items they have nothing to do, and else nothing counts
            process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # of what is left to send to one that has ended
                        pipe.close()

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results of the items, in their order.

        Raises:
            HfkitError: that the function or the items raised, after the results of the items before it; or if the
                system ended a process.
        """
        source, waiting = iter(items), collections.deque[concurrent.futures.Future[Result]]()
        failure: HfkitError | None = None
        has_more = True
        while has_more or waiting:
            while has_more and len(waiting) < WAITING_PER_PROCESS * self.count:
                try:
                    waiting.append(self.threads.submit(self._call, next(source)))
                except StopIteration:
                    has_more = False
                except HfkitError as error:
                    has_more, failure = False, error
            if waiting:
                yield waiting.popleft().result()
        if failure is not None:
            raise failure

    def _call(self, item: Item) -> Result:
        process = self.idle.get()
        try:
            _send(process.stdin, item)
            result, problems, crash = _receive(process.stdout)
        except (EOFError, BrokenPipeError):
            code = process.wait()
            raise HfkitError(
                f"a process that worked beside this one was ended with exit code {code}, as the system does where "
                "memory runs out; free some, or allow fewer cores, as with `taskset -c 0`"
            ) from None
        finally:
            self.idle.put(process)  # also where it ended: whoever takes it next must not wait for ever
        if problems:
            raise HfkitError(*problems)
        if crash:
            raise RuntimeError(f"in a process that worked beside this one:\n{crash}")
        return result


def _send(pipe: IO[bytes] | None, value: object) -> None:
    assert pipe is not None
    # In one piece: a thread that takes many waits for the others after each.
    content = pickle.dumps(value, protocol=5)
    pipe.write(len(content).to_bytes(8, "big") + content)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> Any:
    """
    Raises:
        EOFError: if the other end is gone.
    """
    assert pipe is not None
    head = pipe.read(8)
    size = int.from_bytes(head, "big")
    content = pipe.read(size)
    if len(head) < 8 or len(content) < size:
        raise EOFError
    return pickle.loads(content)


def serve() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not come between answers
    try:
        function = _receive(requests)
        while True:
            _send(answers, _answer(function, _receive(requests)))
    except (EOFError, BrokenPipeError):
        os._exit(0)  # without the flush of a pipe that nobody reads


def _answer(function: Callable[[Any], Any], item: Any) -> tuple[Any, list[str], str]:
    """Return the result, or what the user did wrong, or the traceback of a fault of ours."""
    import traceback

    try:
        return function(item), [], ""
    except HfkitError as error:
        return None, error.problems, ""
    except Exception:
        return None, [], traceback.format_exc()
