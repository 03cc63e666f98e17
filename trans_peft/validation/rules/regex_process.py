"""The process that compiles and searches users' regular expressions; `text` starts it."""

import re

from trans_peft.isolation.limited_process import serve


def main() -> None:
    """Search texts for patterns until standard input ends.

    A question is a pattern and a list of texts. The answer is a list: of each text the part that
    counts, or null where nothing matches. For a pattern that cannot be compiled it is the error's
    text.
    """

    def extract(question: tuple[str, list[str]]) -> list[str | None] | str:
        pattern, texts = question
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            return str(error)
        found = map(compiled.search, texts)
        return [match and match[min(compiled.groups, 1)] for match in found]

    serve(extract)


if __name__ == "__main__":
    main()
