"""Pictures without HTTP: Ray Serve handles take the typed input and give the typed output.

    darkroom serve                                            # prints `ray at HOST:PORT`
    RAY_AUTH_MODE=token RAY_ADDRESS=HOST:PORT python examples/python_caller.py

Needs darkroom's packages on the path, as everything inside the cluster has them.
"""

import ray
from ray import serve

from schemas.endpoints import flux_dev

ENDPOINT = "fal-ai/flux/dev"


def main() -> None:
    ray.init(namespace="serve", log_to_driver=False)  # the cluster that RAY_ADDRESS names
    request = flux_dev.Input(
        prompt="a lighthouse",
        image_size={"width": 256, "height": 256},
        num_inference_steps=4,
        seed=7,
    )

    # Through the durable queue, like any HTTP request: survives a crash of the worker.
    front = serve.get_app_handle("darkroom")
    queued: flux_dev.Output = front.run.remote(ENDPOINT, request).result()
    print("queued", queued.images[0].url, queued.seed)

    # Straight to the model: no queue, no retry, the least overhead.
    model = serve.get_app_handle("flux")
    direct: flux_dev.Output = model.run.remote(ENDPOINT, request).result()
    print("direct", direct.images[0].url, direct.seed)


if __name__ == "__main__":
    main()
