"""Judges a history by what the server promises: I1 to I14 of docs/reliability.md."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.faults.history import Event

SLACK_S = 0.5  # between a deadline and the moment that the model's process noted


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that a history breaks."""

    invariant: str
    text: str


Rule = Callable[["Facts"], Iterator[str]]


class Facts:
    """A history, by kind and by request."""

    def __init__(self, history: list[Event]) -> None:
        self._by_kind: defaultdict[str, list[Event]] = defaultdict(list)
        for event in history:
            self._by_kind[event["kind"]].append(event)
        self.submits = {event["id"]: event for event in self.all("submit")}
        self.finals: dict[str, Event] = {event["id"]: event for event in self.all("final")}

    def all(self, kind: str) -> list[Event]:
        return self._by_kind[kind]

    def of(self, kind: str) -> dict[str, list[Event]]:
        found: defaultdict[str, list[Event]] = defaultdict(list)
        for event in self.all(kind):
            found[event["id"]].append(event)
        return found

    def kept(self) -> set[str]:
        """The ids that were acknowledged and are not to be forgotten."""
        return {
            each["id"] for each in self.all("accepted") if not self.submits[each["of"]].get("forgettable")
        }

    def is_erased(self, request_id: str) -> bool:
        final = self.finals.get(request_id)
        return final is not None and _is_gone(final)


def _is_gone(event: Event) -> bool:
    """Whether the payloads have been erased."""
    return bool(event["error_type"] == "payloads_deleted")


def judge(history: list[Event]) -> list[Violation]:
    """What is wrong with it; nothing, if every promise was kept."""
    facts = Facts(history)
    return [Violation(name, text) for name, rule in RULES.items() for text in rule(facts)]


def _ends(facts: Facts) -> Iterator[str]:
    for request_id in facts.kept():
        final = facts.finals.get(request_id)
        if final is None:
            yield f"{request_id} was accepted and is gone"
        elif final["state"] != "completed":
            yield f"{request_id} was accepted and is {final['state']} in the end"


def _results_stay(facts: Facts) -> Iterator[str]:
    for request_id, seen in facts.of("seen").items():
        told = {each["digest"] for each in seen if each["state"] == "completed" and not _is_gone(each)}
        final = facts.finals.get(request_id)
        if final is not None and told and not facts.is_erased(request_id):
            told.add(final["digest"])
        if len(told) > 1:
            yield f"{request_id} has had {len(told)} results"
    for each in facts.all("committed"):
        final = facts.finals.get(each["id"])
        if final is None or not each["held"] or facts.is_erased(each["id"]):
            continue
        if final["digest"] != each["digest"] and final["error_type"] != "client_cancelled":
            yield f"{each['id']} has another result than the one that was committed"
    asked_for = set(facts.of("erasing"))
    for final in facts.finals.values():
        if _is_gone(final) and final["id"] in facts.kept() and final["id"] not in asked_for:
            yield f"{final['id']} was erased, and nobody asked for it"
    nonces = {(each["id"], each["nonce"]) for each in facts.all("began")}
    for final in facts.finals.values():
        if final.get("nonce") is not None and (final["id"], final["nonce"]) not in nonces:
            yield f"{final['id']} has a result that nothing computed"


def _one_commit(facts: Facts) -> Iterator[str]:
    claims = facts.of("claimed")
    asked = {(each["id"], each["fence"]): each["at"] for each in facts.all("committing")}
    for request_id, commits in facts.of("committed").items():
        held = [each for each in commits if each["held"]]
        if len(held) > 1:
            yield f"{request_id} was committed {len(held)} times"
        for each in held:
            began = asked.get((request_id, each["fence"]), each["at"])
            if any(c["fence"] > each["fence"] and c["at"] < began for c in claims.get(request_id, [])):
                yield f"{request_id} was committed under the stale fence {each['fence']}"
    for request_id, claimed in claims.items():
        fences = [each["fence"] for each in claimed]
        if len(set(fences)) < len(fences):
            yield f"{request_id} was claimed twice under one fence"


