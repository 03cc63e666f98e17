"""CPU time of the comparison of training rows with suite items, if their template is not removed.

    python -m benchmarks.leakage_time [--prompts 2000]

All rows and all items are rendered with one long template, but for one row and one item. So they
share no first word, and every pair shares the 5-grams of the template. The figures are in
docs/statistics.md.
"""

import argparse
import time

from trans_peft.data.overlap import near_matches

TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that completes the request. "
    "### Instruction: {} ### Response:"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=2000)
    numbers = range(parser.parse_args().prompts)
    rows = [*(TEMPLATE.format(f"{i * 7919 % 100003} apples") for i in numbers), "x y z"]
    others = [*(TEMPLATE.format(f"pears {i * 104729 % 100019}") for i in numbers), "odd one"]
    for name, items in {"different": others, "equal": [*rows[:-1], "odd one"]}.items():
        start = time.process_time()
        found = near_matches(rows, items)
        seconds = time.process_time() - start
        print(f"{name} questions: {found.items} items match, {seconds:.1f} CPU seconds")


if __name__ == "__main__":
    main()
