"""Which application serves which endpoint."""

from typing import Any

from pydantic import Field, model_validator

from schemas.settings.base import Settings


class ModelEntry(Settings):
    """What the front knows of a model application."""

    endpoints: tuple[str, ...] = Field(min_length=1, description="endpoint ids that it serves")
    window: int = Field(
        10,
        ge=1,
        description="requests handed to Serve at once: replicas × concurrency and a little; the last two "
        "places are for normal priority",
    )
    run_limit_s: float | None = Field(
        None,
        gt=0,
        description="a request that has run for so long fails with 504, its wait for a "
        "replica not counted; null: no limit",
    )
    prefetch: int = Field(
        16, ge=0, description="requests behind a full window whose weights are fetched meanwhile; 0: none"
    )
    licence: str | None = Field(None, max_length=100, description="of the weights, as callers are told")
    hardware: str | None = Field(None, max_length=100, description="what it runs on, as callers are told")
    example: dict[str, Any] | None = Field(
        None,
        description="fields to try it with, over those of the endpoints' own examples where they have them",
    )


class Catalogue(Settings):
    """The `user_config` of gateway and dispatcher: which application serves which endpoint."""

    models: dict[str, ModelEntry]

    @model_validator(mode="after")
    def _one_model_per_endpoint(self) -> "Catalogue":
        seen: dict[str, str] = {}
        for model, entry in self.models.items():
            for endpoint_id in entry.endpoints:
                if endpoint_id in seen:
                    raise ValueError(f"{endpoint_id} is served by both {seen[endpoint_id]} and {model}")
                seen[endpoint_id] = model
        return self

    def routes(self) -> dict[str, str]:
        """Endpoint id → application name."""
        return {endpoint_id: model for model, entry in self.models.items() for endpoint_id in entry.endpoints}
