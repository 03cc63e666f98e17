"""Runs the fleet page with uvicorn."""

import uvicorn

from trans_peft.ports import Platform
from trans_peft.ui.app import create_app
from trans_peft.ui.settings import UiSettings

__all__ = ["serve"]


def serve(platform: Platform, settings: UiSettings) -> None:
    """Serve the fleet page until the process receives a signal to end."""
    uvicorn.run(
        create_app(platform, settings),
        host=settings.listening_address,
        port=settings.port,
        access_log=False,  # the proxy, if there is one, logs who reads what
        server_header=False,
        log_level="warning",
    )
