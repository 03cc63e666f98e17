"""The bridge's command line: `python -m infra.bridge --help`."""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

from infra.bridge.settings import BridgeSettings
from trans_peft.errors import TransPeftError

_HELP = """\
serve     answer hints; on start-up one reconcile of every family is started
webhooks  create or correct MLflow's webhook for this bridge, and ask MLflow to try it

settings, as environment variables:
  BRIDGE_HOST, BRIDGE_PORT  where it listens (127.0.0.1, 4260)
  BRIDGE_URL                where MLflow's server reaches it (http://127.0.0.1:<port>)
  BRIDGE_MLFLOW_SECRETS     one or two words of 24 characters or more; the first is MLflow's to
                            sign with, the second is still valid. None: POST /hints/mlflow is closed
  BRIDGE_S3_TOKENS          in the same way, bearer tokens. None: POST /hints/s3 is closed
  BRIDGE_QUEUE_URL          an SQS queue with S3's events. None: no queue is read
  TRANS_PEFT_BASES_URI      uploads below it alone are hints (anywhere)
  MLFLOW_TRACKING_URI, PREFECT_API_URL, AWS_*
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.bridge",
        description="Hints from MLflow and S3 start reconcile.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=["serve", "webhooks"])
    chosen = parser.parse_args(arguments)
    try:
        settings = BridgeSettings.from_environment(os.environ)
        if chosen.verb == "serve":
            from infra.bridge.serve import serve

            asyncio.run(serve(settings))
            return 0
        from infra.bridge.webhooks import ensure_bridge_webhook

        problem = ensure_bridge_webhook(settings)
    except TransPeftError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(f"{problem or f'MLflow tells {settings.public_url}'}\n")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
