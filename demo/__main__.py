"""The whole life of an adapter, on real parts: `make demo`, `make demo-full`.

A real model becomes base v1; two adapters are trained on it, one plainly and one under Trans-PEFT;
the model gets a new version; every adapter is judged on it and what passes serves there. Each step
asks first whether its result is there already, so a demo that was broken off goes on where it was,
and one that is done prints its table again.
"""

import argparse
import sys
from collections.abc import Sequence

from demo.screen import Screen
from infra.stack.settings import StackSettings
from trans_peft.errors import TransPeftError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell the story; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="more tasks, one of them writing text")
    chosen = parser.parse_args(arguments)
    screen = Screen()
    try:
        _tell(screen, full=chosen.full)
    except TransPeftError as error:
        screen.say(str(error), "red")
        return 1
    except KeyboardInterrupt:
        screen.say("Stopped. The servers still run (`make down`); `make demo` goes on here.")
        return 130
    return 0


def _tell(screen: Screen, *, full: bool) -> None:
    stack = StackSettings()
    screen.chapter("The platform", "MLflow, Prefect, S3 and a worker, on this machine")
    from demo.programs import become_client_of, run_module

    run_module(["infra.stack", "up"], screen)
    become_client_of(stack)

    # Prefect reads the environment when it is imported: only now.
    from demo import settings
    from demo.story import Story

    chapters, update_to = (settings.FULL, "v2-full") if full else (settings.QUICK, "v2")
    story = Story(stack, screen, chapters, update_to)
    story.base_v1()
    story.data()
    story.first_promotion()
    story.adapters()
    story.base_v2()
    story.upgrade()
    story.ending()


if __name__ == "__main__":
    sys.exit(main())
