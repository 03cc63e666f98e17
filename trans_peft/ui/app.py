"""The web application: pages below /, the same views as JSON below /api, metrics at /metrics.

FastAPI describes the JSON in /api/openapi.json from the types of the views. Every request reads;
there is no route for another method.
"""

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from trans_peft.domain.names import quoted
from trans_peft.errors import InvalidSpecError, NotFoundError, StoreError, TransPeftError
from trans_peft.ports import Platform
from trans_peft.ui.formats import FILTERS, SIGNS, query_url
from trans_peft.ui.headers import SecurityHeaders
from trans_peft.ui.index import FleetPage, FleetQuery, Sort, State
from trans_peft.ui.life import AdapterView, BaseView
from trans_peft.ui.links import Links
from trans_peft.ui.metrics import METRICS_PATH, ByAddress, FleetCollector, metrics_text
from trans_peft.ui.progress import FleetProgress
from trans_peft.ui.reader import FamilyView, Reader, VerdictView
from trans_peft.ui.settings import UiSettings
from trans_peft.ui.snapshots import Snapshots

__all__ = ["create_app"]

_HERE = Path(__file__).parent
_LONGEST_NAME = 100
_SHOWN_BASES = 6
_RETRY_AFTER_S = 10

FamilyQuery = Annotated[FleetQuery, Query()]


def create_app(platform: Platform, settings: UiSettings) -> ASGIApp:
    """Return the application. Its lifespan starts and ends the thread that reads the registry."""
    snapshots = Snapshots(platform, settings.refresh_s)
    links = Links(settings.mlflow_url, settings.prefect_url)
    reader = Reader(platform, snapshots, links)
    pages = _Pages(reader, links, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        snapshots.start()
        yield
        snapshots.stop()

    app = FastAPI(
        title="trans-peft fleet page",
        description="Families, adapters and verdicts, as the registry records them. Read-only.",
        version="1",
        openapi_url="/api/openapi.json",
        docs_url=None,  # these pages load scripts from a content delivery network
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers={
            TransPeftError: pages.error,
            RequestValidationError: pages.error,
            HTTPException: pages.error,
            Exception: pages.error,
        },
    )
    app.include_router(_api(reader))
    app.include_router(pages.router(), include_in_schema=False)
    app.add_route(METRICS_PATH, _metrics(FleetCollector(snapshots)), include_in_schema=False)
    app.mount("/static", StaticFiles(directory=_HERE / "static"))
    checked = TrustedHostMiddleware(app, allowed_hosts=settings.accepted_hosts, www_redirect=False)
    return SecurityHeaders(ByAddress(app, checked))


@dataclass(frozen=True)
class Problem:
    """An error: what is wrong, expected and found, and what to do, as one text."""

    detail: str


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "There is no such name"},
    422: {"model": Problem, "description": "A parameter cannot be used"},
    503: {"model": Problem, "description": "The registry does not respond, or cannot be read"},
}


def _api(reader: Reader) -> APIRouter:
    """Return the routes that respond with JSON."""
    api = APIRouter(
        prefix="/api",
        tags=["fleet"],
        responses=_PROBLEMS,
        dependencies=[Depends(_refuse_unknown_parameters)],
    )

    @api.get("/families")
    def families() -> tuple[FamilyView, ...]:
        """List the base families."""
        return reader.families()

    @api.get("/families/{family}/progress")
    def progress(family: str) -> FleetProgress:
        """Count the verdicts that exist and that are missing, by base version."""
        return reader.progress(family)

    @api.get("/families/{family}/adapters")
    def adapters(family: str, query: FamilyQuery) -> FleetPage:
        """List the adapters of a family with their state on each ready base version."""
        return reader.adapters(family, query)

    @api.get("/families/{family}/adapters/{adapter}")
    def adapter(family: str, adapter: str) -> AdapterView:
        """Show an adapter's versions, and what happened to it on each base version."""
        return reader.adapter(family, adapter)

    @api.get("/families/{family}/adapters/{adapter}/verdicts/{base}")
    def verdict(family: str, adapter: str, base: str) -> VerdictView:
        """Explain a verdict: figures, bounds, and the items whose result changed."""
        return reader.verdict(family, adapter, base)

    @api.get("/families/{family}/bases/{base}")
    def base(family: str, base: str) -> BaseView:
        """Show a base version. Who serves on it: adapters with `serves=true` and `base`."""
        return reader.base(family, base)

    return api


def _refuse_unknown_parameters(request: Request) -> None:
    """InvalidSpecError for a parameter that the address does not have. Pages ignore them."""
    is_list = request.scope["route"].path.endswith("/adapters")
    known = FleetQuery.model_fields if is_list else {}
    unknown = sorted(request.query_params.keys() - known.keys())
    if unknown:
        raise InvalidSpecError(
            f"{', '.join(map(quoted, unknown))}: {request.url.path} has no such parameter",
            expected=", ".join(known) or "no parameters",
            do="read /api/openapi.json",
        )


