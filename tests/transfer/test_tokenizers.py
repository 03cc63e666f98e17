"""Comparison of two loaded tokenizers: ids, end tokens, decoded texts and settings."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_model
from trans_peft.transfer.tokenizers import compare_tokenizers

CHAT = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def saved(folder: Path, change=lambda state, settings, config: None) -> Path:
    """Save a tokenizer with single digits, merges of digits, a BOS token and a chat template.

    `change` edits its tokenizer.json, its tokenizer_config.json and the base's config.json.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "<pad>", "<eos>", "<bos>", "<tool>", "12", "123"]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("1", "2"), ("12", "3")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", pieces.index("<bos>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=[AddedToken("<tool>", special=True)],
        chat_template=CHAT,
    ).save_pretrained(folder)
    tiny_model(vocabulary=270).config.save_pretrained(folder)
    paths = [folder / n for n in ("tokenizer.json", "tokenizer_config.json", "config.json")]
    values = [json.loads(path.read_text()) for path in paths]
    change(*values)
    for path, value in zip(paths, values, strict=True):
        path.write_text(json.dumps(value))
    return folder


def setting(**values):
    return lambda state, settings, config: settings.update(values)


def by_class(name):
    return setting(tokenizer_class=name)


def by_config(state, settings, config):
    del settings["tokenizer_class"]
    config["tokenizer_class"] = "ByT5Tokenizer"


def without_bos(state, settings, config):
    state["post_processor"] = None


def other_digits(state, settings, config):
    state["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False


def other_decoder(state, settings, config):
    replace = {"type": "Replace", "pattern": {"String": "x"}, "content": "y"}
    state["decoder"] = {"type": "Sequence", "decoders": [state["decoder"], replace]}


def special_as_text(state, settings, config):
    for token in state["added_tokens"]:
        if token["content"] == "<tool>":
            token["rstrip"] = True


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (by_class("ByT5Tokenizer"), "tokens have another id"),
        (by_config, "tokens have another id"),
        (by_class("GPT2Tokenizer"), "probe texts have other tokens"),
        (by_class("Qwen2Tokenizer"), "probe texts have other tokens"),
        (other_digits, "probe texts have other tokens"),
        (without_bos, "when special tokens are added"),
        (special_as_text, "1 of"),
        (setting(split_special_tokens=True), "probe texts have other tokens"),
        (other_decoder, "the same tokens decode to other text"),
        (setting(eos_token="<tool>"), "the end-of-text token was '<eos>' and is '<tool>'"),
        (setting(bos_token="<pad>"), ""),
    ],
)
def test_a_change_of_inputs_or_end_tokens_is_a_mismatch(change, expected, tmp_path):
    mismatches, _ = compare_tokenizers(saved(tmp_path / "old"), saved(tmp_path / "new", change))
    assert mismatches
    assert expected in "; ".join(mismatches)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pad_token": "<tool>"}, "pad_token was '<pad>' and is '<tool>'"),
        ({"clean_up_tokenization_spaces": True}, "clean_up_tokenization_spaces was"),
        ({"model_max_length": 99}, "and is 99"),
        ({"padding_side": "left"}, "padding_side was 'right' and is 'left'"),
        ({"truncation_side": "left"}, "truncation_side was 'right' and is 'left'"),
        ({"unk_token": "<tool>"}, "unk_token was None and is '<tool>'"),
    ],
)
def test_other_settings_are_a_note(values, expected, tmp_path):
    old, new = saved(tmp_path / "old"), saved(tmp_path / "new", setting(**values))
    mismatches, notes = compare_tokenizers(old, new)
    assert mismatches == ()
    assert expected in "; ".join(notes)


def normalized(state, settings, config):
    state["normalizer"] = {
        "type": "Replace", "pattern": {"String": "Question"}, "content": "Q"
    }  # fmt: skip


def merged_in_another_order(state, settings, config):
    state["model"]["merges"] = state["model"]["merges"][::-1]


@pytest.mark.parametrize(
    ("change", "part"), [(normalized, "normalizer"), (merged_in_another_order, "merges")]
)
def test_a_change_that_no_probe_text_shows_is_a_note(change, part, tmp_path):
    mismatches, notes = compare_tokenizers(saved(tmp_path / "old"), saved(tmp_path / "new", change))
    assert mismatches == ()
    assert f"the tokenizer's {part} changed" in "; ".join(notes)


def test_equal_tokenizers_have_no_notes(tmp_path):
    assert compare_tokenizers(saved(tmp_path / "old"), saved(tmp_path / "new")) == ((), ())


def test_a_changed_special_token_matters_if_the_chat_template_uses_it(tmp_path):
    """`bos_token` is a variable of templates; the tokens of plain texts stay the same."""
    old, new = saved(tmp_path / "old"), saved(tmp_path / "new", setting(bos_token="<tool>"))
    for folder in (old, new):  # a BOS of the post-processor would differ too
        state = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
        (folder / "tokenizer.json").write_text(json.dumps(state))
    mismatches, notes = compare_tokenizers(old, new)
    assert "chats have other tokens: a prompt was '<bos>" in mismatches[0]
    assert "bos_token was '<bos>' and is '<tool>'" in notes[0]
    mismatches, notes = compare_tokenizers(old, new, "{{ messages[0].content }}")
    assert mismatches == ()
    assert "bos_token was" in notes[0]
