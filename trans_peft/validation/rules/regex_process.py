"""The process in which a user's regular expression is searched for; started by `text`."""

import re

from trans_peft.isolation.limited import serve


def main() -> None:
    """Answer questions, each a pattern and the texts to search, until there are no more."""

    def extract(question: tuple[str, list[str]]) -> list[str | None]:
        pattern, texts = question
        compiled = re.compile(pattern)
        found = map(compiled.search, texts)
        return [match and match[min(compiled.groups, 1)] for match in found]

    serve(extract)


if __name__ == "__main__":
    main()
