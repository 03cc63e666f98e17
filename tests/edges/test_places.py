"""What a worker reads on behalf of a recipe: only the places that its operator lists."""

import io
from pathlib import Path

import pytest

from trans_peft.data import pin, read_examples
from trans_peft.domain.data import DataSource
from trans_peft.domain.places import Places
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.stores import SchemeStore
from trans_peft.errors import AccessError, DataError, InvalidSpecError, StoreError

ROW = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    for folder in (allowed, secret):
        folder.mkdir()
        (folder / "rows.jsonl").write_bytes(ROW)
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "allowed-not" / "rows.jsonl").write_bytes(ROW)
    (allowed / "link.jsonl").symlink_to(secret / "rows.jsonl")
    (allowed / "linked").symlink_to(secret, target_is_directory=True)
    (allowed / "chain").symlink_to(allowed / "linked")
    (allowed / "inside.jsonl").symlink_to(allowed / "rows.jsonl")
    return allowed, secret


ESCAPES = (
    "{secret}/rows.jsonl",
    "file://{secret}/rows.jsonl",
    "{allowed}/../secret/rows.jsonl",
    "{allowed}/./x/../../secret/rows.jsonl",
    "file://{allowed}/%2e%2e/secret/rows.jsonl",
    "{allowed}-not/rows.jsonl",
    "{allowed}/link.jsonl",
    "{allowed}/linked/rows.jsonl",
    "{allowed}/chain/rows.jsonl",
    "/etc/passwd",
    "/proc/self/environ",
    "rows.jsonl",
)


@pytest.mark.parametrize(
    "uri", ["file:///a%00b", "/a\x00b", "/a\ud800b", "file:///a\ud800b", "{loop}", "{loop}/x"]
)
@pytest.mark.parametrize("places", [Places(), Places((Path("/"),), ())], ids=["any", "listed"])
def test_what_can_be_no_path_is_refused(tmp_path, uri, places):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    store, uri = SchemeStore(places), uri.replace("{loop}", str(tmp_path / "loop"))
    with pytest.raises(AccessError, match="cannot be used as a local path"):
        store.list(uri)
    with pytest.raises(AccessError), store.read(uri):
        pass


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("listed", [True, False])
def test_no_path_leads_out_of_the_list(folders, escape, listed, monkeypatch):
    allowed, secret = folders
    monkeypatch.chdir(secret)
    store = SchemeStore(Places((allowed,) if listed else (), ()))
    uri = escape.format(allowed=allowed, secret=secret)
    with pytest.raises(AccessError, match="this worker may not read the local path"):
        store.list(uri)
    with pytest.raises(AccessError, match="TRANS_PEFT_READABLE"), store.read(uri):
        pass
    with pytest.raises(AccessError):
        store.write(uri, io.BytesIO(b"x"))
    if uri.endswith(".jsonl"):
        with pytest.raises(AccessError):
            read_examples(DataSource(uri), store)
        with pytest.raises(AccessError):
            pin(DataSource(uri), store)


def test_what_is_listed_is_read(folders):
    allowed, _ = folders
    store = SchemeStore(Places((allowed,), ()))
    for name in ("rows.jsonl", "inside.jsonl", "../allowed/rows.jsonl"):
        assert read_examples(DataSource(f"{allowed}/{name}"), store)
    store.write(f"{allowed}/new/x.bin", io.BytesIO(b"x"))
    assert [file.name for file in store.list(f"{allowed}/new")] == ["x.bin"]


def test_a_listing_does_not_reveal_files_outside(folders):
    allowed, _ = folders
    with pytest.raises(AccessError, match=r"link\.jsonl"):
        SchemeStore(Places((allowed,), ())).list(str(allowed))


def test_a_list_that_is_a_link_itself_is_followed(folders, tmp_path):
    allowed, _ = folders
    (tmp_path / "alias").symlink_to(allowed, target_is_directory=True)
    store = SchemeStore(Places((tmp_path / "alias",), ()))
    assert read_examples(DataSource(f"{tmp_path}/alias/rows.jsonl"), store)
    assert read_examples(DataSource(f"{allowed}/rows.jsonl"), store)


def test_without_a_list_any_path_is_read(folders):
    allowed, secret = folders
    for store in (FileStore(), SchemeStore()):
        assert read_examples(DataSource(f"{secret}/rows.jsonl"), store)
        assert len(store.list(str(allowed))) == 3


