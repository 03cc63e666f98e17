"""The stack's command line: `python -m infra.stack --help`. `make up` and its like call it."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence

from infra.stack.programs import PROGRAMS, become
from infra.stack.settings import StackSettings
from infra.stack.stack import down, status, up
from trans_peft.errors import TransPeftError

_HELP = """\
up        start the servers, worker and bridge, deploy prefect.yaml, wait until all are healthy
down      stop them, and nothing else; the state folder stays
status    how each does; exit code 1 unless all are well
login     the password that Prefect's page asks for, once in each browser
env       what a shell needs to talk to them: eval "$(python -m infra.stack env)"
run NAME  become one of the programs (the process manager calls this)

settings, as environment variables:
  TRANS_PEFT_STATE  the one folder with all state (.state)
  S3_PORT           8350
  MLFLOW_PORT       5500
  PREFECT_PORT      4250
  BRIDGE_PORT       4260
  GPU_SLOTS         flows on the GPU queue at a time (1)
  MLFLOW_BACKEND_STORE_URI, PREFECT_API_DATABASE_CONNECTION_URL
                    databases instead of SQLite: postgresql+psycopg2://..., postgresql+asyncpg://...
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.stack",
        description="The whole platform on one machine.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=["up", "down", "status", "login", "env", "run"])
    parser.add_argument("program", nargs="?", choices=list(PROGRAMS))
    chosen = parser.parse_args(arguments)
    # A terminated `up` stops what it started, as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        settings = StackSettings.from_environment(os.environ)
        match chosen.verb:
            case "up":
                up(settings, _say)
            case "down":
                down(settings, _say)
            case "status":
                return 0 if status(settings, _say) else 1
            case "login":
                _say(":".join(settings.prefect_auth))
            case "env":
                for name, value in settings.client_environment.items():
                    _say(f"export {name}={shlex.quote(value)}")
            case "run":
                become(chosen.program, settings)
    except TransPeftError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
