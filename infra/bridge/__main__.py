"""The bridge's command line: `python -m infra.bridge --help`."""

import argparse
import asyncio
import sys
from collections.abc import Sequence

from infra.bridge.settings import BridgeSettings
from trans_peft.errors import TransPeftError

_HELP = """\
serve     answer notifications, and start one reconcile of all families first
webhooks  create or update MLflow's webhook for this bridge, and let MLflow send a test event

settings, as environment variables:
  BRIDGE_HOST, BRIDGE_PORT  address to listen on (127.0.0.1, 4260)
  BRIDGE_URL                URL under which MLflow's server reaches the bridge
                            (http://127.0.0.1:<port>)
  BRIDGE_MLFLOW_SECRETS     one or two secrets of at least 24 characters, separated by a space.
                            MLflow signs with the first; the second is still valid.
                            Not set: POST /notifications/mlflow is closed
  BRIDGE_S3_TOKENS          bearer tokens, in the same form.
                            Not set: POST /notifications/s3 is closed
  BRIDGE_QUEUE_URL          SQS queue that receives S3's events. Not set: no queue is read
  TRANS_PEFT_BASES_URI      the bridge ignores uploads outside of this prefix.
                            Not set: it accepts all
  MLFLOW_TRACKING_URI, PREFECT_API_URL, AWS_*
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.bridge",
        description="Start reconcile when MLflow or S3 sends a notification.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=["serve", "webhooks"])
    chosen = parser.parse_args(arguments)
    try:
        settings = BridgeSettings()
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
    sys.stdout.write(f"{problem or f'MLflow sends its notifications to {settings.public_url}'}\n")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
