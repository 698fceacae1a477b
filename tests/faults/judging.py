"""The verdict on a run, with what the receiver of its webhooks got."""

import json
from collections import Counter

from deployments.webhooks.keyring import Keyring
from tests.faults.checker import judge
from tests.faults.fronts import LONG_S, Place
from tests.faults.history import History, digest
from tests.support.receivers import Post, Receiver, is_genuine

FLAKY = [500, 200]  # what the receiver answers at its path /flaky; 200 at all others


def prepare(receiver: Receiver) -> None:
    """Forget what it got, and what it has answered."""
    receiver.all()
    receiver.statuses = {"/flaky": list(FLAKY)}


def note_posts(place: Place, receiver: Receiver, *, trusts_clocks: bool = True) -> None:
    """Write the webhooks that came into the history. Of a clock that is wrong, the signature counts."""
    history, counts = History(place.history), Counter[str]()
    keys = Keyring(place.folder / "keys", 3 * LONG_S).jwks()["keys"]
    for post in receiver.all():
        request_id = post.headers["x-fal-webhook-request-id"]
        statuses = FLAKY if post.path == "/flaky" else [200]
        history.write(
            "posted",
            id=request_id,
            genuine=is_genuine(post, keys, post.came_at if trusts_clocks else _told_time(post)),
            digest=digest(json.loads(post.body)["payload"]),
            answered=statuses[min(counts[request_id], len(statuses) - 1)],
        )
        counts[request_id] += 1
    history.close()


def _told_time(post: Post) -> float:
    return float(post.headers["x-fal-webhook-timestamp"])


def verdict(place: Place, receiver: Receiver, *, trusts_clocks: bool = True) -> list[str]:
    """What the run broke; nothing, if all is well."""
    note_posts(place, receiver, trusts_clocks=trusts_clocks)
    history = History(place.history)
    events = history.read()
    history.close()
    return [f"{each.invariant}: {each.text}" for each in judge(events)]
