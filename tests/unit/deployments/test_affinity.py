"""Who gets a request: the replica that would have it done first."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from deployments.affinity import SECONDS_PER_BYTE, Holding, Load, Tier, rank

GB = 2**30
BASE, STYLE = "base", "style"

loads = st.lists(
    st.builds(
        Load,
        name=st.text(min_size=1, max_size=4),
        running=st.integers(0, 20),
        seconds=st.floats(0.1, 60),
        holds=st.dictionaries(
            st.sampled_from([BASE, STYLE]), st.builds(Holding, st.sampled_from(Tier), st.integers(0, GB))
        ),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda load: load.name,
)
needs = st.sets(st.sampled_from([BASE, STYLE, "else"]))


def holding(name: str, *tiers: Tier, nbytes: int = GB, running: int = 0) -> Load:
    held = {need: Holding(tier, nbytes) for need, tier in zip((BASE, STYLE), tiers, strict=False)}
    return Load(name, running, seconds=8.0, holds=held)


@given(loads, needs)
def test_every_replica_has_one_rank(replicas: list[Load], wanted: set[str]) -> None:
    assert sorted(rank(replicas, wanted)) == sorted(load.name for load in replicas)


@given(loads, needs, st.randoms())
def test_the_order_of_the_candidates_does_not_matter(
    replicas: list[Load], wanted: set[str], random: object
) -> None:
    assert rank(replicas[::-1], wanted) == rank(replicas, wanted)


@given(loads, needs, st.data())
def test_less_to_do_is_never_worse(replicas: list[Load], wanted: set[str], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(replicas) - 1))
    name = replicas[at].name
    idle = [*replicas[:at], replace(replicas[at], running=0), *replicas[at + 1 :]]
    assert rank(idle, wanted).index(name) <= rank(replicas, wanted).index(name)


def test_the_nearer_the_weights_the_better() -> None:
    replicas = [
        Load("none"),
        holding("disk", Tier.DISK),
        holding("ram", Tier.RAM),
        holding("gpu", Tier.DEVICE),
    ]
    assert rank(replicas, [BASE]) == ["gpu", "ram", "disk", "none"]


def test_a_large_model_counts_more_than_a_small_adapter() -> None:
    has_base = Load("base", holds={BASE: Holding(Tier.DEVICE, 5 * GB)})
    has_style = Load("style", holds={STYLE: Holding(Tier.DEVICE, GB // 10)})
    assert rank([has_style, has_base], [BASE, STYLE]) == ["base", "style"]


def test_a_queue_longer_than_the_load_sends_a_request_elsewhere() -> None:
    cold = holding("cold", Tier.DISK)
    one_second = GB * SECONDS_PER_BYTE[Tier.DISK]
    for running, first in ((0, "home"), (1, "cold")):  # for eight seconds, half of them over
        assert one_second < 4
        assert rank([cold, holding("home", Tier.DEVICE, running=running)], [BASE])[0] == first


def test_what_nobody_has_finds_different_homes() -> None:
    replicas = [Load(name) for name in "abcd"]
    homes = Counter(rank(replicas, [f"adapter {number}"])[0] for number in range(400))
    assert set(homes) == set("abcd")
    assert max(homes.values()) < 2 * min(homes.values())


def test_the_same_needs_have_the_same_home_wherever_it_is_asked() -> None:
    replicas = [Load(name) for name in "abcd"]
    assert len({rank(replicas, wanted)[0] for wanted in ([BASE, STYLE], [STYLE, BASE])}) == 1


def test_a_home_lost_moves_only_what_lived_there() -> None:
    replicas = [Load(name) for name in "abcd"]
    for number in range(100):
        before = rank(replicas, [str(number)])
        after = rank([each for each in replicas if each.name != "a"], [str(number)])
        assert after == [name for name in before if name != "a"]
