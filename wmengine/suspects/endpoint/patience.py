"""Asking over a network with manners: a rate, a budget, retries that back off, a deadline for all of it together."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from wmengine.errors import SuspectError

Answer = TypeVar("Answer")

# Seconds before the second try; doubled from try to try, at most LONGEST_PAUSE, and shortened by chance to a half.
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0


class Refused(SuspectError):
    """What the endpoint said to this request is final. hopeless: it will say so to every other request as well."""

    def __init__(self, message: str, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


class Unavailable(SuspectError):
    """The same request may be answered later.

    retry_after: seconds that the endpoint asks for; reached: whether anything was listening at all.
    """

    def __init__(self, message: str, retry_after: float = 0.0, reached: bool = True) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reached = reached


class Spent(SuspectError):
    """The budget or the time is used up: nothing more is sent."""


@dataclass
class Patience:
    """How often, how fast and how long an endpoint is asked.

    rate: inputs per second, over all requests; budget: inputs in all, tries included; tries: for one request, the first
    included; timeout: seconds for one try; deadline: seconds from the first request to the end of the last.
    """

    rate: float | None
    budget: int | None
    tries: int
    timeout: float
    deadline: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    sent: int = field(default=0, init=False)
    _end: float | None = field(default=None, init=False)
    _next_turn: float = field(default=0.0, init=False)

    def call(self, send: Callable[[float], Answer], inputs: int) -> Answer:
        """What `send` (given the seconds that it may take) returns, tried again while it raises Unavailable.

        inputs: how many the request holds; 0 for one that asks nothing of the model. Raises Spent when the budget or
        the time does not allow a try, and whatever `send` raises.
        """
        failed, before = 0, ""
        while True:
            try:
                seconds = self._turn(inputs)
            except Spent as error:
                raise Spent(f"{before}{error}") from None
            try:
                return send(seconds)
            except Unavailable as error:
                failed, before = failed + 1, f"{error}; "
                if failed >= self.tries:
                    raise
                backoff = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (failed - 1)) * random.uniform(0.5, 1.0)
                pause = max(error.retry_after, backoff)
                if pause >= self._left():
                    raise Spent(f"{error}, and the next try would be after the deadline") from None
                self.sleep(pause)

    def allows(self) -> int | None:
        """How many more inputs the budget allows; None where there is no budget."""
        return None if self.budget is None else max(0, self.budget - self.sent)

    def in_time(self) -> float:
        """How many more inputs the rate allows before the deadline; infinite where there is no rate."""
        return math.inf if self.rate is None else self.rate * max(0.0, self._left())

    def _turn(self, inputs: int) -> float:
        """Waits for this request's turn; the seconds that it may take."""
        if self.budget is not None and self.sent + inputs > self.budget:
            raise Spent(f"the budget of {self.budget} queries is used up")
        wait = self._next_turn - self.clock() if inputs else 0.0
        if wait >= self._left():
            raise Spent(f"the deadline of {self.deadline:g} seconds comes before the next request")
        if wait > 0.0:
            self.sleep(wait)
        if inputs and self.rate is not None:
            self._next_turn = max(self._next_turn, self.clock()) + inputs / self.rate
        self.sent += inputs
        return max(0.001, min(self.timeout, self._left()))

    def _left(self) -> float:
        if self._end is None:
            self._end = self.clock() + self.deadline
        return self._end - self.clock()
