"""Tokenizers are loaded from hashed content alone, so equal hashes mean equal tokenizers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_model, tiny_tokenizer
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import UnsupportedModelError, UploadError
from trans_peft.text.tokenizer import load_tokenizer

TEXT = "Hi 123, <eos>é <pad>"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(base, tmp_path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "deepseek-ai/deepseek-coder-1"))


def edit(path: Path, **changes) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    value.update(changes)
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def behavior(tokenizer) -> dict:
    return {
        "ids": tokenizer(TEXT)["input_ids"],
        "text": tokenizer.decode(tokenizer(TEXT)["input_ids"]),
        "special": tokenizer.special_tokens_map,
        "vocabulary": tokenizer.get_vocab(),
        "template": tokenizer.chat_template,
        "class": type(tokenizer).__name__,
        "length": tokenizer.model_max_length,
        "sides": (tokenizer.padding_side, tokenizer.truncation_side),
    }


UNHASHED_FILES = {
    "vocab.json": '{"a": 0}',
    "merges.txt": "a b",
    "added_tokens.json": '{"<tool>": 300}',
    "tokenizer.model": "x",
    "spiece.model": "x",
    "tekken.json": "{}",
    "tiktoken.model": "x",
    "tokenizer.4.0.0.json": "{}",
    "chat_template.json": '{"chat_template": "x"}',
}


@pytest.mark.parametrize("name", UNHASHED_FILES)
def test_files_that_are_not_hashed_have_no_effect(name, folder):
    expected = behavior(load_tokenizer(folder))
    (folder / name).write_text(UNHASHED_FILES[name])
    assert behavior(load_tokenizer(folder)) == expected


def set_padding_and_truncation(state):
    state["padding"] = {
        "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 65, "pad_type_id": 0, "pad_token": "b",
    }  # fmt: skip
    state["truncation"] = {
        "direction": "Left", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip


def by_last_call(folder):
    state = json.loads((folder / "tokenizer.json").read_text())
    set_padding_and_truncation(state)
    (folder / "tokenizer.json").write_text(json.dumps(state))


def by_version(folder):
    edit(folder / "config.json", transformers_version="4.1.0", _name_or_path="google/umt5-small")
    edit(folder / "tokenizer_config.json", transformers_version="4.1.0", name_or_path="x")


def by_path(folder):
    edit(folder / "tokenizer_config.json", tokenizer_file="/etc/hostname")


@pytest.mark.parametrize("change", [by_last_call, by_version, by_path])
def test_equal_hashes_are_equal_tokenizers(change, folder):
    before, expected = fingerprint(str(folder), FileStore()), behavior(load_tokenizer(folder))
    change(folder)
    assert fingerprint(str(folder), FileStore()).digest == before.digest
    assert behavior(load_tokenizer(folder)) == expected


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer_config.json", {"eos_token": "<pad>"}),
        ("tokenizer_config.json", {"model_max_length": 7}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"}),
        ("special_tokens_map.json", {"bos_token": "a"}),
        ("config.json", {"model_type": "gpt2"}),
    ],
)
def test_settings_of_the_tokenizer_are_part_of_the_fingerprint(name, changes, folder):
    before = fingerprint(str(folder), FileStore())
    edit(folder / name, **changes)
    assert fingerprint(str(folder), FileStore()).digest != before.digest


def test_a_tokenizer_equals_that_of_transformers(folder):
    from transformers import AutoTokenizer

    assert behavior(load_tokenizer(folder)) == behavior(AutoTokenizer.from_pretrained(folder))
    assert load_tokenizer(folder).name_or_path == str(folder)


def test_files_with_different_special_tokens_are_refused(folder):
    edit(folder / "special_tokens_map.json", eos_token="<eos>")
    expected = behavior(load_tokenizer(folder))
    assert expected["special"]["eos_token"] == "<eos>"
    edit(folder / "special_tokens_map.json", eos_token={"content": "<pad>", "lstrip": False})
    edit(folder / "tokenizer_config.json", added_tokens_decoder=...)
    message = "have different values of eos_token: '<pad>' and '<eos>'"
    with pytest.raises(UnsupportedModelError, match=message):
        load_tokenizer(folder)
    with pytest.raises(UploadError, match=message):
        fingerprint(str(folder), FileStore())


def test_templates_of_files_and_settings_are_merged(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "default", "template": "A"}, {"name": "../../../tool", "template": "B"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    found = load_tokenizer(folder)
    assert found.chat_template == {"default": "A", "../../../tool": "B"}
    (folder / "chat_template.jinja").write_text("C")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("D")
    found = load_tokenizer(folder)
    assert found.chat_template == {"default": "C", "../../../tool": "B", "rag": "D"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{", "is not JSON"),
        ("tokenizer.json", "[]", "not a JSON object"),
        ("tokenizer.json", "{}", "cannot be loaded"),
        ("tokenizer_config.json", '{"eos_token": null}', "no end-of-text token"),
        ("tokenizer_config.json", '{"tokenizer_class": "CTRLTokenizer"}', "cannot be loaded"),
    ],
)
def test_an_invalid_tokenizer_is_reported_with_its_folder(name, text, message, folder):
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "trans-peft-tokenizer" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("added_tokens.json", {"<tool>": 300}, "<tool> missing in tokenizer.json"),
        ("added_tokens.json", {"<eos>": 3}, "<eos> missing in tokenizer.json"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.json"]}, "fast_tokenizer"),
    ],
)
def test_an_upload_that_transformers_loads_differently_is_refused(name, value, message, folder):
    from trans_peft.bases.fingerprint import folder_file_reader, scan

    edit(folder / name, **value)
    store = FileStore()
    found = scan(store.list(str(folder)), folder_file_reader(folder))
    assert [problem for problem in found.problems if message in problem]


def test_added_tokens_that_are_in_tokenizer_json_too_are_accepted(folder):
    from trans_peft.bases.fingerprint import folder_file_reader, scan

    edit(folder / "added_tokens.json", **{"<eos>": 257})
    found = scan(FileStore().list(str(folder)), folder_file_reader(folder))
    assert found.problems == ()


IMPORTED_BY_LOADING = """
import importlib, sys
from pathlib import Path
from trans_peft.text.tokenizer import TOKENIZER_IMPORTS, load_tokenizer
for name in TOKENIZER_IMPORTS:
    importlib.import_module(name)
before = set(sys.modules)
load_tokenizer(Path(sys.argv[1]))
print(*sorted(set(sys.modules) - before))
"""


def test_a_forked_child_that_loads_a_tokenizer_imports_nothing_more(base):
    """Otherwise each child imports torch and transformers again, which takes seconds."""
    ran = subprocess.run(
        [sys.executable, "-c", IMPORTED_BY_LOADING, base], capture_output=True, text=True
    )
    assert (ran.stdout.split(), ran.returncode) == ([], 0), ran.stderr
