"""Two tenants who name many adapters: the disk has its bound, and what is there is not asked for again."""

import asyncio

from deployments.files.weights import Weights
from tests.support.hub import Hub
from tests.unit.deployments.places import Place, get, safetensors

ADAPTERS, SIZE, ROOM = 200, 10_000, 40


async def use(weights: Weights, source: str) -> None:
    (await get(weights, source)).release()


def put_adapters(hub: Hub) -> list[str]:
    """Each differs, for files of equal content are one."""
    for number in range(ADAPTERS):
        hub.files[f"/{number}.safetensors"] = safetensors(SIZE + number)
    return [f"{hub.url}/{number}.safetensors" for number in range(ADAPTERS)]


async def test_t28_ever_other_adapters_stay_within_the_bound(place: Place, hub: Hub) -> None:
    urls, cap = put_adapters(hub), ROOM * (SIZE + ADAPTERS + 100)
    weights = place.open(cache_bytes=cap)
    for round_ in range(2):
        for at in range(0, ADAPTERS, 20):  # two tenants at once, in opposite orders
            there = urls[at : at + 20]
            back = urls[::-1][at : at + 20]
            await asyncio.gather(*(use(weights, url) for url in (*there, *back)))
            kept = sum(path.stat().st_size for path in place.cache.glob("*.safetensors"))
            assert kept <= cap, (round_, at)
    assert place.kept(".part") == set()
    assert max(hub.asked.values()) <= 8  # not one download for every use


async def test_t28_what_is_used_by_many_at_once_is_fetched_once(place: Place, hub: Hub) -> None:
    urls = put_adapters(hub)[:10]
    weights = place.open()
    await asyncio.gather(*(use(weights, url) for _ in range(50) for url in urls))
    assert {hub.asked[f"/{number}.safetensors"] for number in range(10)} == {1}


async def test_t28_what_one_tenant_holds_is_not_taken_away_by_the_other(place: Place, hub: Hub) -> None:
    urls = put_adapters(hub)
    weights = place.open(cache_bytes=ROOM * (SIZE + ADAPTERS + 100))
    with await get(weights, urls[0]) as path:
        for url in urls[1:100]:
            await use(weights, url)
        assert path.read_bytes() == safetensors(SIZE)
    assert hub.asked["/0.safetensors"] == 1
