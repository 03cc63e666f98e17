"""Load a tokenizer from the files that a base's fingerprint covers, and from no others."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from trans_peft.errors import UnsupportedModelError
from trans_peft.isolation import is_out_of_memory
from trans_peft.text.tokenizer_files import TOKENIZER_NAME, stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load a folder's tokenizer. One without a padding token pads with its end-of-text token.

    It is loaded from a copy of the parts that `trans_peft.text.tokenizer_files` hashes, so equal
    hashes mean equal tokenizers, whatever else lies in the folder and wherever it is. Padding is
    masked wherever this library pads, so the choice changes no result; it is made in memory only.
    UnsupportedModelError for a folder without tokenizer.json, files that make no tokenizer, or one
    without an end-of-text token.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not (folder / TOKENIZER_NAME).is_file():
        raise UnsupportedModelError(
            f"{folder} has no {TOKENIZER_NAME}",
            expected="a tokenizer in one file, which a fingerprint can cover",
            do=f"save it there with AutoTokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r})",
        )
    with TemporaryDirectory(prefix="trans-peft-tokenizer-") as scratch:
        try:
            stage(folder, Path(scratch))
            tokenizer = AutoTokenizer.from_pretrained(
                scratch, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers raises many kinds for files that fit no class
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise UnsupportedModelError(
                f"the tokenizer in {folder} cannot be loaded",
                expected=f"a class of transformers that needs no file but {TOKENIZER_NAME}",
                found=f"{type(error).__name__}: {str(error).replace(scratch, str(folder))[:500]}",
                do="correct tokenizer_config.json, or save the tokenizer again with this version "
                "of transformers",
            ) from error
    tokenizer.name_or_path = str(folder)
    tokenizer.init_kwargs["name_or_path"] = str(folder)
    if tokenizer.eos_token is None:
        raise UnsupportedModelError(
            f"the tokenizer in {folder} has no end-of-text token",
            expected="eos_token in tokenizer_config.json: without it no answer ever ends",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
