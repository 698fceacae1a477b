"""Which endpoints exist: one line each. Strings only, so that a gateway learns them without torch.

The stem names the schema module (`schemas.endpoints.<stem>`) and the pipeline module
(`pipelines.<family>.<stem>`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from schemas.fields import EndpointInput


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint: its id, the model family that runs it, the stem of its modules."""

    id: str
    family: str
    stem: str

    def schema(self) -> ModuleType:
        """The module with Input, Output and EXAMPLE."""
        return import_module(f"schemas.endpoints.{self.stem}")

    def input_type(self) -> type[EndpointInput]:
        kind: type[EndpointInput] = self.schema().Input
        return kind

    def pipeline(self) -> ModuleType:
        """The module with the Pipeline class; imports torch."""
        return import_module(f"pipelines.{self.family}.{self.stem}")


_TABLE = (
    Endpoint("fal-ai/flux/dev", "flux", "flux_dev"),
    Endpoint("fal-ai/flux-lora/image-to-image", "flux", "flux_lora_image_to_image"),
    Endpoint("fal-ai/flux-general/rf-inversion", "flux", "flux_general_rf_inversion"),
    Endpoint(
        "fal-ai/fast-sdxl-controlnet-canny/image-to-image",
        "sd",
        "fast_sdxl_controlnet_canny_image_to_image",
    ),
    Endpoint("fal-ai/lora/image-to-image", "sd", "lora_image_to_image"),
)

ENDPOINTS: Mapping[str, Endpoint] = {endpoint.id: endpoint for endpoint in _TABLE}
assert len(ENDPOINTS) == len(_TABLE), "two endpoints share an id"


def endpoint(endpoint_id: str) -> Endpoint:
    """The endpoint with this id. Raises KeyError that lists the known ones."""
    try:
        return ENDPOINTS[endpoint_id]
    except KeyError:
        known = ", ".join(sorted(ENDPOINTS))
        raise KeyError(f"unknown endpoint {endpoint_id!r}; known: {known}") from None