@pytest.mark.parametrize(
    ("listed", "name", "read"),
    [
        ((), "openai/gsm8k", False),
        (("openai/*",), "openai/gsm8k", True),
        (("openai/*",), "openai2/gsm8k", False),
        (("openai/gsm8k",), "openai/gsm8k", True),
        (("openai/gsm8k",), "openai/gsm8k-2", False),
        (("*",), "anyone/anything", True),
        (None, "anyone/anything", True),
    ],
)
def test_hub_data_sets_are_listed_by_name(listed, name, read, monkeypatch):
    import datasets

    asked = []

    def load(*arguments, **_):
        asked.append(arguments[0])
        return datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    store = SchemeStore(Places((), listed))
    if read:
        assert read_examples(DataSource(f"hub:{name}"), store)
    else:
        with pytest.raises(AccessError, match=f"or ask the operator to add hub:{name}"):
            read_examples(DataSource(f"hub:{name}"), store)
        with pytest.raises(AccessError):
            pin(DataSource(f"hub:{name}::test"), store)
    assert asked == ([name] if read else [])


@pytest.mark.parametrize(
    "name",
    [
        "/etc", "../secret", "./rows", "a/b/c", "~/rows", "a\\b", ".", "s3//x", "a/..b",
        "local/json",
        # readers of files in the working directory, not names on the hub
        "json", "csv", "text", "parquet", "arrow", "imagefolder", "webdataset", "squad",
    ],
)  # fmt: skip
def test_a_hub_name_reads_no_folder(name, folders, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.chdir(folders[1])
    Path("local/json").mkdir(parents=True)
    with pytest.raises(DataError, match=r"does not name a hub data set|local folder"):
        read_examples(DataSource(f"hub:{name}"), SchemeStore())


@pytest.mark.parametrize(
    ("text", "also", "folders", "names"),
    [
        ("", (), (), ()),
        ("", ("",), (), ()),
        ("", ("s3://bases",), (), ()),
        ("", ("/bases/",), ("/bases",), ()),
        ("", ("file:///bases",), ("/bases",), ()),
        ("", ("file:///my%20bases/100%25",), ("/my bases/100%",), ()),
        ("", ("/my%20bases",), ("/my%20bases",), ()),
        ("/a, /b ,hub:x/*,", (), ("/a", "/b"), ("x/*",)),
        ("hub:*", (), (), ("*",)),
    ],
)
def test_a_setting_lists_folders_and_names(text, also, folders, names):
    assert Places.named(text, also=also) == Places(tuple(map(Path, folders)), names)


@pytest.mark.parametrize("text", ["rows", "../rows", "s3://bucket", "/a,b"])
def test_a_setting_with_anything_else_is_refused(text):
    with pytest.raises(InvalidSpecError, match="TRANS_PEFT_READABLE"):
        Places.named(text)


def test_a_hub_name_without_an_owner_reads_no_file_of_the_working_directory(folders, monkeypatch):
    monkeypatch.chdir(folders[1])
    (folders[1] / "train.jsonl").write_bytes(ROW)
    for store in (SchemeStore(), SchemeStore(Places((), ("*",)))):
        with pytest.raises(DataError, match=r"(?s)does not name a hub data set.*OWNER/NAME"):
            read_examples(DataSource("hub:json"), store)


def test_an_operators_folder_with_a_space_is_read_by_its_uri(tmp_path):
    folder = tmp_path / "my bases"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(ROW)
    store = SchemeStore(Places.named("", also=(folder.as_uri(),)))
    assert read_examples(DataSource(f"{folder.as_uri()}/rows.jsonl"), store)


def test_a_loop_of_links_is_an_access_error(folders):
    allowed, _ = folders
    (allowed / "loop.jsonl").symlink_to(allowed / "loop.jsonl")
    with pytest.raises(AccessError, match="cannot be used as a local path"):
        read_examples(DataSource(f"{allowed}/loop.jsonl"), SchemeStore(Places((allowed,), ())))
    with pytest.raises(StoreError):
        read_examples(DataSource(f"{allowed}/loop.jsonl"), SchemeStore())


@pytest.mark.parametrize("places", [Places(), Places((Path("/tmp"),), ())])
@pytest.mark.parametrize("uri", ["/tmp/a\0b.jsonl", "file:///tmp/a%00b.jsonl"])
def test_a_path_with_a_nul_character_is_an_access_error(places, uri):
    store = SchemeStore(places)
    with pytest.raises(AccessError, match="cannot be used as a local path"):
        store.list(uri)
    with pytest.raises(AccessError, match="cannot be used as a local path"):
        read_examples(DataSource(uri), store)
