"""What the commands print of a registry that other programs write."""

import io

import pytest

from trans_peft.cli import main, show
from trans_peft.domain.base import BaseRef
from trans_peft.errors import StoreError
from trans_peft.serving.manifest import IdleEntry, ServedAdapter, ServingManifest

BASE = BaseRef("small", "v2", "a" * 64)
REASON = (
    "On exceptions, the adapter lost 21.5 points, at least 18.2 and more than the margin of 5 (400 "
    "items, 75.0 on the old base, 53.5 on the new one)"
)


def served(name, number, verdict, *, made_by="training", is_manual=False):
    return ServedAdapter(
        name, number, BASE, "b" * 64, "LORA", made_by, verdict, is_manual=is_manual
    )


@pytest.fixture
def manifest(monkeypatch, capsys):
    """Return the output of `manifest` for these adapters."""

    def output(adapters=(), idle=(), *options):
        found = ServingManifest(BASE, ("serving",), tuple(adapters), tuple(idle))
        monkeypatch.setattr("trans_peft.client.connect", lambda uri: None)
        monkeypatch.setattr(
            "trans_peft.serving.manifest.serving_manifest", lambda *arguments: found
        )
        assert main(["manifest", "--family", "small", *options]) == 0
        return capsys.readouterr().out

    return output


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("passed [/]", "passed [/]"),
        ("[red]x", "[red]x"),
        ("[link=https://example.com]x[/link]", "[link=https://example.com]x[/link]"),
        (":warning:", ":warning:"),
        ("\x1b[2Jx", "?[2Jx"),
        ("\x1b]0;title\x07x", "?]0;title?x"),
        ("\x9b2Jx", "?2Jx"),
        ("\u202ex", "?x"),
        ("a\rb", "a?b"),
        ("a\ud83db", "a?b"),
        ("größer \N{CHECK MARK}", "größer \N{CHECK MARK}"),
    ],
)
def test_text_of_the_registry_is_printed_without_interpretation(manifest, text, printed):
    detail = f"code does not serve on {BASE}: {text}"
    output = manifest([served("chat", 1, text)], [IdleEntry("code", "blocked", detail)])
    assert output.count(printed) == 2
    assert not set(output) & set(text) - set(printed)


@pytest.mark.parametrize("text", ["[/]", "\x1b[2J\x9b\u202e"])
def test_errors_and_progress_are_printed_without_interpretation(monkeypatch, capsys, text):
    def fail(uri):
        raise StoreError("odd", found=text)

    monkeypatch.setattr("trans_peft.client.connect", fail)
    assert main(["manifest", "--family", "small"]) == 3
    show.ProgressDisplay(None).update(text, 1, 1, text)
    printed = capsys.readouterr().err
    assert printed.count(show.printable(text)) == 3
    assert not set("\x1b\x9b\u202e") & set(printed)


def test_progress_bars_show_text_without_interpretation(monkeypatch):
    terminal = show._Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(show, "stderr", terminal)
    with show.progress() as shown:
        shown.update("s3://a/[/]\x9b", 1, 2, "[/]")
    assert "s3://a/[/]?" in terminal.file.getvalue()


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_a_manifest_is_readable_at_every_width(manifest, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    detail = f"code does not serve on {BASE}: verdict needs-retuning: {REASON}"
    adapters = [
        served("chat", 1, None),
        served("routing", 12, "inconclusive", made_by="re-tuned", is_manual=True),
    ]
    output = manifest(adapters, [IdleEntry("code", "needs-retuning", detail)])
    lines = output.splitlines()
    assert max(map(len, lines)) <= min(columns, 120)
    header, chat, routing = lines[1:4]
    for column, values in {
        "adapter": ("chat", "routing"),
        "verdict": ("trained here", "inconclusive, approved manually"),
        "made by": ("training", "re-tuned"),
        "weights": ("b" * 12, "b" * 12),
    }.items():
        start = header.index(column)
        assert chat[start:].startswith(values[0]) and routing[start:].startswith(values[1])
    assert chat.index(" 1 ") + 2 == routing.index("12 ") + 2  # numbers end in the same column
    start = lines[5].index("detail")
    assert lines[6].split()[:2] == ["code", "needs-retuning"]
    assert " ".join(line[start:].strip() for line in lines[6:]) == REASON


def test_a_manifest_as_json_is_complete(manifest):
    output = manifest([], [IdleEntry("code", "needs-retuning", REASON)], "--json")
    assert REASON in output
