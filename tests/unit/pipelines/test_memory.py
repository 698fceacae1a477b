"""Work that finds no memory."""

import pytest
import torch

from pipelines.engine.memory import ran_out, with_room
from schemas.errors import OutOfMemory

PEBIBYTE = 1 << 50


class Work:
    """Fails as often as it is told, with torch's own error."""

    def __init__(self, failures: int) -> None:
        self.calls = 0
        self._failures = failures

    def __call__(self, answer: str) -> str:
        self.calls += 1
        if self.calls <= self._failures:
            torch.empty(PEBIBYTE, dtype=torch.uint8)
        return answer


def test_t29_work_that_found_no_memory_is_tried_once_more() -> None:
    work = Work(failures=1)
    assert with_room(work, "done") == "done"
    assert work.calls == 2


def test_t29_and_never_a_third_time() -> None:
    work = Work(failures=9)
    with pytest.raises(OutOfMemory, match="smaller size") as raised:
        with_room(work, "done")
    assert work.calls == 2
    assert (raised.value.status, raised.value.error_type) == (500, "out_of_memory")


def test_t29_the_failures_frames_hold_nothing_when_it_is_tried_again() -> None:
    class Large:
        alive = 0

        def __init__(self) -> None:
            Large.alive += 1

        def __del__(self) -> None:
            Large.alive -= 1

    seen: list[int] = []

    def work() -> None:
        seen.append(Large.alive)
        large = Large()
        raise torch.OutOfMemoryError(f"no room for {large}")

    with pytest.raises(OutOfMemory):
        with_room(work)
    assert seen == [0, 0]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (torch.AcceleratorError("CUDA error: out of memory", 2), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_t29_what_counts_as_no_memory(error: Exception, is_memory: bool) -> None:
    assert ran_out(error) is is_memory


def test_t29_other_faults_are_passed_on_at_once() -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        with_room(work)
    assert calls == [1]
