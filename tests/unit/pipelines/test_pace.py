"""What is measured of forwards, and what follows from it."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.batching import Steps
from pipelines import zoo
from pipelines.engine.pace import Curve, Pace
from pipelines.engine.sample import Sample
from pipelines.pacing import measured, probes
from pipelines.registry import ENDPOINTS
from schemas.settings import ModelSettings
from tests.support.engine import NOTHING

GAINS = Curve(1024, {1: 1.0, 2: 1.1, 4: 1.6, 8: 3.2})
FULL = Curve(4096, {1: 4.0, 2: 7.9})


def test_rows_are_the_fewest_that_are_about_as_quick_as_can_be() -> None:
    assert (GAINS.rows, FULL.rows) == (4, 1)


def test_what_was_not_measured_is_taken_to_be_between_or_beyond() -> None:
    assert [GAINS.took(rows) for rows in (0.5, 1, 3, 8, 16)] == pytest.approx([1, 1, 1.35, 3.2, 6.4])


def test_a_shape_that_was_not_measured_is_like_the_nearest() -> None:
    pace = Pace((GAINS, FULL))
    assert pace.worth(1024) == 4096
    assert pace.worth(768) == 4096
    assert pace.worth(4096) == 4096
    assert pace.worth(9000) == 9000, "one always fits"
    assert pace.work(2048, 2048) == pytest.approx(1.1)


def test_rows_that_are_set_count_whatever_was_measured() -> None:
    assert Pace((GAINS,), rows=2).worth(1024) == 2048
    assert Pace().worth(1024) == sys.maxsize
    assert Pace().work(1024, 4096) == 4096


@pytest.mark.parametrize("endpoint_id", ENDPOINTS)
def test_every_endpoint_can_be_measured(endpoint_id: str, flux_folder: Path) -> None:
    endpoint, root = ENDPOINTS[endpoint_id], flux_folder.parent
    folders = {"flux": flux_folder, "sd": zoo.locate("sdxl", root)}
    settings = ModelSettings(
        model=str(folders[endpoint.family]),
        controlnet=str(zoo.locate("sdxl-canny", root)),
        endpoints=(endpoint_id,),
        max_sequence_length=32,
    )
    kind = endpoint.pipeline().Pipeline
    model = kind.model_type.load(settings, Path)
    with probes(kind(model), endpoint.schema(), settings, sides=(64, 128)) as samples:
        small, large = (sample.cost for sample in samples)
        pace = measured(model.predict, samples, budget=4 * small, limit_s=600)
    assert large == 4 * small
    assert [curve.cost for curve in pace.curves] == [small, large]
    assert {1, 2} <= pace.curves[0].seconds.keys() <= {1, 2, 4}
    assert pace.curves[1].seconds.keys() == {1}


class Device:
    """A model whose forwards take simulated time: the clock that is given with it."""

    def __init__(self, took: dict[int, float]) -> None:
        self.now, self.rows, self._took = 0.0, list[int](), took

    def __call__(self) -> float:
        return self.now

    def predict(self, samples: Sequence[Sample]) -> list[Tensor]:
        self.rows.append(len(samples))
        if len(samples) not in self._took:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.now += self._took[len(samples)]
        return [torch.zeros(1) for _ in samples]


def probe(cost: int) -> Sample:
    return Sample("", Steps(1, cost), NOTHING)


def test_rows_are_doubled_until_that_gains_nothing() -> None:
    device = Device({1: 1.0, 2: 1.2, 4: 2.4, 8: 4.8})
    [curve] = measured(device.predict, [probe(16)], budget=1000, limit_s=60, clock=device).curves
    assert curve.seconds == pytest.approx({1: 1.0, 2: 1.2, 4: 2.4})
    assert curve.rows == 2


def test_no_forward_is_measured_beyond_the_budget_or_beyond_the_memory() -> None:
    device = Device({1: 1.0, 2: 1.1, 4: 1.2})
    assert measured(device.predict, [probe(16)], budget=40, limit_s=60, clock=device).worth(16) == 32
    assert measured(device.predict, [probe(16)], budget=1000, limit_s=60, clock=device).worth(16) == 64


def test_measuring_ends_when_its_time_is_over() -> None:
    device = Device({1: 3.0, 2: 3.1, 4: 3.2, 8: 3.3})
    pace = measured(device.predict, [probe(16), probe(32)], budget=1000, limit_s=10, clock=device)
    assert [list(curve.seconds) for curve in pace.curves] == [[1]]
    assert device.now <= 10