def _completed_is_final(facts: Facts) -> Iterator[str]:
    ends: dict[str, float] = {}
    for each in facts.all("seen"):
        if each["state"] == "completed":
            ends[each["id"]] = min(each["at"], ends.get(each["id"], each["at"]))
    for each in facts.all("seen"):
        if each["state"] != "completed" and each["asked"] > ends.get(each["id"], float("inf")):
            yield f"{each['id']} was seen completed, and {each['state']} later"
    for each in facts.all("claimed"):
        if each["asked"] > ends.get(each["id"], float("inf")):
            yield f"{each['id']} was seen completed, and started later"


def _one_id_per_key(facts: Facts) -> Iterator[str]:
    ids: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    keys: defaultdict[str, set[str]] = defaultdict(set)
    for each in facts.all("accepted"):
        if each.get("key") is not None:
            ids[each["tenant"], each["key"]].add(each["id"])
            keys[each["id"]].add(each["key"])
        elif each["id"] != each["of"]:
            yield f"{each['of']} had no key and was answered with {each['id']}"
    for (_, key), answered in ids.items():
        if len(answered) > 1:
            yield f"the key {key} led to {len(answered)} requests"
    for request_id, its in keys.items():
        if len(its) > 1:
            yield f"{request_id} has {len(its)} keys"


def _webhooks(facts: Facts) -> Iterator[str]:
    posts = facts.of("posted")
    kills = len(facts.all("killed"))
    again = facts.of("redelivered")
    for request_id, its in posts.items():
        submit, final = facts.submits.get(request_id), facts.finals.get(request_id)
        if submit is None or not submit.get("webhook"):
            yield f"a webhook came for {request_id}, and nobody asked for one"
        if not all(each["genuine"] for each in its):
            yield f"a webhook of {request_id} has no valid signature"
        if final is not None and not facts.is_erased(request_id):
            if any(each["digest"] != final["digest"] for each in its):
                yield f"a webhook of {request_id} tells of another result"
        taken = [n for n, each in enumerate(its) if 200 <= each["answered"] < 300]
        # a sender that died between the answer and its record has to say it again
        if taken and len(its) - 1 - taken[0] > kills + len(again.get(request_id, [])):
            yield f"the webhook of {request_id} was sent again after it had been taken"
    for request_id in facts.kept():
        if not facts.submits.get(request_id, {}).get("webhook") or request_id not in facts.finals:
            continue
        if not posts.get(request_id):
            yield f"the webhook of {request_id} was never sent"
        if facts.finals[request_id]["webhook"] not in ("delivered", "failed"):
            yield f"the webhook of {request_id} is still {facts.finals[request_id]['webhook']}"


def _attempts(facts: Facts) -> Iterator[str]:
    for limits in facts.all("limits")[:1]:
        for final in facts.finals.values():
            if final["attempts"] > limits["max_attempts"] or final["crashes"] > limits["max_crashes"]:
                yield f"{final['id']} had {final['attempts']} starts and {final['crashes']} crashes"
        for claim in facts.all("claimed"):
            if claim["attempt"] > limits["max_attempts"]:
                yield f"{claim['id']} was started for the {claim['attempt']}th time"


def _no_ghosts(facts: Facts) -> Iterator[str]:
    counts: defaultdict[str, int] = defaultdict(int)
    for final in facts.all("final"):
        counts[final["id"]] += 1
    for request_id, count in counts.items():
        if count > 1:
            yield f"{request_id} exists {count} times"
        if request_id not in facts.submits:
            yield f"{request_id} exists, and nobody submitted it"
    for each in facts.all("refused"):
        if not each["is_unknown"] and each["of"] in facts.finals:
            yield f"{each['of']} was refused, and exists"
    for each in facts.all("accepted"):
        if each["id"] != each["of"] and each["of"] in facts.finals:
            yield f"{each['of']} was answered with an earlier request, and exists beside it"


