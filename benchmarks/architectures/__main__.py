"""Perturb a tiny model of every architecture, and write the outcomes to docs/architectures.md.

    python -m benchmarks.architectures [NAME ...]

Without names, all architectures are checked (about two minutes on one core) and the page is
written. With names, only their rows are printed.
"""

import argparse
import warnings

import transformers

from benchmarks.architectures.outcomes import check_architecture
from benchmarks.architectures.page import PAGE, write
from benchmarks.architectures.tiny import ARCHITECTURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *ARCHITECTURES], metavar="NAME")
    names = parser.parse_args().names
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    outcomes = []
    for name in names or ARCHITECTURES:
        outcomes.append(check_architecture(name))
        print(outcomes[-1].row, flush=True)
    if not names:
        write(outcomes)
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
