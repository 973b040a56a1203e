"""The specification of the routes, and a page of it that loads nothing from elsewhere."""

import html
from typing import Any

from hfkit.serving.types import Body

Json = dict[str, Any]
STATUSES = {
    "400": "A parameter is wrong; `param` names it.",
    "401": "A token is needed.",
    "403": "The host is not one that the server answers to.",
    "404": "There is no such model or answer.",
    "408": "The body took too long.",
    "409": "It is too late for that.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too many requests; `Retry-After` says when to ask again.",
    "500": "The server failed; the message has a reference.",
    "503": "The server is stopping or not ready.",
}
ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def of(body: type[Body]) -> Json:
    """Return what the specification says of a route with this body."""
    schema = _inlined(body.model_json_schema())
    answers: Json = {
        "200": {"description": "The answer.", "content": {"application/json": {}, "text/event-stream": {}}}
    }
    for status, text in STATUSES.items():
        answers[status] = {"description": text, "content": {"application/json": {"schema": ERROR}}}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": answers,
    }


def _inlined(schema: Json) -> Json:
    """Return a schema with what it refers to in place."""
    parts = schema.pop("$defs", {})

    def visit(value: Any) -> Any:
        if isinstance(value, dict) and "$ref" in value:
            return visit({**parts[value["$ref"].rsplit("/", 1)[1]], **{k: v for k, v in value.items() if k != "$ref"}})
        if isinstance(value, dict):
            return {key: visit(item) for key, item in value.items()}
        return [visit(item) for item in value] if isinstance(value, list) else value

    return visit(schema)


def page(specification: Json) -> str:
    """Return the routes as HTML."""
    parts = []
    for path, methods in specification["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(route.get('description') or route.get('summary', ''))}</p>")
            content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
            schema = content.get("schema", {})
            needed = schema.get("required", [])
            rows = [
                f"<tr><td><code>{html.escape(name)}</code>{' *' if name in needed else ''}</td>"
                f"<td>{html.escape(_kind(field))}</td><td>{html.escape(field.get('description', ''))}</td></tr>"
                for name, field in schema.get("properties", {}).items()
            ]
            if rows:
                parts += ["<table><tr><th>parameter<th>type<th></tr>", *rows, "</table>"]
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        ":root{color-scheme:light dark}"
        "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25rem .75rem .25rem 0;"
        "vertical-align:top;border-bottom:1px solid #8884}h2{font-size:1rem;margin-top:2rem}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>hfkit serve: routes</title><style nonce="__NONCE__">{style}</style><h1>Routes</h1>'
        "<p>As OpenAI&#39;s API; what is not listed is refused by name. * must be given. "
        f'The whole specification: <a href="/openapi.json">/openapi.json</a>.</p>{"".join(parts)}</html>'
    )


def _kind(field: Json) -> str:
    """Return the type of a field, with its limits."""
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"] if option.get("type") != "null")
    if "enum" in field or "const" in field:
        return " | ".join(map(str, field.get("enum", [field.get("const")])))
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    told = [f"{sign} {field[name]}" for name, sign in limits.items() if name in field]
    kind = str(field.get("type", "object"))
    if kind == "array":
        kind = f"list of {_kind(field.get('items', {}))}"
    return f"{kind} {' and '.join(told)}".strip()
