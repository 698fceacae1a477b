"""The checker itself: a clean history passes, and every lie is caught by the promise that it breaks."""

import copy
from collections.abc import Callable

import pytest

from tests.faults.checker import RULES, judge
from tests.faults.history import Event

History = list[Event]


def submit(name: str, at: float, **facts: object) -> Event:
    known = {"tenant": "alice", "model": "flux", "priority": 0, "key": None, "webhook": False}
    return {"kind": "submit", "id": name, "at": at, "deadline": None, **known, **facts}


def accepted(name: str, at: float, key: str | None = None, of: str | None = None) -> Event:
    return {"kind": "accepted", "of": of or name, "id": name, "key": key, "tenant": "alice", "at": at}


def run(name: str, at: float, fence: int, attempt: int, commits: bool = True) -> History:
    """A claim, what the model did, and the commit."""
    claim = {"kind": "claimed", "id": name, "fence": fence, "attempt": attempt, "asked": at, "at": at + 0.1}
    began = {"kind": "began", "id": name, "nonce": f"{name}/{fence}", "clock": 100 + at, "at": at + 0.2}
    commit = {"id": name, "fence": fence, "digest": f"result of {name}"}
    ends = [
        {"kind": "committing", "at": at + 0.3, **commit},
        {"kind": "committed", "held": True, "at": at + 0.4, **commit},
    ]
    return [claim, began, *(ends if commits else [])]


def seen(name: str, at: float, state: str) -> Event:
    result = f"result of {name}" if state == "completed" else None
    return {
        "kind": "seen", "id": name, "tenant": "alice", "state": state, "error_type": None, "digest": result,
        "asked": at, "at": at + 0.01,
    }  # fmt: skip


def final(name: str, **facts: object) -> Event:
    known = {
        "state": "completed", "status": 200, "error_type": None, "digest": f"result of {name}",
        "nonce": None, "attempts": 1, "crashes": 0, "webhook": None, "finished_at": 200.0, "at": 90.0,
    }  # fmt: skip
    return {"kind": "final", "id": name, **known, **facts}


def posted(name: str, at: float, answered: int) -> Event:
    told = {"genuine": True, "digest": f"result of {name}"}
    return {"kind": "posted", "id": name, "answered": answered, "at": at, **told}


def left(what: str) -> Event:
    return {"kind": "left", "what": what, "count": 2, "at": 92.0}


def clean() -> History:
    """Two plain requests, one with a key, one cancelled, one whose worker died, one that came too late."""
    return [
        {"kind": "limits", "max_attempts": 10, "max_crashes": 3, "at": 0.0},
        submit("one", 1.0, webhook=True), accepted("one", 1.1),
        submit("two", 1.2), accepted("two", 1.3),
        submit("keyed", 1.4, key="k"), accepted("keyed", 1.5, "k"),
        submit("again", 1.6, key="k"), accepted("keyed", 1.7, "k", of="again"),
        submit("dropped", 1.8), accepted("dropped", 1.9),
        submit("late", 2.0, deadline=105.0), accepted("late", 2.1),
        submit("unanswered", 2.2),
        submit("refused", 2.3), {"kind": "refused", "of": "refused", "is_unknown": False, "at": 2.4},
        {"kind": "cancelling", "id": "dropped", "at": 3.0},
        {"kind": "cancelled", "id": "dropped", "outcome": "requested", "at": 3.1},
        seen("one", 3.2, "queued"),
        *run("one", 4.0, 1, 1), seen("one", 4.5, "completed"), seen("one", 4.6, "completed"),
        *run("two", 5.0, 1, 1, commits=False), {"kind": "killed", "what": "worker", "at": 5.5},
        *run("two", 6.0, 2, 2),
        *run("keyed", 7.0, 1, 1),
        {"kind": "peeked", "id": "one", "tenant": "bob", "found": False, "at": 8.0},
        posted("one", 8.1, 500), posted("one", 8.2, 200), posted("one", 8.3, 200),
        {"kind": "file", "name": "a.png", "is_right": True, "at": 8.5},
        final("one", webhook="delivered", nonce="one/1"), final("two", attempts=2, crashes=1),
        final("keyed"),
        final("dropped", status=499, error_type="client_cancelled", digest="cancelled", attempts=0),
        final("late", status=504, error_type="request_timeout", digest="late", attempts=0),
        {"kind": "left", "what": "leases", "count": 0, "at": 91.0},
        {"kind": "left", "what": "files", "count": 0, "at": 91.0},
    ]  # fmt: skip


def change(history: History, kind: str, name: str, **facts: object) -> None:
    """The last event of a kind about a request tells something else."""
    [*_, event] = [each for each in history if each["kind"] == kind and each.get("id") == name]
    event.update(facts)


def drop(history: History, kind: str, name: str) -> None:
    history[:] = [each for each in history if not (each["kind"] == kind and each.get("id") == name)]


def two_last(history: History) -> None:
    """`two` is claimed first although `one` came before."""
    for name, asked in (("one", 9.0), ("two", 4.0)):
        for each in history:
            if each["kind"] == "claimed" and each["id"] == name and each["fence"] == 1:
                each.update(asked=asked, at=asked + 0.1)
    history[:] = [each for each in history if each["kind"] not in ("seen", "committing", "committed")]


