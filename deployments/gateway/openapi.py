"""OpenAPI 3.0.4 of an endpoint's queue, in the form of fal's own documents.

Where those are not valid OpenAPI 3.0 (`exclusiveMinimum: 0`, `examples`) or not true here (the answer to
a cancel, the 202 of a status), these are.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from deployments.gateway.descriptions import Description, describe, type_name
from pipelines.registry import Endpoint

VERSION = "3.0.4"

_REF = "#/components/schemas/"
# JSON Schema's words that OpenAPI 3.0 does not have.
_UNKNOWN = ("$defs", "const", "examples", "propertyNames", "prefixItems", "discriminator")

_STATUS_PROPERTIES: Mapping[str, Any] = {
    "status": {"type": "string", "enum": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]},
    "request_id": {"type": "string", "description": "The request id."},
    "gateway_request_id": {"type": "string", "description": "The request id again."},
    "response_url": {"type": "string", "description": "The response url."},
    "status_url": {"type": "string", "description": "The status url."},
    "cancel_url": {"type": "string", "description": "The cancel url."},
    "logs": {
        "type": "array",
        "nullable": True,
        "description": "The logs, if they were asked for.",
        "items": {"type": "object", "additionalProperties": True},
    },
    "metrics": {"type": "object", "description": "The metrics.", "additionalProperties": True},
    "queue_position": {"type": "integer", "description": "How many requests run before this one."},
    "preview": {
        "type": "object",
        "description": "In a status stream, the output as it would be now, if it was asked for.",
        "additionalProperties": True,
    },
    "error": {"type": "string", "description": "Why the request failed, once it has."},
    "error_type": {"type": "string", "description": "The kind of the error."},
}

_FAULT: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "loc": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
        "msg": {"type": "string"},
        "type": {"type": "string"},
        "ctx": {"type": "object", "additionalProperties": True},
    },
    "required": ["loc", "msg", "type"],
}

_OWN_SCHEMAS: Mapping[str, Any] = {
    "QueueStatus": {
        "type": "object",
        "properties": _STATUS_PROPERTIES,
        "required": ["status", "request_id"],
    },
    "CancelStatus": {
        "type": "object",
        "properties": {"status": {"type": "string"}, "message": {"type": "string"}},
        "required": ["status"],
    },
    "Error": {
        "type": "object",
        "properties": {
            "detail": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": f"{_REF}Fault"}}]},
            "error_type": {"type": "string"},
            "message": {"type": "string"},
        },
        "required": ["detail", "message"],
    },
    "Fault": _FAULT,
}


def document(endpoint: Endpoint, base_url: str, example: Mapping[str, Any] | None) -> dict[str, Any]:
    """The document of an endpoint on the server at `base_url`.

    Fields of `example` that the endpoint has go over those of its own example.
    """
    name, about = type_name(endpoint), describe(endpoint)
    types = _types(endpoint)
    taken = types[f"{name}Input"]
    theirs = {field: value for field, value in (example or {}).items() if field in taken["properties"]}
    tried = {f"{name}Input": {**taken, "example": taken["example"] | theirs}}
    return {
        "openapi": VERSION,
        "info": _info(about, base_url),
        "components": {
            "securitySchemes": {
                "apiKeyAuth": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "Key ID:SECRET",
                }
            },
            "schemas": {**_OWN_SCHEMAS, **types, **tried},
        },
        "paths": _paths(about.id, f"{name}Input", f"{name}Output"),
        "servers": [{"url": f"{base_url}/queue"}],
        "security": [{"apiKeyAuth": []}],
    }


def _info(about: Description, base_url: str) -> dict[str, Any]:
    return {
        "title": f"Queue OpenAPI for {about.id}",
        "version": "1.0.0",
        "description": f"The OpenAPI schema for the {about.id} queue.",
        "x-fal-metadata": {
            "endpointId": about.id,
            "category": about.category,
            "playgroundUrl": f"{base_url}/playground/{about.id}",
            "documentationUrl": f"{base_url}/openapi/{about.id}",
        },
    }


def _paths(endpoint_id: str, input_name: str, output_name: str) -> dict[str, Any]:
    request = f"/{endpoint_id}/requests/{{request_id}}"
    request_id = {
        "name": "request_id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "description": "Request ID"},
    }
    logs = {
        "name": "logs",
        "in": "query",
        "required": False,
        "schema": {
            "type": "number",
            "description": "Whether to include logs (`1`) in the response or not (`0`).",
        },
    }
    submit = {
        "requestBody": {"required": True, "content": _json(input_name)},
        "responses": _responses({"200": ("The request was accepted.", "QueueStatus")}),
    }
    status = {
        "parameters": [request_id, logs],
        "responses": _responses(
            {
                "200": ("The request is completed.", "QueueStatus"),
                "202": ("The request waits or runs.", "QueueStatus"),
            }
        ),
    }
    cancel = {
        "parameters": [request_id],
        "responses": _responses(
            {
                "202": ("The request is being cancelled.", "CancelStatus"),
                "400": ("The request was completed already.", "CancelStatus"),
            }
        ),
    }
    result = {
        "parameters": [request_id],
        "responses": _responses({"200": ("Result of the request.", output_name)}),
    }
    return {
        f"/{endpoint_id}": {"post": submit},
        f"{request}/status": {"get": status},
        f"{request}/cancel": {"put": cancel},
        request: {"get": result},
    }


def _responses(good: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    told = {**good, "default": ("Why it could not be done.", "Error")}
    return {
        status: {"description": description, "content": _json(name)}
        for status, (description, name) in told.items()
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"{_REF}{name}"}}}


@cache
def _types(endpoint: Endpoint) -> dict[str, Any]:
    """The schemas of an endpoint's Input and Output, and of the objects in them."""
    schema, name = endpoint.schema(), type_name(endpoint)
    types = [(schema.Input, "validation"), (schema.Output, "serialization")]
    found, made = models_json_schema(types, ref_template=_REF + "{model}")  # type: ignore[arg-type]
    refs = [found[each]["$ref"].removeprefix(_REF) for each in types]  # type: ignore[index]
    names = dict(zip(refs, (f"{name}Input", f"{name}Output"), strict=True))
    converted = {names.get(each, each): _converted(value) for each, value in made["$defs"].items()}
    for renamed in names.values():
        converted[renamed]["title"] = renamed
    converted[f"{name}Input"]["example"] = schema.EXAMPLE
    return converted


