"""The command `ui`: the fleet page."""

import os
from typing import Annotated

from cyclopts import Parameter

from trans_peft.cli.show import stderr
from trans_peft.extras import explaining_missing_extras

__all__ = ["ui"]


def ui(
    *,
    tracking_uri: Annotated[
        str | None,
        Parameter(help="MLflow server. The default is the variable `MLFLOW_TRACKING_URI`."),
    ] = None,
    host: Annotated[
        str, Parameter(help="Address to listen on.", env_var="TRANS_PEFT_UI_HOST")
    ] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port to listen on.", env_var="TRANS_PEFT_UI_PORT")] = 4270,
    allowed_hosts: Annotated[
        str,
        Parameter(
            help="Further names in the Host header, separated by commas, such as "
            "`fleet.example.com` or `*.example.com`. Requests with other names receive 400.",
            env_var="TRANS_PEFT_UI_ALLOWED_HOSTS",
        ),
    ] = "",
    person_header: Annotated[
        str,
        Parameter(
            help="Header in which a proxy passes the name of the person, such as "
            "`X-Forwarded-User`. The page shows the name and does not check it.",
            env_var="TRANS_PEFT_UI_PERSON_HEADER",
        ),
    ] = "",
    mlflow_url: Annotated[
        str | None,
        Parameter(
            help="URL of MLflow's pages for links. The default is the tracking server.",
            env_var="TRANS_PEFT_UI_MLFLOW_URL",
        ),
    ] = None,
    prefect_url: Annotated[
        str | None,
        Parameter(
            help="URL of Prefect's pages for links. The default is `PREFECT_API_URL` without "
            "`/api`.",
            env_var="TRANS_PEFT_UI_PREFECT_URL",
        ),
    ] = None,
    refresh_s: Annotated[
        float,
        Parameter(
            help="Seconds after which an open family is read again, 1 to 86400.",
            env_var="TRANS_PEFT_UI_REFRESH_S",
        ),
    ] = 30.0,
) -> int:
    """Serve the fleet page: families, adapters, verdicts and upgrades, read-only.

    Example: `trans-peft ui --tracking-uri http://127.0.0.1:5500`
    """
    from trans_peft.client import connect

    with explaining_missing_extras():
        from trans_peft.ui.server import serve
        from trans_peft.ui.settings import UiSettings

    tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    prefect_api = os.environ.get("PREFECT_API_URL", "")
    settings = UiSettings(
        host=host,
        port=port,
        allowed_hosts=tuple(name.strip() for name in allowed_hosts.split(",") if name.strip()),
        person_header=person_header,
        mlflow_url=_web_address(tracking_uri) if mlflow_url is None else mlflow_url,
        prefect_url=prefect_api.removesuffix("/").removesuffix("/api")
        if prefect_url is None
        else prefect_url,
        refresh_s=refresh_s,
    )
    platform = connect(tracking_uri or None)
    stderr.print(f"fleet page at {settings.url}")
    serve(platform, settings)
    return 0


def _web_address(uri: str) -> str:
    """Return the URI of a server without its credentials; empty for a database."""
    if not uri.startswith(("http://", "https://")):
        return ""
    scheme, _, rest = uri.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"
