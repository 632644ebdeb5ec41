"""A small schema registry for demo and sandbox: the part of Confluent's API that clients use, Avro only.

It replaces a real one, as the practice exchange replaces the exchange: in memory, and in a JSON file if one is given.
Ids, versions, error codes and texts are those that clients know from the original.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import fastavro
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from bourse_sandbox.serving import Server, serve
from bourse_schemas.errors import ConfigurationError

Compatible = Callable[[dict[str, Any], dict[int, Any]], list[str]]
"""Return why a new schema may not follow older ones, by their versions: messages, none if it may."""

_LEVELS = ("NONE", "BACKWARD", "BACKWARD_TRANSITIVE", "FORWARD", "FORWARD_TRANSITIVE", "FULL", "FULL_TRANSITIVE")


def serve_registry(
    *,
    port: int = 0,
    file: Path | None = None,
    compatible: Compatible = lambda _new, _old: [],
    tls: Path | None = None,
    wrap: Callable[[Any], Any] = lambda app: app,
) -> Server:
    """Start a registry on 127.0.0.1, by default on a free port, and return when it answers.

    `compatible` decides what may be registered: every level but NONE is as strict as FULL_TRANSITIVE. `tls` is a PEM
    file with key and certificate, `wrap` puts a middleware around the application. Raises
    ConfigurationError if the port is taken or the file was not written by a registry.
    """
    registry = _Registry(file, compatible)
    calls: list[tuple[str, str, _Call]] = [
        ("GET", "/schemas/ids/{id:int}", registry.schema),
        ("GET", "/subjects", registry.subjects),
        ("POST", "/subjects/{subject}", registry.lookup),
        ("GET", "/subjects/{subject}/versions", registry.versions),
        ("POST", "/subjects/{subject}/versions", registry.register),
        ("GET", "/subjects/{subject}/versions/{version}", registry.version),
        ("POST", "/compatibility/subjects/{subject}/versions/{version}", registry.check),
        ("GET", "/config/{subject}", registry.level),
        ("PUT", "/config/{subject}", registry.set_level),
    ]
    routes = [Route(path, _endpoint(call), methods=[method]) for method, path, call in calls]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refusal})
    return serve(wrap(app), port=port, tls=tls)


_Call = Callable[[dict[str, Any], dict[str, Any]], Any]  # (path and query, body) -> answer


class _Registry:
    def __init__(self, file: Path | None, compatible: Compatible) -> None:
        self._file = file
        self._compatible = compatible
        self._schemas: list[str] = []  # as first registered; the one with id 1 first
        self._subjects: dict[str, list[int]] = {}  # ids; version 1 first
        self._levels: dict[str, str] = {}
        if file is not None and file.exists():
            try:
                kept = json.loads(file.read_text(encoding="utf-8"))
                self._schemas, self._subjects, self._levels = kept["schemas"], kept["subjects"], kept["levels"]
            except (OSError, ValueError, KeyError, TypeError):
                raise ConfigurationError(f"{file} is not a schema registry: remove it, or choose another") from None

    def schema(self, at: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        if not 1 <= at["id"] <= len(self._schemas):
            raise _Refused(40403, f"Schema {at['id']} not found")
        return {"schema": self._schemas[at["id"] - 1]}

    def subjects(self, *_: dict[str, Any]) -> list[str]:
        return sorted(self._subjects)

    def versions(self, at: dict[str, Any], _: dict[str, Any]) -> list[int]:
        return list(range(1, len(self._ids(at)) + 1))

    def version(self, at: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        ids, text = self._ids(at), at["version"]
        version = len(ids) if text in {"latest", "-1"} else int(text) if text.isdecimal() else 0
        if not 1 <= version <= len(ids):
            raise _Refused(40402, f"Version {text} not found.")
        return self._entry(at, ids[version - 1])

    def lookup(self, at: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        ids, number = self._ids(at), self._find(_schema_in(body))
        if number not in ids:
            raise _Refused(40403, "Schema not found")
        return self._entry(at, number)

    def register(self, at: dict[str, Any], body: dict[str, Any]) -> dict[str, int]:
        subject, schema = at["subject"], _schema_in(body)
        ids, number = self._subjects.get(subject, []), self._find(schema)
        if number not in ids:
            if faults := self._faults(subject, schema, ids):
                reason = f'Schema being registered is incompatible with an earlier schema for subject "{subject}"'
                raise _Refused(409, f"{reason}: {'; '.join(faults)}")
            if not number:
                self._schemas.append(body["schema"])
                number = len(self._schemas)
            self._subjects[subject] = [*ids, number]
            self._save()
        return {"id": number}

    def check(self, at: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        faults = self._faults(at["subject"], _schema_in(body), [self.version(at, body)["id"]])
        return {"is_compatible": not faults, "messages": faults}

    def level(self, at: dict[str, Any], _: dict[str, Any]) -> dict[str, str]:
        subject = at["subject"]
        if subject not in self._levels:
            raise _Refused(40408, f"Subject '{subject}' does not have subject-level compatibility configured")
        return {"compatibilityLevel": self._levels[subject]}

    def set_level(self, at: dict[str, Any], body: dict[str, Any]) -> dict[str, str]:
        level = body.get("compatibility")
        if level not in _LEVELS:
            raise _Refused(42203, f"Invalid compatibility level. Valid values are {', '.join(_LEVELS)}")
        self._levels[at["subject"]] = level
        self._save()
        return {"compatibility": level}

    def _ids(self, at: dict[str, Any]) -> list[int]:
        if at["subject"] not in self._subjects:
            raise _Refused(40401, f"Subject '{at['subject']}' not found.")
        return self._subjects[at["subject"]]

    def _entry(self, at: dict[str, Any], number: int) -> dict[str, Any]:
        version, schema = self._ids(at).index(number) + 1, self._schemas[number - 1]
        return {"subject": at["subject"], "version": version, "id": number, "schema": schema}

    def _find(self, schema: dict[str, Any]) -> int:
        """Return the id of a schema, whatever its white space and the order of its attributes; 0 if it is new."""
        wanted = json.dumps(schema, sort_keys=True)
        texts = enumerate(self._schemas, 1)
        return next((number for number, text in texts if json.dumps(json.loads(text), sort_keys=True) == wanted), 0)

    def _faults(self, subject: str, schema: dict[str, Any], ids: list[int]) -> list[str]:
        olds = {version: json.loads(self._schemas[number - 1]) for version, number in enumerate(ids, 1)}
        return self._compatible(schema, olds) if olds and self._levels.get(subject) != "NONE" else []

    def _save(self) -> None:
        if self._file is not None:
            new = self._file.with_name(f"{self._file.name}.new")
            kept = {"schemas": self._schemas, "subjects": self._subjects, "levels": self._levels}
            new.write_text(json.dumps(kept, ensure_ascii=False, indent=1), encoding="utf-8")
            new.replace(self._file)


def _schema_in(body: dict[str, Any]) -> dict[str, Any]:
    if body.get("schemaType", "AVRO") != "AVRO" or body.get("references"):
        raise _Refused(42201, "Invalid schema: this small registry has Avro without references only")
    try:
        schema = json.loads(body["schema"])
        fastavro.parse_schema(schema)
    except (KeyError, TypeError, ValueError, fastavro.schema.SchemaParseException) as error:
        raise _Refused(42201, f"Invalid schema: {error}") from None
    if not isinstance(schema, dict):
        raise _Refused(42201, "Invalid schema: it must be a JSON object")
    return schema


class _Refused(HTTPException):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(code // 100 if code > 999 else code, message)  # 40401 is a 404
        self.code = code


async def _refusal(_: Request, error: Exception) -> JSONResponse:
    status = getattr(error, "status_code", 500)
    body = {"error_code": getattr(error, "code", status), "message": getattr(error, "detail", "")}
    return JSONResponse(body, status)


def _endpoint(call: _Call) -> Callable[[Request], Awaitable[JSONResponse]]:
    # Every call runs to its end in the server's one thread, so the state needs no lock.
    async def answer(request: Request) -> JSONResponse:
        try:
            body = {} if request.method in {"GET", "HEAD"} else await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise _Refused(42201, "Invalid request: the body must be a JSON object")
        answered = call({**request.query_params, **request.path_params}, body)
        return JSONResponse(answered, media_type="application/vnd.schemaregistry.v1+json")

    return answer
