"""The OpenAPI document: the fixed routes, and one predict path per live model with that model's real schemas."""

from collections.abc import Iterable

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from services.predictor.checking import MAX_ITEMS
from services.predictor.models import LiveModel

PREDICT_ROUTE = "/v1/{name}/predict"


def build_openapi(app: FastAPI, models: Iterable[LiveModel]) -> dict:
    """The document for these models."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Refusal"] = {
        "type": "object",
        "properties": {"detail": {"type": "string"}, "problems": {"type": "array", "items": {"type": "object"}}},
        "required": ["detail", "problems"],
    }
    del document["paths"][PREDICT_ROUTE]
    for model in sorted(models, key=lambda model: model.name):
        schemas[f"{model.name}.item"] = model.bundle.input_schema
        schemas[f"{model.name}.reply"] = model.bundle.output_schema
        document["paths"][PREDICT_ROUTE.format(name=model.name)] = {"post": _predict_operation(model)}
    return document


def _predict_operation(model: LiveModel) -> dict:
    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}}
    return {
        "summary": f"Ask {model.name} (version {model.version})",
        "operationId": f"predict_{model.name}",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "items": {
                                "type": "array",
                                "minItems": 1,
                                "maxItems": MAX_ITEMS,
                                "items": {"$ref": f"#/components/schemas/{model.name}.item"},
                            }
                        },
                        "required": ["items"],
                        "additionalProperties": False,
                    }
                }
            },
        },
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
                                "replies": {"type": "array", "items": {"$ref": f"#/components/schemas/{model.name}.reply"}},
                            },
                            "required": ["name", "version", "replies"],
                        }
                    }
                },
            },
            "404": {"description": "No such model is live", "content": refusal},
            "413": {"description": "The body is too large", "content": refusal},
            "422": {"description": "The body or an item does not keep the schema", "content": refusal},
            "503": {"description": "Too many requests are waiting; see Retry-After", "content": refusal},
        },
    }
