"""Load a tokenizer from the files that are part of a base's fingerprint."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from trans_peft.errors import UnsupportedModelError
from trans_peft.isolation import is_memory_limit_error
from trans_peft.text.tokenizer_files import TOKENIZER_NAME, write_hashed_copy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKENIZER_IMPORTS", "load_tokenizer"]

TOKENIZER_IMPORTS = (
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",  # needs what all architectures need
)
"""What `load_tokenizer` imports, for `call_isolated`. `transformers` alone imports none of it."""


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in a folder.

    The tokenizer is loaded from a copy that has only the content which
    `trans_peft.text.tokenizer_files` hashes. Equal hashes therefore mean equal tokenizers; other
    files and the path of the folder have no effect.

    If there is no padding token, the end-of-text token is used, in memory only. Padding is always
    masked, so this choice changes no result.

    Raises UnsupportedModelError if the folder has no tokenizer.json, if transformers cannot load
    the files, or if there is no end-of-text token.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not (folder / TOKENIZER_NAME).is_file():
        raise UnsupportedModelError(
            f"{folder} has no {TOKENIZER_NAME}",
            expected=f"a fast tokenizer, which is saved as {TOKENIZER_NAME}",
            do=f"save it with AutoTokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r})",
        )
    with TemporaryDirectory(prefix="trans-peft-tokenizer-") as scratch:
        try:
            write_hashed_copy(folder, Path(scratch))
            tokenizer = AutoTokenizer.from_pretrained(
                scratch, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers raises many types of errors for invalid files
            if is_memory_limit_error(error):
                raise MemoryError(str(error)) from error
            raise UnsupportedModelError(
                f"the tokenizer in {folder} cannot be loaded",
                expected=f"a tokenizer class of transformers that loads {TOKENIZER_NAME} alone",
                found=f"{type(error).__name__}: {str(error).replace(scratch, str(folder))[:500]}",
                do="correct tokenizer_config.json, or save the tokenizer again with this version "
                "of transformers",
            ) from error
    tokenizer.name_or_path = str(folder)
    tokenizer.init_kwargs["name_or_path"] = str(folder)
    if tokenizer.eos_token is None:
        raise UnsupportedModelError(
            f"the tokenizer in {folder} has no end-of-text token",
            expected="eos_token in tokenizer_config.json, because answers end with it",
            do="set eos_token, and publish the base as a new version",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
