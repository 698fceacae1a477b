"""The comparison of whole servers runs to its end beside the smallest of them, and judges fairly."""

from pathlib import Path

import pytest
from diffusers import FluxPipeline

from benchmarks import servers
from benchmarks.adapters import NAMES, write_loras
from benchmarks.measure import Row
from benchmarks.peers import peer
from benchmarks.stock import Stock, read
from pipelines import zoo


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_server_draws_what_the_pipeline_does_and_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "SHAPES": ((64, 2),),
        "SECONDS": 0.1,
        "WARM_UP_S": 0,
        "REPEATS": 1,
        "MANY": 2,
    }.items():
        monkeypatch.setattr(servers, name, value)
    loras = tmp_path / "loras"
    write_loras(loras, FluxPipeline.from_pretrained(zoo.locate("flux")).transformer, NAMES)
    stock = Stock(loras)
    with peer("benchmarks.fastapi_stock", loras) as server:
        found = {"FastAPI": servers.Contender(server)}
        servers.check(stock, found)
        noops = servers.noops(found)
        small = servers.small(stock, found)
        pictures = servers.pictures(found, 2)
    assert [row["at once"] for row in noops] == [1, 2]
    assert [row["by"] for row in small] == ["our pipeline, in-process", "diffusers, in-process", "FastAPI"]
    assert [row["work"] for row in pictures] == list(servers.WORK)
    assert all(row["p50 ms"] != [0.0] for row in (*noops, *small, *pictures))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_requests_of_one_call_have_their_own_loras(tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    write_loras(loras, FluxPipeline.from_pretrained(zoo.locate("flux")).transformer, NAMES[:2])
    stock = Stock(loras)
    one, two = (read(servers.remake(number, 64, 2)) for number in range(2))
    alone = [stock.draw([request])[0].tobytes() for request in (one, two)]
    assert [picture.tobytes() for picture in stock.draw([one, two])] == alone
    exchanged = read(servers.remake(0, 64, 2) | {"loras": [{"path": NAMES[1]}]})
    assert stock.draw([exchanged])[0].tobytes() != alone[0]


def calls(at_once: int, **cpu_ms: float) -> list[Row]:
    return [{"at once": float(at_once), "by": name, "CPU-ms": [cost]} for name, cost in cpu_ms.items()]


@pytest.mark.parametrize(("few", "many", "verdict"), [(2.9, 1.9, "met"), (1.0, 3.1, "MISSED")])
def test_a_call_without_work_may_cost_so_much_more(few: float, many: float, verdict: str) -> None:
    plain = {servers.HAPROXY: 1.0}
    rows = calls(1, darkroom=few, **plain) + calls(8, darkroom=many, **plain)
    assert servers.noop_aim(rows).endswith(verdict)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ({"LitServe": 1.2, "Ray Serve": 1.1}, "met"),
        ({"LitServe": 1.2, "Ray Serve": 0.9}, "MISSED, behind Ray Serve at 128 px"),
    ],
)
def test_ours_is_to_be_ahead_of_all_with_different_loras(ratios: dict[str, float], verdict: str) -> None:
    common: Row = {"size": "128 px", "at once": 8.0}
    rows: list[Row] = [
        {**common, "work": "start picture, a LoRA each", "by": by, "ratio": [ratio]}
        for by, ratio in {servers.OURS: 1.0, **ratios}.items()
    ]
    rows.append({**common, "work": "text", "by": "LitServe", "ratio": [0.5]})
    assert servers.pictures_aim(rows).endswith(verdict)