def _cancels(facts: Facts) -> Iterator[str]:
    claims = facts.of("claimed")
    asked_for = set(facts.of("cancelling"))
    for each in facts.all("cancelled"):
        final = facts.finals.get(each["id"])
        if each["outcome"] == "requested":
            if final is not None and final["error_type"] not in ("client_cancelled", "payloads_deleted"):
                yield f"the cancel of {each['id']} was accepted, and it ended as {final['status']}"
            if any(claim["asked"] > each["at"] for claim in claims.get(each["id"], [])):
                yield f"{each['id']} was started after its cancel"
        elif each["outcome"] == "not_found" and final is not None:
            yield f"the cancel of {each['id']} did not find it"
    outcomes: defaultdict[str, set[str]] = defaultdict(set)
    for each in facts.all("cancelled"):
        outcomes[each["id"]].add(each["outcome"])
    for final in facts.finals.values():
        if final["error_type"] != "client_cancelled":
            continue
        if final["id"] not in asked_for:
            yield f"{final['id']} ended as cancelled, and nobody cancelled it"
        answered = facts.of("cancelled").get(final["id"], [])
        if answered and len(answered) == len(facts.of("cancelling")[final["id"]]):
            if outcomes[final["id"]] == {"already_completed"}:
                yield f"{final['id']} ended as cancelled, and its cancel was told that it came too late"


def _start_deadlines(facts: Facts) -> Iterator[str]:
    starts, noted = facts.of("began"), facts.of("begun")
    for request_id, submit in facts.submits.items():
        deadline = submit.get("deadline")
        if deadline is None:
            continue
        first = min((each["clock"] for each in starts.get(request_id, [])), default=None)
        if first is not None and first > deadline + SLACK_S:
            yield f"{request_id} was started {first - deadline:.2f} s after its deadline"
        final = facts.finals.get(request_id)
        is_late = final is not None and final["error_type"] == "request_timeout"
        in_time = min((each["clock"] for each in noted.get(request_id, [])), default=None)
        if is_late and in_time is not None and in_time < deadline - SLACK_S:
            yield f"{request_id} began in time, and was told that it had not"
        if is_late and final is not None and final["finished_at"] < deadline:
            yield f"{request_id} was told too early that it was too late"


def _own_tenant_only(facts: Facts) -> Iterator[str]:
    for each in facts.all("peeked"):
        if each["found"]:
            yield f"{each['tenant']} saw {each['id']}"
    for each in facts.all("seen"):
        if each["id"] in facts.submits and facts.submits[each["id"]]["tenant"] != each["tenant"]:
            yield f"{each['tenant']} was shown {each['id']}"


def _in_order(facts: Facts) -> Iterator[str]:
    accepted = {
        each["id"]: each["at"] for each in reversed(facts.all("accepted")) if each["id"] == each["of"]
    }
    cancels = {each["id"]: each["at"] for each in facts.all("cancelling")}
    firsts = {each["id"]: each for each in facts.all("claimed") if each["fence"] == 1}
    for later, claim in firsts.items():
        for earlier, other in firsts.items():
            if other["asked"] <= claim["at"] or earlier in cancels:
                continue  # perhaps at once
            if earlier not in accepted or _precedes(facts, earlier, later, accepted[earlier], claim):
                continue
            yield f"{later} was started before {earlier}"


def _precedes(facts: Facts, earlier: str, later: str, accepted_at: float, claim: Event) -> bool:
    """Whether it is right that `later` was started by `claim`, before `earlier`."""
    one, two = facts.submits[earlier], facts.submits.get(later)
    if two is None or one["model"] != two["model"] or one["priority"] > two["priority"]:
        return True
    if one["priority"] < two["priority"]:
        return bool(accepted_at > claim["asked"])
    return bool(one["tenant"] != two["tenant"] or accepted_at > two["at"])


def _files(facts: Facts) -> Iterator[str]:
    for each in facts.all("file"):
        if not each["is_right"]:
            yield f"the file {each['name']} of a result is not what was drawn"
    for each in facts.all("left"):
        if each["what"] == "files" and each["count"]:
            yield f"{each['count']} files are left that nobody needs"


def _nothing_held(facts: Facts) -> Iterator[str]:
    for each in facts.all("left"):
        if each["what"] != "files" and each["count"]:
            yield f"{each['count']} {each['what']} are held in the end"


RULES: dict[str, Rule] = {
    "I1": _ends,
    "I2": _results_stay,
    "I3": _one_commit,
    "I4": _completed_is_final,
    "I5": _one_id_per_key,
    "I6": _webhooks,
    "I7": _attempts,
    "I8": _no_ghosts,
    "I9": _cancels,
    "I10": _start_deadlines,
    "I11": _own_tenant_only,
    "I12": _in_order,
    "I13": _files,
    "I14": _nothing_held,
}
