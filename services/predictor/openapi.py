"""The OpenAPI document: the fixed routes, and one predict path per live model with that model's real schemas."""

from collections.abc import Iterable

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from services.predictor.checking import MAX_ITEMS
from services.predictor.feedback import feedback_schema
from services.predictor.models import LiveModel

PREDICT_ROUTE = "/v1/{name}/predict"
FEEDBACK_ROUTE = "/v1/{name}/feedback"

_REFUSAL = {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}}


def build_openapi(app: FastAPI, models: Iterable[LiveModel]) -> dict:
    """The document for these models."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Refusal"] = {
        "type": "object",
        "properties": {"detail": {"type": "string"}, "problems": {"type": "array", "items": {"type": "object"}}},
        "required": ["detail", "problems"],
    }
    del document["paths"][PREDICT_ROUTE], document["paths"][FEEDBACK_ROUTE]
    for model in sorted(models, key=lambda model: model.name):
        schemas[f"{model.name}.item"] = model.bundle.input_schema
        schemas[f"{model.name}.reply"] = model.bundle.output_schema
        document["paths"][PREDICT_ROUTE.format(name=model.name)] = {"post": _predict_operation(model)}
        if (schema := feedback_schema(model)) is not None:
            schemas[f"{model.name}.feedback"] = schema
            document["paths"][FEEDBACK_ROUTE.format(name=model.name)] = {"post": _feedback_operation(model)}
    return document


def _predict_operation(model: LiveModel) -> dict:
    return {
        "summary": f"Ask {model.name} (version {model.version})",
        "operationId": f"predict_{model.name}",
        "requestBody": _items_body(f"{model.name}.item"),
        "responses": {
            "200": {
                "description": "One reply per item, in order",
                "content": {
                    "application/json": {
                        "schema": {
                            "type": "object",
                            "properties": {
                                "name": {"type": "string"},
                                "version": {"type": "string"},
                                "id": {"type": "string", "description": "of this reply; feedback names it"},
                                "replies": {"type": "array", "items": {"$ref": f"#/components/schemas/{model.name}.reply"}},
                            },
                            "required": ["name", "version", "id", "replies"],
                        }
                    }
                },
            },
            "404": {"description": "No such model is live", "content": _REFUSAL},
            "413": {"description": "The body is too large", "content": _REFUSAL},
            "422": {"description": "The body or an item does not keep the schema", "content": _REFUSAL},
            "503": {"description": "Too many requests are waiting; see Retry-After", "content": _REFUSAL},
        },
    }


def _feedback_operation(model: LiveModel) -> dict:
    return {
        "summary": f"Tell {model.name} what its answers should have been",
        "operationId": f"feedback_{model.name}",
        "requestBody": _items_body(f"{model.name}.feedback"),
        "responses": {
            "202": {"description": "All items are stored"},
            "404": {"description": "No such model is live", "content": _REFUSAL},
            "413": {"description": "The body is too large", "content": _REFUSAL},
            "422": {"description": "The body or an item does not keep the schema", "content": _REFUSAL},
            "503": {"description": "The items were not stored: send them again; see Retry-After", "content": _REFUSAL},
        },
    }


def _items_body(schema: str) -> dict:
    items = {"type": "array", "minItems": 1, "maxItems": MAX_ITEMS, "items": {"$ref": f"#/components/schemas/{schema}"}}
    content = {"type": "object", "properties": {"items": items}, "required": ["items"], "additionalProperties": False}
    return {"required": True, "content": {"application/json": {"schema": content}}}
