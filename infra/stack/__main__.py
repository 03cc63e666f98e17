"""The stack's command line: `python -m infra.stack --help`. `make up` and other targets call it."""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence

from infra.stack.programs import PROGRAMS, exec_program
from infra.stack.settings import StackSettings
from infra.stack.stack import check_client, down, status, up
from trans_peft.errors import TransPeftError

_HELP = """\
up        start the servers, worker, bridge and fleet page, deploy prefect.yaml, wait until all are
          healthy
down      stop them; the state folder stays
status    show the state of each program; exit code 1 unless all are healthy
login     show the user and password of Prefect's page
env       show the environment of a client: eval "$(python -m infra.stack env)"
run NAME  run one of the programs in this process (the process manager calls this)

settings, as environment variables:
  TRANS_PEFT_STATE  folder that holds all state (.state)
                    The ports of its last `up` are known: name them once, with `up`.
  S3_PORT           8350
  MLFLOW_PORT       5500
  PREFECT_PORT      4250
  BRIDGE_PORT       4260
  UI_PORT           4270
  METRICS_PORT      9464
  GPU_SLOTS         flow runs on the `gpu` queue at a time (1)
  MLFLOW_BACKEND_STORE_URI, PREFECT_API_DATABASE_CONNECTION_URL
                    databases instead of SQLite: postgresql+psycopg2://..., postgresql+asyncpg://...
  TRANS_PEFT_GPUS, TRANS_PEFT_READABLE, TRANS_PEFT_SANDBOX_MAY_LACK, TRANS_PEFT_FAMILIES
                    passed to the worker (infra/README.md)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.stack",
        description="The whole platform on one machine.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=["up", "down", "status", "login", "env", "run"])
    parser.add_argument("program", nargs="?", choices=list(PROGRAMS))
    chosen = parser.parse_args(arguments)
    # On SIGTERM, `up` stops what it started, as it does on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        settings = StackSettings()
        match chosen.verb:
            case "up":
                up(settings, _print)
            case "down":
                down(settings, _print)
            case "status":
                return 0 if status(settings, _print) else 1
            case "login":
                _print(":".join(settings.prefect_auth))
            case "env":
                check_client(settings)
                for name, value in settings.client_environment.items():
                    _print(f"export {name}={shlex.quote(value)}")
            case "run":
                exec_program(chosen.program, settings)
    except TransPeftError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