class _Pages:
    """The routes that respond with pages."""

    def __init__(self, reader: Reader, links: Links, settings: UiSettings) -> None:
        self._reader = reader
        self._links = links
        self._settings = settings
        self._templates = Environment(
            loader=PackageLoader("trans_peft.ui"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(FILTERS)
        self._templates.globals.update(
            signs=SIGNS, states=list(State), sorts=list(Sort), links=links, query_url=query_url
        )

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(default_response_class=HTMLResponse)
        for path, endpoint in (
            ("/", self._families),
            ("/families/{family}", self._family),
            ("/families/{family}/upgrade", self._upgrade),
            ("/families/{family}/adapters/{adapter}", self._adapter),
            ("/families/{family}/adapters/{adapter}/on/{base}", self._verdict),
            ("/families/{family}/bases/{base}", self._base),
        ):
            router.add_api_route(path, endpoint, methods=["GET", "HEAD"])
        router.add_api_route("/health", _health, methods=["GET", "HEAD"])
        router.add_api_route("/favicon.ico", _icon, methods=["GET", "HEAD"])
        return router

    def _families(self, request: Request) -> Response:
        return self._page(request, "families.html", families=self._reader.families())

    def _family(self, request: Request, family: str, query: FamilyQuery) -> Response:
        page = self._reader.adapters(family, query)
        seen = self._reader.snapshot(family)
        bases = seen.index.bases
        shown = [
            column
            for column, base in enumerate(bases)
            if column >= len(bases) - _SHOWN_BASES or base == page.base
        ]
        return self._page(
            request,
            "family.html",
            family=family,
            seen=seen,
            progress=seen.progress,
            page=page,
            query=query,
            columns=shown,
            failure=self._reader.failure(family),
        )

    def _upgrade(self, request: Request, family: str, live: bool = False) -> Response:
        progress = self._reader.progress(family)
        response = self._page(
            request,
            "upgrade.html",
            family=family,
            seen=self._reader.snapshot(family),
            progress=progress,
            failure=self._reader.failure(family),
            live=live,
            refresh_s=round(self._settings.refresh_s),
        )
        if live:
            response.headers["Refresh"] = str(round(self._settings.refresh_s))
        return response

    def _adapter(self, request: Request, family: str, adapter: str) -> Response:
        return self._page(
            request,
            "adapter.html",
            family=family,
            adapter=self._reader.adapter(family, adapter),
            seen=self._reader.snapshot(family),
            failure=self._reader.failure(family),
        )

    def _verdict(self, request: Request, family: str, adapter: str, base: str) -> Response:
        return self._page(
            request,
            "verdict.html",
            family=family,
            verdict=self._reader.verdict(family, adapter, base),
            seen=self._reader.snapshot(family),
            failure=self._reader.failure(family),
        )

    def _base(self, request: Request, family: str, base: str, query: FamilyQuery) -> Response:
        view = self._reader.base(family, base)
        wanted = query.model_copy(update={"base": base, "serves": True})
        return self._page(
            request,
            "base.html",
            family=family,
            base=view,
            query=query,
            page=self._reader.adapters(family, wanted) if view.ready else None,
            seen=self._reader.snapshot(family),
            failure=self._reader.failure(family),
        )

    async def error(self, request: Request, error: Exception) -> Response:
        """Respond to an error of a route, with JSON below /api and a page elsewhere."""
        status, title, text = _described(error)
        if request.url.path.startswith("/api/"):
            response: Response = JSONResponse({"detail": text}, status)
        else:
            response = self._page(request, "error.html", status, title=title, text=text)
        if status == 503:
            response.headers["Retry-After"] = str(_RETRY_AFTER_S)
        return response

    def _page(self, request: Request, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        shown = {"person": self._person(request.headers), **values}
        return HTMLResponse(self._templates.get_template(name).render(shown), status)

    def _person(self, headers: Mapping[str, str]) -> str:
        """Return the name that the proxy passes. It is shown and has no other effect."""
        header = self._settings.person_header
        return headers.get(header, "").strip()[:_LONGEST_NAME] if header else ""


def _described(error: Exception) -> tuple[int, str, str]:
    """Return the status, the title and the text of the response to an error."""
    if isinstance(error, HTTPException):
        text = "there is no such page" if error.status_code == 404 else str(error.detail)
        return error.status_code, "Not found" if error.status_code == 404 else "Not possible", text
    if isinstance(error, RequestValidationError):
        problems = (f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors())
        return 422, "These parameters cannot be used", "\n".join(problems)
    if isinstance(error, NotFoundError):
        return 404, "Not found", str(error)
    if isinstance(error, StoreError):
        return 503, "The registry does not respond", str(error)
    if isinstance(error, InvalidSpecError):
        return 422, "These parameters cannot be used", str(error)
    if isinstance(error, TransPeftError):
        return 503, "The registry has entries that cannot be read", str(error)
    logging.getLogger(__name__).error("a page failed", exc_info=error)
    return (
        500,
        "This page failed",
        "the fleet page has a fault\n  do:       read its log, and report the fault",
    )


def _health() -> Response:
    """Respond that the process answers. Makes no request to the registry."""
    return JSONResponse({"status": "ok"})


def _metrics(collector: FleetCollector) -> Callable[[Request], Response]:
    def metrics(request: Request) -> Response:
        return Response(metrics_text(collector), media_type="text/plain; version=0.0.4")

    return metrics


def _icon() -> Response:
    return RedirectResponse("/static/icon.svg", 301)
