"""Fake tokenizers that a child process can import."""


class Merging:
    """A tokenizer that merges a space and the letter after it into one token, as BPE does."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, text, **options):
        one = text.replace(" y", "~") if isinstance(text, str) else None
        texts = one or [each.replace(" y", "~") for each in text]
        return {"input_ids": self._tokenizer(texts, **options)["input_ids"]}

    def __reduce__(self):  # it travels to a child process
        return Merging, (self._tokenizer,)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)
