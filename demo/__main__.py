"""Run the demo: an adapter from training to an update of its base (`make demo`, `make demo-full`).

A real model becomes base v1. Two adapters are trained on it, one plainly and one with Trans-PEFT.
The model gets a new version, every adapter is judged on it, and adapters that pass serve there.
Each step is skipped if its result exists. An interrupted demo therefore resumes, and a finished one
prints its table again.
"""

import argparse
import sys
from collections.abc import Sequence

from demo.screen import Screen, servers_gone
from infra.stack.settings import StackSettings
from trans_peft.errors import TransPeftError

__all__ = ["main"]

# The clients of Prefect, S3 and MLflow, which read the environment when they are imported.
_CLIENTS = ("httpx", "botocore", "mlflow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--full", action="store_true", help="more tasks, one of them with free text"
    )
    chosen = parser.parse_args(arguments)
    screen = Screen()
    try:
        _run(screen, full=chosen.full)
    except TransPeftError as error:
        screen.line(str(error), "red")
        return 1
    except Exception as error:
        if not type(error).__module__.startswith(_CLIENTS):
            raise
        screen.line(str(servers_gone(error)), "red")
        return 1
    except KeyboardInterrupt:
        screen.line("Stopped. The servers still run: `make down` stops them, `make demo` resumes.")
        return 130
    return 0


def _run(screen: Screen, *, full: bool) -> None:
    stack = StackSettings()
    screen.section("The platform", "MLflow, Prefect, S3 and a worker, on this machine")
    from demo.programs import Module, become_client_of, run_module

    folder = stack.state / "demo"
    with Module(["demo.files", str(folder), *(["--full"] if full else [])]) as files:
        run_module(["infra.stack", "up"], screen)
        become_client_of(stack)
        screen.section("Files", "base v1, and rows from the Python packages on this machine")
        files.finish(screen)

    # Prefect reads the environment when it is imported, so it is imported here.
    from demo import settings
    from demo.steps import Steps

    demo_tasks, update_to = (settings.FULL, "v2-full") if full else (settings.QUICK, "v2")
    steps = Steps(stack, screen, demo_tasks, update_to)
    steps.base_v1()
    steps.data()
    steps.first_promotion()
    steps.adapters()
    steps.base_v2()
    steps.upgrade()
    steps.ending()


if __name__ == "__main__":
    sys.exit(main())