def _converted(value: Any) -> Any:
    """JSON Schema 2020-12, as pydantic writes it → OpenAPI 3.0's own dialect."""
    if isinstance(value, list):
        return [_converted(each) for each in value]
    if not isinstance(value, dict):
        return value
    schema = {name: _converted(each) for name, each in value.items() if name not in _UNKNOWN}
    if "const" in value:
        schema["enum"] = [value["const"]]
    for bound, closed in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(bound), int | float):
            schema |= {closed: schema[bound], bound: True}
    if "$ref" in schema and len(schema) > 1:  # beside a reference nothing counts
        schema["allOf"] = [{"$ref": schema.pop("$ref")}]
    if isinstance(value.get("properties"), dict):
        schema["properties"] = {name: _converted(each) for name, each in value["properties"].items()}
        schema["x-fal-order-properties"] = list(value["properties"])
    return _without_null(schema)


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI 3.0 has no type of null, but a flag beside a type."""
    options = schema.get("anyOf")
    if not isinstance(options, list) or {"type": "null"} not in options:
        return schema
    rest = [each for each in options if each != {"type": "null"}]
    plain = {name: each for name, each in schema.items() if name != "anyOf"}
    if plain.get("default", 0) is None:
        del plain["default"]  # absent means the same
    if len(rest) == 1 and "type" in rest[0]:
        return {**rest[0], **plain, "nullable": True}
    null = {"type": "string", "nullable": True, "enum": [None]}
    return {**plain, "anyOf": [*rest, null]}
