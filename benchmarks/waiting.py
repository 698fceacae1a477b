"""fal's Python client, many times over, waiting for requests that nobody runs; run by `protocol`.

Says `waiting` when all wait, counts their polls for a while once a line comes in, says how many a second.
"""

import asyncio
import sys
import time

import fal_client
import fal_client.client

from tests.support.jobs import ENDPOINT

FIELDS = {"prompt": "a lighthouse", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}


async def wait(server: str, count: int, interval_s: float, seconds: float) -> float:
    """Polls a second."""
    fal_client.client.QUEUE_URL_FORMAT = f"{server}/queue/"
    polls = 0

    async def follow() -> None:
        nonlocal polls
        handle = await fal_client.AsyncClient(key="any:key").submit(ENDPOINT, FIELDS)
        ready.release()
        async for _ in handle.iter_events(interval=interval_s):
            polls += 1

    ready = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(follow()) for _ in range(count)]
    for _ in range(count):
        await ready.acquire()
    print("waiting", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    asked, began = polls, time.perf_counter()
    await asyncio.sleep(seconds)
    rate = (polls - asked) / (time.perf_counter() - began)
    for task in tasks:
        task.cancel()
    return rate


if __name__ == "__main__":
    server, count, interval_ms, seconds = sys.argv[1:]
    print(asyncio.run(wait(server, int(count), int(interval_ms) / 1e3, float(seconds))), flush=True)
