"""The OpenAPI file of the server, made of the types in protocol.py."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gpt_jax.serve import protocol as p

JSON, EVENTS = "application/json", "text/event-stream"

OPERATIONS: dict[str, tuple[type[BaseModel] | None, type[BaseModel] | None, str]] = {
    "/v1/models": (None, p.ModelList, "The models that are served."),
    "/v1/models/{model}": (None, p.ModelCard, "One of them."),
    "/v1/completions": (p.CompletionRequest, p.Completion, "Goes on with texts. With `stream`, by events."),
    "/v1/chat/completions": (p.ChatRequest, p.ChatCompletion, "Answers a conversation. With `stream`, by events."),
    "/v1/embeddings": (p.EmbeddingRequest, p.Embeddings, "Embeds texts."),
    "/tokenize": (p.TokenizeRequest, p.Tokens, "The tokens of a text, or of a conversation."),
    "/detokenize": (p.DetokenizeRequest, p.Text, "The text of tokens."),
    "/tokenizer_info": (None, p.TokenizerInfo, "What lm_eval asks of a tokenizer."),
    "/health": (None, p.Health, "200 once all is compiled, else 503."),
    "/metrics": (None, None, "Prometheus."),
}
"""The types of a path's request, which is a POST if it has one, and of its answer; and what it does."""

ERRORS = {
    "400": "The request is wrong; the message says where.",
    "401": "It lacks a key.",
    "403": "It comes from the page of another server.",
    "404": "There is no such model.",
    "408": "The body did not come in time.",
    "413": "It is too long.",
    "429": "The queue is full; Retry-After says when to come again.",
    "500": "The engine failed.",
    "503": "The server is not ready, or stops.",
}


def document(version: str, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI file."""
    types = {t for asked, said, _ in OPERATIONS.values() for t in (asked, said) if t} | {p.ChatChunk, p.ErrorResponse}
    modes: list[Any] = [(t, "validation" if issubclass(t, p.Asked) else "serialization") for t in types]
    references, schemas = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    schema = {t: references[t, mode] for t, mode in modes}
    paths: dict[str, Any] = {}
    for path, (asked, said, what) in OPERATIONS.items():
        content: dict[str, Any] = {JSON: {"schema": schema[said]}} if said else {"text/plain": {}}
        if said in (p.Completion, p.ChatCompletion):
            content[EVENTS] = {"schema": {"type": "string"}}
        answers: dict[str, Any] = {"200": {"description": what, "content": content}}
        for status, why in ERRORS.items():
            answers[status] = {"description": why, "content": {JSON: {"schema": schema[p.ErrorResponse]}}}
        if path == "/health":
            answers["503"] = {"description": "Not ready.", "content": {JSON: {"schema": schema[p.Health]}}}
        operation: dict[str, Any] = {"summary": what, "responses": answers}
        if asked:
            operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema[asked]}}}
        if "{model}" in path:
            operation["parameters"] = [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            ]
        paths[path] = {"post" if asked else "get": operation}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "gpt_jax", "version": version},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }
    if needs_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found