def low_first(history: History) -> None:
    two_last(history)
    change(history, "submit", "two", priority=1)


LIES: dict[str, tuple[str, Callable[[History], None]]] = {
    "an accepted request is gone": ("I1", lambda h: drop(h, "final", "two")),
    "an accepted request never ends": ("I1", lambda h: change(h, "final", "two", state="running")),
    "a result changes": ("I2", lambda h: change(h, "seen", "one", digest="another")),
    "the result is not the committed one": ("I2", lambda h: change(h, "final", "two", digest="another")),
    "nobody computed the result": ("I2", lambda h: change(h, "final", "one", nonce="one/9")),
    "a result is erased unasked": (
        "I2",
        lambda h: change(h, "final", "keyed", error_type="payloads_deleted"),
    ),
    "two commits are taken": ("I3", lambda h: h.extend(run("two", 8.0, 3, 3))),
    "a stale commit is taken": (
        "I3",
        lambda h: h.append(
            {"kind": "committed", "id": "two", "fence": 1, "held": True, "digest": "result of two", "at": 6.6}
        ),
    ),
    "two claims share a fence": ("I3", lambda h: h.extend(run("two", 6.5, 2, 2, commits=False))),
    "a completed request waits again": ("I4", lambda h: h.append(seen("one", 9.0, "queued"))),
    "a completed request is started again": ("I4", lambda h: h.extend(run("one", 9.0, 2, 2, commits=False))),
    "one key leads to two requests": ("I5", lambda h: h.append(accepted("again", 2.5, "k"))),
    "one request has two keys": ("I5", lambda h: h.append(accepted("keyed", 2.5, "l", of="again"))),
    "a request without a key is another's": (
        "I5",
        lambda h: h.append(accepted("one", 2.5, of="two")),
    ),
    "a webhook is forged": ("I6", lambda h: change(h, "posted", "one", genuine=False)),
    "a webhook tells another result": ("I6", lambda h: change(h, "posted", "one", digest="another")),
    "a webhook is never sent": ("I6", lambda h: drop(h, "posted", "one")),
    "a webhook is sent after a 2xx": ("I6", lambda h: h.append(posted("one", 8.4, 200))),
    "a webhook was not asked for": ("I6", lambda h: h.append(posted("two", 8.4, 200))),
    "a webhook stays owed": ("I6", lambda h: change(h, "final", "one", webhook="due")),
    "too many starts": ("I7", lambda h: change(h, "final", "two", attempts=11)),
    "too many crashes": ("I7", lambda h: change(h, "final", "two", crashes=4)),
    "one start too many": ("I7", lambda h: h.extend(run("late", 9.0, 1, 11, commits=False))),
    "a request that nobody submitted": ("I8", lambda h: h.append(final("ghost"))),
    "a request exists twice": ("I8", lambda h: h.extend([final("unanswered")] * 2)),
    "a refused request exists": ("I8", lambda h: h.append(final("refused"))),
    "a repeated submit makes a second request": ("I8", lambda h: h.append(final("again"))),
    "a cancelled request succeeds": (
        "I9", lambda h: change(h, "final", "dropped", status=200, error_type=None),
    ),
    "a cancelled request is started": ("I9", lambda h: h.extend(run("dropped", 9.0, 1, 1, commits=False))),
    "a cancel does not find it": ("I9", lambda h: change(h, "cancelled", "dropped", outcome="not_found")),
    "a cancel that came too late wins": (
        "I9", lambda h: change(h, "cancelled", "dropped", outcome="already_completed"),
    ),
    "nobody cancelled it": (
        "I9", lambda h: change(h, "final", "keyed", error_type="client_cancelled"),
    ),
    "a request is started too late": (
        "I10", lambda h: h.append({"kind": "began", "id": "late", "nonce": "n", "clock": 109.0, "at": 9.0}),
    ),
    "a request that began is told 504": (
        "I10", lambda h: h.append({"kind": "begun", "id": "late", "clock": 103.0, "at": 3.0}),
    ),
    "a 504 comes too early": ("I10", lambda h: change(h, "final", "late", finished_at=104.0)),
    "another tenant sees it": ("I11", lambda h: change(h, "peeked", "one", found=True)),
    "another tenant is shown it": ("I11", lambda h: change(h, "seen", "one", tenant="bob")),
    "the later is started first": ("I12", two_last),
    "low priority is started first": (
        "I12", low_first,
    ),
    "a file is not what was drawn": (
        "I13", lambda h: h.append({"kind": "file", "name": "b.png", "is_right": False, "at": 9.0}),
    ),
    "files are left": ("I13", lambda h: h.append(left("files"))),
    "leases are left": ("I14", lambda h: h.append(left("leases"))),
}  # fmt: skip


def test_a_clean_history_passes() -> None:
    assert judge(clean()) == []


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught_by_the_promise_that_it_breaks(lie: str) -> None:
    invariant, corrupt = LIES[lie]
    history = copy.deepcopy(clean())
    corrupt(history)
    assert invariant in {violation.invariant for violation in judge(history)}


def test_every_promise_is_lied_about() -> None:
    assert {invariant for invariant, _ in LIES.values()} == set(RULES)
