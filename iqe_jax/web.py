"""The service's addresses as a FastAPI application, and who may ask: token, host, origin.

What an answer takes is worked out in service.py; serve.py reads the command line and opens the port.
"""

import base64
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from iqe_jax.batching import Limits
from iqe_jax.calibration import Calibration
from iqe_jax.detector import Detector
from iqe_jax.service import RAW, Log, Picture, Result, Service, View, view

PAGE = Path(__file__).parent / "templates" / "serve.html"
ADDRESSES = {"/", "/predict", "/heatmap", "/model", "/health", "/metrics", "/openapi.json"}
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Problem(BaseModel):
    """Why a request was not answered, in one line."""

    detail: str


class Health(BaseModel):
    """Whether scans can be sent. The port opens once the model is compiled."""

    status: Literal["ready"]
    token_required: bool


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": what}
    for status, what in {
        400: "the request is broken, or its host is not served here",
        401: "a token is needed",
        403: "asked from a page of another origin",
        408: "the upload took too long",
        413: "more bytes, pixels or frames than allowed",
        415: "a content type that holds no scan",
        422: "a scan that cannot be used, or a parameter out of range",
        500: "a fault of the service",
        503: "too many requests inside; come back after Retry-After seconds",
    }.items()
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
BODY = {
    "requestBody": {
        "required": True,
        "description": "One scan: PNG, JPEG, TIFF, BMP, DICOM or NIfTI, as a form's field `file` or as it is.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
            "image/png": _BINARY,
            "image/jpeg": _BINARY,
            **dict.fromkeys(RAW[:3], _BINARY),
        },
    }
}


def create_app(
    detector: Detector,
    *,
    about: dict[str, Any],
    calibrated: Calibration | None = None,
    prevalence: float | None = None,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Sequence[str] = LOOPBACK_HOSTS,
    log: Log | None = None,
    log_name: Log | None = None,
) -> FastAPI:
    """The application around a detector, as yet without a port. Its start compiles the model.

    Args:
        detector: the model.
        about: what /model says, as `iqe_jax.export.describe` makes it.
        calibrated: the run's calibration; without one, answers hold raw scores only.
        prevalence: share of anomalous images where scans come from; by default that of the calibration's pool.
        limits: see Limits.
        token: what has to follow `Authorization: Bearer`; None asks for nothing.
        hosts: values of the Host header, without port, that are served; "*" serves all.
        log: is given a line for every request, without names of files.
        log_name: is given a line for every scan, with its name.
    """
    service = Service(detector, calibrated, limits or Limits(), log_name, prevalence)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="iqe-jax",
        summary="Finds anomalies in medical images. Not a medical device.",
        version="1",
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses={status: PROBLEMS[status] for status in (400, 500)},
    )
    app.add_middleware(_Guard, service=service, hosts=tuple(hosts), log=log)
    bearer = HTTPBearer(auto_error=False, description="needed where the service was started with a token")

    def authorised(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        said = given.credentials if given else ""
        if token is not None and not secrets.compare_digest(said.encode(), token.encode()):
            raise HTTPException(401, "a token is needed: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})

    asks: dict[str, Any] = {"dependencies": [Depends(authorised)]} if token is not None else {}
    scans = asks | {
        "openapi_extra": BODY,
        "responses": {s: PROBLEMS[s] for s in PROBLEMS if s != 401 or token is not None},
    }
    refused: dict[int | str, dict[str, Any]] = {401: PROBLEMS[401]} if token is not None else {}

    @app.post("/predict", response_model=Result, **scans)
    async def predict(
        request: Request,
        view: Annotated[View, Depends(view)],
        include: Annotated[
            list[Picture] | None,
            Query(description="pictures of each frame: `image` as shown, `map` with 16-bit values, `overlay` of both"),
        ] = None,
    ) -> Response:
        """Score a scan, frame by frame."""
        result = await service.analyse(request, view, include or ())
        return Response(result.model_dump_json(), media_type="application/json")

    png = {200: {"content": {"image/png": {}}, "description": "a PNG; X-Score and X-Frame say whose it is"}}

    @app.post("/heatmap", response_class=Response, **(scans | {"responses": scans["responses"] | png}))
    async def heatmap(
        request: Request,
        view: Annotated[View, Depends(view)],
        kind: Annotated[Picture, Query(description="which picture")] = "overlay",
        frame: Annotated[int | None, Query(ge=0, description="frame; by default the most anomalous")] = None,
    ) -> Response:
        """The heat map of one frame as a PNG."""
        result = await service.analyse(request, view, [kind], only=frame, best=True)
        found = next(f for f in result.frames if f.index == result.frame)
        headers = {"X-Score": f"{found.score:.6g}", "X-Frame": str(found.index)}
        return Response(base64.b64decode(getattr(found, kind)), media_type="image/png", headers=headers)

    @app.get("/model", responses=refused, **asks)
    async def model() -> dict[str, Any]:
        """What the model is, how its weights were chosen and what its score means."""
        return about

    @app.get("/health")
    async def health() -> Health:
        """Whether scans can be sent."""
        return Health(status="ready", token_required=token is not None)

    @app.get("/metrics", response_class=PlainTextResponse, responses=refused, **asks)
    async def metrics() -> Response:
        """Counters in Prometheus's text format."""
        text = service.meters.text(queue=service.batcher.waiting, inside=service.inside)
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        text = PAGE.read_text(encoding="utf-8").replace("{nonce}", nonce)
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY.format(nonce=nonce)})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, fault: RequestValidationError) -> JSONResponse:
        first = fault.errors()[0]
        return JSONResponse({"detail": f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"}, 422)

    @app.exception_handler(Exception)
    async def failed(_: Request, fault: Exception) -> JSONResponse:
        return JSONResponse({"detail": f"a fault of the service ({type(fault).__name__}); its log says more"}, 500)

    return app


class _Guard:
    """Refuses strange hosts and pages of other origins, adds headers, counts and logs."""

    def __init__(self, app: ASGIApp, service: Service, hosts: tuple[str, ...], log: Log | None):
        self._app, self._service, self._hosts, self._log = app, service, hosts, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            refusal = self._refusal(Headers(scope=scope))
            await (refusal or self._app)(scope, receive, send_guarded)
        finally:
            path = scope["path"] if scope["path"] in ADDRESSES else "other"
            self._service.meters.requests[path, status] += 1
            if self._log is not None:
                self._log(f"{scope['method']} {path} {status}")

    def _refusal(self, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        # A name that was made to point here (DNS rebinding) would let its page read what it asks for.
        if "*" not in self._hosts and _without_port(host) not in self._hosts:
            return JSONResponse({"detail": "this host is not served here: see --allow-host"}, 400)
        origin = headers.get("origin")
        if origin is not None and _host_of(origin) != host:
            return JSONResponse({"detail": "pages of other origins may not ask"}, 403)
        return None


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # a bracket too few
        return ""


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
