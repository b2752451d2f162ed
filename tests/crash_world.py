"""A world on a simulated clock: processes whose threads take turns as a seed says, and faults that strike at calls of ports.

Every thread of the simulation is a greenlet, so that real code runs as it is and one at a time. It may be interrupted where it calls a
port, waits for a lock, or waits for another thread, and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import random
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import greenlet

from features.state.ports import UnreachableError

logger = logging.getLogger("simulation")
T = TypeVar("T")
KILLED_BEFORE, KILLED_AFTER, CUT, LOST, STALLED, PARTED = (
    "killed before it", "killed after it", "cut before it", "answer lost", "stalled", "lease lost, goes on",
)  # fmt: skip
FAULTS = (KILLED_BEFORE, KILLED_AFTER, CUT, LOST, STALLED, PARTED)
WEIGHTS = (25, 25, 12, 12, 6, 20)


class Killed(BaseException):
    """The process of this thread has ended."""


class Simulated(UnreachableError):
    """A server that cannot be reached in this world."""


class Task:
    """A thread: of a process, or of a client where that is None."""

    def __init__(self, world: World, process: Process | None, run: Callable[[], object]) -> None:
        self.world, self.process, self._run = world, process, run
        self.wake_at, self.until = world.now, None  # type: float, Callable[[], bool] | None
        self.held: list[Any] = []
        """The leases that it holds."""
        self.done = self.is_doomed = False
        self.greenlet = greenlet.greenlet(self._go, world.hub)

    def _go(self) -> None:
        try:
            self._run()
        except Killed:
            pass
        except BaseException as error:
            if self.process is None or self.process.is_alive:
                self.world.wrong(f"a thread has ended with {type(error).__name__}: {error}", error)
        finally:
            self.done = True

    def start(self) -> None:
        """Nothing: it runs as soon as it is its turn."""

    def is_alive(self) -> bool:
        return not self.done

    def join(self) -> None:
        self.world.wait(lambda: self.done)


class Process:
    """One process of a service on one machine, with a clock of its own."""

    def __init__(self, world: World, number: int, ahead: float) -> None:
        self.world, self.number, self.ahead = world, number, ahead
        self.is_alive = True
        self.closing: list[Callable[[], object]] = []
        """What the system does once the process has ended."""


class World:
    """The present moment, whose turn it is, and what goes wrong.

    Args:
        seed: what everything follows from.
        rate: how likely a fault is at one call of a port.
    """

    def __init__(self, seed: int, rate: float) -> None:
        self.random, self.rate, self.now = random.Random(seed), rate, 0.0
        self.hub = greenlet.getcurrent()
        self.tasks: list[Task] = []
        self.current: Task | None = None
        self.struck: Counter[tuple[str, str]] = Counter()
        """Which faults have struck, by the call and the fault."""
        self.problems: list[str] = []
        self.first_error: BaseException | None = None
        self.digest = 0
        """Names the course of events: equal where two runs have taken the same."""

    def wrong(self, what: str, error: BaseException | None = None) -> None:
        """Note what must not have happened."""
        self.problems.append(f"at {self.now:.3f}: {what}")
        self.first_error = self.first_error or error

    @property
    def number(self) -> int:
        """The process whose turn it is; 0 for what is outside."""
        return 0 if self.current is None or self.current.process is None else self.current.process.number

    # --- turns

    def spawn(self, process: Process | None, run: Callable[[], object]) -> Task:
        task = Task(self, process, run)
        self.tasks.append(task)
        return task

    def run(self, until: Callable[[], bool], limit: float) -> bool:
        """Let everybody run until something holds; returns whether it did before *limit* simulated seconds."""
        while not until():
            if self.now > limit:
                return False
            self._end_the_dead()
            ready = [each for each in self.tasks if not each.done and (each.wake_at <= self.now or (each.until and each.until()))]
            if not ready:
                waking = [task.wake_at for task in self.tasks if not task.done and task.wake_at < float("inf")]
                if not waking:
                    return False
                self.now = max(self.now, min(waking))
                continue
            self._switch_to(ready[self.random.randrange(len(ready))])
            if len(self.tasks) > 64:
                self.tasks = [task for task in self.tasks if not task.done]
        return True

    def _switch_to(self, task: Task) -> None:
        self.current, task.until = task, None
        task.greenlet.switch()
        self.current = None

    def _end_the_dead(self) -> None:
        for task in self.tasks:
            if not task.done and task.is_doomed:
                self.end(task)

    def end(self, task: Task) -> None:
        """Let a thread unwind, now."""
        self.current = task
        if task.greenlet:
            task.greenlet.throw(Killed)
        task.done, self.current = True, None

    def kill(self, process: Process) -> None:
        """End a process at once; whoever calls this from within must raise ``Killed``."""
        process.is_alive = False
        for task in self.tasks:
            if task.process is process and task is not self.current:
                task.is_doomed = True
        self.spawn(None, lambda: [each() for each in process.closing])

    def bury(self, process: Process) -> None:
        """End a process from outside."""
        self.kill(process)
        if self.current is None:
            self._end_the_dead()

    def sleep(self, seconds: float) -> None:
        """Let others run for so long."""
        task = self.current
        if task is None:
            self.now += seconds
            return
        self._see_that_it_lives()
        task.wake_at = self.now + seconds
        self.hub.switch()
        self._see_that_it_lives()

    def wait(self, until: Callable[[], bool], seconds: float = float("inf")) -> bool:
        """Let others run until something holds; returns whether it came about in time."""
        self._see_that_it_lives()
        task = self.current
        if until():
            return True
        assert task is not None, "nobody is left who could bring this about"
        task.wake_at, task.until = self.now + seconds, until
        self.hub.switch()
        self._see_that_it_lives()
        return until()

    def _see_that_it_lives(self) -> None:
        task = self.current
        if task is not None and task.process is not None and not task.process.is_alive:
            raise Killed

    # --- calls

    def call(self, what: str, effect: Callable[[], T], *, may_fail: bool = True, before: Callable[[], object] = lambda: None) -> T:
        """One call of a port: its effect takes place at once, at a moment in between; *before* is undone what was begun."""
        self._see_that_it_lives()
        task = self.current
        fault = self._fault(what, may_fail) if task is not None and task.process is not None else None
        self._pause()
        self.digest = zlib.crc32(f"{what} {fault} {self.now:.6f} {self.number}".encode(), self.digest)
        if fault == KILLED_BEFORE:
            self._kill_this()
        elif fault == CUT:
            before()
            raise Simulated(f"{what}: no answer")
        elif fault == STALLED:
            self.sleep(self.random.choice((0.5, 3.0, 6.0, 30.0)))
        elif fault == PARTED:
            assert task is not None
            for each in task.held:
                each.lose()
            self.sleep(self.random.choice((0.01, 0.5, 5.0, 40.0)))
        done = effect()
        if fault == KILLED_AFTER:
            self._kill_this()
        elif fault == LOST:
            raise Simulated(f"{what}: the answer was lost")
        self._pause()
        return done

    def _fault(self, what: str, may_fail: bool) -> str | None:
        if self.random.random() >= self.rate:
            return None
        [fault] = self.random.choices(FAULTS, WEIGHTS)
        assert self.current is not None
        if fault in (CUT, LOST) and not may_fail:
            fault = KILLED_BEFORE
        if fault == PARTED and not self.current.held:
            fault = KILLED_AFTER
        self.struck[what, fault] += 1
        assert self.current.process is not None
        logger.info("%.3f process %d: %s, %s", self.now, self.current.process.number, what, fault)
        return fault

    def _kill_this(self) -> None:
        assert self.current is not None
        assert self.current.process is not None
        self.kill(self.current.process)
        raise Killed

    def _pause(self) -> None:
        if self.random.random() < 0.4:
            self.sleep(self.random.expovariate(500.0))


class Lock:
    """A lock of the threads of one process."""

    is_again = False

    def __init__(self, world: World) -> None:
        self._world, self._owner, self._depth = world, None, 0  # type: World, Task | None, int

    def __enter__(self) -> Any:
        task = self._world.current
        if self._owner is not None and self._owner is task and not self.is_again:
            raise RuntimeError("a thread waits for itself")
        if self._owner is not task:
            self._world.wait(lambda: self._owner is None)
        self._owner, self._depth = task, self._depth + 1
        return self

    def acquire(self, timeout: float = float("inf")) -> bool:
        if not self._world.wait(lambda: self._owner in (None, self._world.current), timeout):
            return False
        self.__enter__()
        return True

    def release(self) -> None:
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None


class AgainLock(Lock):
    """A lock that who holds it may take again."""

    is_again = True


class Threading:
    """Stands in for the module ``threading`` in the code that is simulated."""

    def __init__(self) -> None:
        self.world: World

    def Lock(self) -> Lock:  # noqa: N802
        return Lock(self.world)

    def RLock(self) -> AgainLock:  # noqa: N802
        return AgainLock(self.world)

    def Thread(self, target: Callable[[], object], name: str = "", daemon: bool = True) -> Task:  # noqa: N802
        assert self.world.current is not None
        return self.world.spawn(self.world.current.process, target)

    def monotonic(self) -> float:
        return self.world.now

    def SimpleQueue(self) -> Line:  # noqa: N802
        return Line(self.world)


class Line:
    """Stands in for ``queue.SimpleQueue``."""

    def __init__(self, world: World) -> None:
        self._world, self._items = world, deque[Any]()

    def put(self, item: Any) -> None:
        self._items.append(item)

    def get(self) -> Any:
        self._world.wait(lambda: bool(self._items))
        return self._items.popleft()

    def empty(self) -> bool:
        return not self._items


threading = Threading()


class Promise(Future[Any]):
    """A future that is waited for on the simulated clock."""

    def result(self, timeout: float | None = None) -> Any:
        if not threading.world.wait(self.done, float("inf") if timeout is None else timeout):
            raise TimeoutError
        return super().result(0)


@contextlib.contextmanager
def unhurt(world: World) -> Iterator[None]:
    """Let nothing go wrong meanwhile."""
    rate, world.rate = world.rate, 0.0
    try:
        yield
    finally:
        world.rate = rate
