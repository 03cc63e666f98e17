"""The pages and the JSON over a platform in memory."""

import re
from dataclasses import replace

import pytest

from tests.ui.conftest import SETTINGS, client_of
from tests.ui.fleets import FAMILY, ExampleFleet
from tests.ui.html import Page
from trans_peft.domain.adapter import ManualOverride
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.fleet import FamilyAdapters
from trans_peft.errors import InvalidSpecError, StoreError
from trans_peft.ui.settings import UiSettings

ADAPTERS = f"/families/{FAMILY}/adapters"
PAGES = [
    "/",
    f"/families/{FAMILY}",
    f"/families/{FAMILY}/upgrade",
    f"{ADAPTERS}/release-notes",
    f"{ADAPTERS}/support-routing/on/v3",
    f"{ADAPTERS}/exceptions-trans-peft/on/v3",
    f"/families/{FAMILY}/bases/v2",
    f"/families/{FAMILY}/bases/4",
]
API = [
    "/api/families",
    f"/api/families/{FAMILY}/progress",
    f"/api/families/{FAMILY}/adapters",
    f"/api{ADAPTERS}/release-notes",
    f"/api{ADAPTERS}/exceptions-plain/verdicts/v3",
    f"/api/families/{FAMILY}/bases/v2",
]


def page(client, path, status=200, **headers):
    response = client.get(path, headers=headers)
    assert response.status_code == status, response.text
    return Page(response.text)


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_well_formed_and_its_links_lead_to_pages(client, path):
    seen = page(client, path)
    assert seen.tags.count("h1") == 1
    assert "script" not in seen.tags
    inside = {address for _, address in seen.links if address.startswith("/")}
    for address in inside:
        assert client.get(address.partition("#")[0]).status_code == 200, address


def test_the_matrix_shows_every_state_as_a_text(client):
    rows = {row[0].split()[0]: row for row in page(client, f"/families/{FAMILY}").rows}
    assert rows["docstrings-de"][1:3] == ["LORA", "✓ passed +0.5 serves"]
    assert rows["exceptions-plain"][2] == "↓ needs-retuning -21.5"
    assert rows["exceptions-trans-peft"][2] == "✓ passed -0.5 serves distilled"
    assert rows["release-notes"][2] == "? inconclusive -2.0 serves approved manually"
    assert rows["support-chat"][2] == "○ retire 0.0"
    assert rows["support-routing"][2] == "≠ incompatible"
    assert rows["tests-pytest"][2] == "! failed"
    assert rows["summaries"][2] == "· missing"
    assert rows["summaries"][4] == "● trained serves"


def test_the_base_versions_are_listed_with_their_progress(client):
    rows = {row[0].split()[0]: row for row in page(client, f"/families/{FAMILY}").rows}
    assert rows["v3"][0] == "v3 champion"
    assert rows["v3"][2:] == ["9 of 12", "3", "1", "0", "4", "5", "6 min 20 s"]  # 4 x 95 s
    assert rows["v2"][0] == "v2 serving"
    assert rows["v1"][1] == "not required"


def test_the_filters_select_and_stay_selected(client):
    seen = page(client, f"/families/{FAMILY}?verdict=missing&base=v3&q=s&sort=name&descending=true")
    names = [row[0].split()[0] for row in seen.rows if "missing" in " ".join(row[2:3])]
    assert names == ["unit-conversion", "types-stubs", "summaries"]
    assert "3 of 12 adapters: missing on v3" in seen.text


def test_pages_are_linked_with_the_filters(client):
    seen = page(client, f"/families/{FAMILY}?size=5&method=LORA&page=1")
    assert seen.address("Next") == f"/families/{FAMILY}?method=LORA&size=5&page=2"
    last = page(client, seen.address("Next"))
    assert "Page 2 of 2" in last.text
    assert last.address("Previous") == f"/families/{FAMILY}?method=LORA&size=5"


def test_the_life_of_an_adapter(client):
    seen = page(client, f"{ADAPTERS}/exceptions-trans-peft")
    assert "HOULSBY, masking 0.1, dropping 0, 120 steps" not in seen.text  # the recipe says LORA
    assert "LORA, masking 0.1, dropping 0, 120 steps of 8 rows, learning rate 0.001" in seen.text
    assert "recovered by the strategy distilled, took 1 min 35 s" in seen.text
    assert "distilled from version 1" in seen.text
    assert "direct: needs-retuning, 41 s" in seen.text
    assert seen.address("training run ↗").endswith("/#/runs/0123456789abcdef0123456789abcdef")


def test_an_approval_names_the_person_and_the_time(client):
    seen = page(client, f"{ADAPTERS}/release-notes")
    assert (
        "Mira <mira@example.com> set the alias on version 3, first seen 2026-03-02 09:30:00 UTC. "
        "By verdict: no version (inconclusive)." in seen.text
    )


def test_a_verdict_is_explained_with_figures_and_changed_items(client):
    seen = page(client, f"{ADAPTERS}/exceptions-plain/on/v3")
    assert "inferior to itself on the old base. What to do Re-tune" in seen.text
    assert "Margin 5 points One-sided level 5 %" in seen.text
    figures = next(row for row in seen.rows if row[0] == "the adapter on the old base")
    assert figures[1:3] + figures[6:] == [
        "75.0",
        "-21.5",
        "400",
        "94",
        "inferior, reference non-inferior",
    ]
    assert "Right on v1, wrong on v3: 90 of 400" in seen.text
    assert "Wrong on v1, right on v3: 4 of 400" in seen.text
    assert "exceptions-000 " in seen.text and "exceptions-089 " in seen.text
    assert "exceptions-090 " not in seen.text


def test_an_incompatible_adapter_is_explained_without_figures(client):
    seen = page(client, f"{ADAPTERS}/support-routing/on/v3")
    assert "lm_head: shape (49152, 576), found (50000, 576)" in seen.text
    assert "Margin not recorded" in seen.text


def test_the_verdict_of_a_blocked_adapter_says_how_to_undo_it(tmp_path):
    fleet = ExampleFleet(tmp_path)
    for version in ("v1", "v2"):
        fleet.add_base(version)
    fleet.train("chat", "v1")
    made = fleet.transfer("chat", "v2", {"exceptions": (6, 8)}).new_number
    alias = fleet.bases["v2"].alias
    fleet.platform.registry.set_alias_manually("chat", alias, None)
    with client_of(fleet.platform) as client:
        text = page(client, f"{ADAPTERS}/chat/on/v2").text
    assert "passed blocked manually" in text
    assert (
        f"What to do The adapter does not serve on smollm2/v2, because a person changed its alias "
        f"{alias}. Reconcile keeps this. To undo it, set that alias on version {made} in MLflow."
    ) in text


def test_the_verdict_of_an_approved_adapter_says_how_to_undo_it(client, fleet):
    text = page(client, f"{ADAPTERS}/release-notes/on/v3").text
    alias = fleet.bases["v3"].alias
    assert (
        "set the alias manually. The adapter serves on smollm2/v3, because a person changed its "
        f"alias {alias}. Reconcile keeps this. To undo it, remove that alias in MLflow."
    ) in text


def test_a_long_owner_is_shortened(tmp_path):
    fleet = ExampleFleet(tmp_path)
    fleet.add_base("v1")
    owners = {"chat": "o" * 100_000, "code": "p" * 200, "docs": "q" * 201}
    for name, owner in owners.items():
        fleet.train(name, "v1")
        fleet.platform.registry.set_owner_manually(name, owner)
    with client_of(fleet.platform) as client:
        family = client.get(f"/families/{FAMILY}").text
        assert len(family) < 30_000
        assert f"owner {'o' * 59}\N{HORIZONTAL ELLIPSIS}<" in family
        assert f'<option value="{"p" * 200}">{"p" * 59}\N{HORIZONTAL ELLIPSIS}</option>' in family
        assert 'value="o' not in family and 'value="q' not in family
        found = page(client, f"/families/{FAMILY}?owner={'p' * 200}")
        assert "1 of 3 adapters" in found.text
        assert len(client.get(f"{ADAPTERS}/chat").text) < 30_000


def test_a_base_version_shows_who_serves_on_it(client):
    seen = page(client, f"/families/{FAMILY}/bases/v3")
    names = [row[0] for row in seen.rows[1:]]
    assert names == [
        "docstrings-de",
        "docstrings-en",
        "exceptions-trans-peft",
        "release-notes",
        "sql-explain",
    ]
    assert "5 of 12 adapters" in seen.text
    assert ["v2", f"/families/{FAMILY}/bases/v2"] in seen.links  # its parent
    assert "331,776" in seen.text  # parameters: 576 x 576
    assert "from v2, estimated: FFN 12.50%" in seen.text


def test_a_base_version_that_is_not_ready(client):
    seen = page(client, f"/families/{FAMILY}/bases/4")
    assert "not ready" in seen.text and "s3://bases/smollm2/v4" in seen.text


def test_the_upgrade_page_counts_what_is_missing(client):
    seen = page(client, f"/families/{FAMILY}/upgrade")
    assert "4 verdicts are missing. The transfers take about 6 min 20 s" in seen.text
    assert "3 without a verdict , 1 failed (1 will be tried again)" in seen.text
    assert "Refresh" not in client.get(f"/families/{FAMILY}/upgrade").headers
    assert client.get(f"/families/{FAMILY}/upgrade?live=true").headers["Refresh"] == "3600"


def test_links_lead_to_mlflow_and_prefect(client):
    seen = page(client, f"/families/{FAMILY}")
    assert seen.address("MLflow ↗") == f"http://mlflow.test:5500/#/models/{FAMILY}"
    assert (
        seen.address("Fleet report ↗") == f"http://prefect.test:4250/artifacts/key/fleet-{FAMILY}"
    )
    seen = page(client, f"{ADAPTERS}/sql-explain/on/v3")
    assert seen.address("MLflow ↗") == "http://mlflow.test:5500/#/models/sql-explain/versions/3"


def test_without_urls_there_are_no_outside_links(fleet):
    with client_of(fleet.platform, UiSettings()) as client:
        for path in PAGES:
            assert all(address[:1] in "/#?" for _, address in page(client, path).links)


def test_the_name_of_the_person_is_shown_from_the_configured_header_only(client, fleet):
    assert page(client, "/", **{"X-Forwarded-User": "Mira <b>"}).text.startswith("Fleets")
    assert "Mira <b>" in page(client, "/", **{"X-Forwarded-User": "Mira <b>"}).text
    assert "Eve" not in page(client, "/", **{"X-User": "Eve"}).text
    with client_of(fleet.platform, UiSettings()) as other:
        assert "Mira" not in page(other, "/", **{"X-Forwarded-User": "Mira"}).text


# What comes from outside.

HOSTILE = "<script>alert(1)</script>\"'&{{ 7919 * 7907 }}"


def test_text_from_outside_is_escaped(tmp_path):
    fleet = ExampleFleet(tmp_path)
    for version in ("v1", "v2"):
        fleet.add_base(version)
    fleet.train("chat", "v1")
    fleet.refuse("chat", "v2", Verdict.FAILED, HOSTILE)
    override = ManualOverride(None, 1, HOSTILE, HOSTILE, HOSTILE)
    registry, base = fleet.platform.registry, fleet.bases["v2"]
    registry.record_manual_override("chat", base.alias, override)
    fleet.set_alias("champion", "v2")
    fleet.platform.catalog.note_promotion(FAMILY, base.number, HOSTILE)
    fleet.platform.catalog.register_manually(FAMILY, HOSTILE)
    with client_of(fleet.platform) as client:
        for path, times in (
            (f"/families/{FAMILY}", 1),
            (f"/families/{FAMILY}?q={HOSTILE}", 1),
            (f"{ADAPTERS}/chat", 4),
            (f"{ADAPTERS}/chat/on/v2", 1),
            (f"/families/{FAMILY}/bases/3", 1),
            (f"/families/{FAMILY}/bases/{HOSTILE.replace('/', '')}", 0),
        ):
            seen = Page(client.get(path, headers={"X-Forwarded-User": HOSTILE}).text)
            assert "script" not in seen.tags and str(7919 * 7907) not in seen.text
            assert seen.text.count(HOSTILE) == times + 1, path


@pytest.mark.parametrize("path", [*PAGES, *API, "/health", "/nope", "/static/style.css"])
def test_every_response_has_the_security_headers(client, path):
    headers = client.get(path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "script-src" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"


def test_no_page_needs_what_the_policy_forbids(client):
    for path in PAGES:
        html = client.get(path).text
        assert not re.search(r"<style|\bstyle=|\bon\w+=|javascript:|<script|<iframe", html)
        loaded = re.findall(r'<link[^>]+href="([^"]+)', html)
        assert loaded == ["/static/icon.svg", "/static/style.css"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:4270", 200),
        ("fleet.example.com", 200),
        ("evil.example.com", 400),
        ("", 400),
    ],
)
def test_other_names_in_the_host_header_are_refused(fleet, host, status):
    settings = replace(SETTINGS, allowed_hosts=("fleet.example.com",))
    with client_of(fleet.platform, settings) as client:
        for path in ("/", "/health", "/api/families", "/static/style.css"):
            assert client.get(path, headers={"Host": host}).status_code == status


@pytest.mark.parametrize("host", ["::1", "[::1]", "0:0:0:0:0:0:0:1", "2001:DB8::1"])
def test_the_host_may_be_an_ipv6_address(fleet, host):
    settings = UiSettings(host=host, allowed_hosts=("fd00::2",))
    named = "[2001:db8::1]" if host == "2001:DB8::1" else "[::1]"
    assert settings.url == f"http://{named}:4270"
    with client_of(fleet.platform, settings) as client:
        for header in (named, f"{named}:4270", "[fd00::2]:80", "localhost"):
            assert client.get("/health", headers={"Host": header}).status_code == 200
        for header in ("[fd00::3]:4270", "::1", "[::1", "evil.com."):
            assert client.get("/health", headers={"Host": header}).status_code == 400


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_nothing_can_be_written(client, method):
    for path in (*PAGES, *API):
        assert client.request(method, path).status_code == 405


def test_the_platform_is_only_read(fleet):
    class ReadOnly:
        def __init__(self, port, allowed):
            self._port, self._allowed = port, allowed

        def __getattr__(self, name):
            assert name in self._allowed, name
            return getattr(self._port, name)

    platform = replace(
        fleet.platform,
        registry=ReadOnly(fleet.platform.registry, {"fleet", "adapter"}),
        catalog=ReadOnly(
            fleet.platform.catalog,
            {"families", "versions", "alias", "promotion_notes", "set_aside", "fingerprint"},
        ),
        evaluations=ReadOnly(fleet.platform.evaluations, {"get"}),
        store=ReadOnly(fleet.platform.store, ()),
        runs=ReadOnly(fleet.platform.runs, ()),
    )
    with client_of(platform) as client:
        for path in (*PAGES, *API):
            assert client.get(path).status_code == 200, path


# Errors.


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/families/other",
        "/families/not%20a%20name%2F",
        f"/families/{FAMILY}/bases/v9",
        f"/families/{FAMILY}?base=v9",
        f"{ADAPTERS}/unknown",
        f"{ADAPTERS}/chat%22%3E",
        f"{ADAPTERS}/summaries/on/v3",
        f"{ADAPTERS}/summaries/on/v1",
        f"{ADAPTERS}/summaries/on/v9",
    ],
)
def test_unknown_names_are_404(client, path):
    seen = page(client, path, 404)
    assert "Not found" in seen.text
    response = client.get(f"/api{path}".replace("/on/", "/verdicts/"))
    if "?" not in path:
        assert response.status_code == 404 and response.json()["detail"]


@pytest.mark.parametrize("query", ["page=0", "size=5000", "verdict=perfect", "sort=luck"])
def test_parameters_that_cannot_be_used_are_422(client, query):
    name = query.partition("=")[0]
    assert f"{name}: Input should be" in page(client, f"/families/{FAMILY}?{query}", 422).text
    response = client.get(f"/api/families/{FAMILY}/adapters?{query}")
    assert response.status_code == 422 and response.json()["detail"].startswith(name)


@pytest.mark.parametrize("path", API)
def test_unknown_parameters_of_the_api_are_422(client, path):
    response = client.get(f"{path}?bogus=1&q=")
    assert response.status_code == 422
    wrong = "'bogus'" if path.endswith("/adapters") else "'bogus', 'q'"
    assert response.json()["detail"].startswith(f"{wrong}: ")
    assert client.get(PAGES[1] + "?bogus=1").status_code == 200  # a page ignores it


class Away:
    """A catalog that does not respond."""

    def __getattr__(self, name):
        def fail(*arguments):
            raise StoreError("MLflow does not respond", found="refused", do="start MLflow")

        return fail


def test_a_registry_that_is_away_is_503_and_says_what_to_do(fleet):
    with client_of(replace(fleet.platform, catalog=Away())) as client:
        for path in ("/", f"/families/{FAMILY}", f"{ADAPTERS}/summaries"):
            seen = page(client, path, 503)
            assert "The registry does not respond MLflow does not respond" in seen.text
            assert "found: refused do: start MLflow" in seen.text
        response = client.get("/api/families")
        assert response.status_code == 503 and response.headers["Retry-After"]
        assert response.json()["detail"].startswith("MLflow does not respond")
        assert client.get("/health").json() == {"status": "ok"}


def test_a_fault_of_the_page_is_500_without_details(fleet):
    class Broken:
        def families(self):
            raise ValueError("a secret")

    with client_of(replace(fleet.platform, catalog=Broken())) as client:
        response = client.get("/")
        assert response.status_code == 500 and "secret" not in response.text
        assert "frame-ancestors" in response.headers["Content-Security-Policy"]


def test_a_retired_adapter_has_a_page(tmp_path):
    fleet = ExampleFleet(tmp_path)
    fleet.add_base("v1")
    fleet.train("chat", "v1")
    fleet.platform.registry.retire_manually("chat")
    with client_of(fleet.platform) as client:
        assert "This adapter is retired" in page(client, f"{ADAPTERS}/chat").text
        assert "0 of 0 adapters" in page(client, f"/families/{FAMILY}").text


def test_an_unreadable_adapter_is_listed(fleet):
    class OneBroken:
        def __getattr__(self, name):
            return getattr(fleet.platform.registry, name)

        def fleet(self, family):
            live = tuple(
                a for a in fleet.platform.registry.fleet(family).live if a.name != "summaries"
            )
            return FamilyAdapters(live, ("summaries: it has an odd tag",))

    with client_of(replace(fleet.platform, registry=OneBroken())) as client:
        seen = page(client, f"/families/{FAMILY}")
        assert "1 registry entries cannot be read" in seen.text
        assert "summaries: it has an odd tag" in seen.text


# JSON.


def test_the_json_has_what_the_pages_show(client):
    found = client.get(f"/api/families/{FAMILY}/adapters?q=release&size=1").json()
    assert (found["found"], found["total"], found["pages"], found["base"]) == (1, 12, 1, "v3")
    assert found["rows"][0]["cells"][2] == {
        "base": "v3",
        "state": "inconclusive",
        "serves": True,
        "override": "approved",
        "difference": -2.0,
        "strategy": "",
    }
    verdict = client.get(f"/api{ADAPTERS}/exceptions-plain/verdicts/v3").json()
    assert verdict["margin_points"] == 5.0
    suite = verdict["suites"][0]
    assert suite["flips"]["lost"] == [f"exceptions-{n:03}" for n in range(90)]
    assert suite["flips"]["gained"] == [f"exceptions-{n:03}" for n in range(300, 304)]


def test_the_openapi_document_describes_every_json_response(client):
    document = client.get("/api/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert len(document["paths"]) == len(API)
    for path, operations in document["paths"].items():
        assert path.startswith("/api/") and operations.keys() == {"get"}
        answer = operations["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert "$ref" in answer or answer["items"]["$ref"]
        for status in ("404", "422", "503"):
            problem = operations["get"]["responses"][status]["content"]["application/json"]
            assert problem["schema"]["$ref"].endswith("/Problem")
    assert document["components"]["schemas"]["Problem"]["required"] == ["detail"]


@pytest.mark.parametrize("path", API)
def test_every_json_response_is_strict_json(client, path):
    text = client.get(path).text
    assert not re.search(r"\b(NaN|Infinity)\b", text)


# Settings.


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"port": 0}, "the port must lie in"),
        ({"refresh_s": 0}, r"in \[1, 86,400\] s, not 0"),
        ({"refresh_s": float("inf")}, "the interval must lie in"),
        ({"refresh_s": float("nan")}, "the interval must lie in"),
        ({"host": ""}, "the host must be an address or a name"),
        ({"host": "::1]"}, "the host must be an address or a name"),
        ({"host": "localhost:80"}, "the host must be an address or a name"),
        ({"host": "fe80::1%eth0"}, "the host must be an address or a name"),
        ({"mlflow_url": "javascript:alert(1)"}, "MLflow's pages must be http"),
        ({"prefect_url": "http://"}, "Prefect's pages must be http"),
        ({"allowed_hosts": ("*",)}, "names without port"),
        ({"allowed_hosts": ("a:80",)}, "names without port"),
        ({"allowed_hosts": ("*.",)}, r"names without port.* not '\*.'"),
        ({"allowed_hosts": (".",)}, "names without port"),
        ({"allowed_hosts": ("",)}, "names without port"),
        ({"allowed_hosts": ("a..b",)}, "names without port"),
        ({"allowed_hosts": ("*.::1",)}, "names without port"),
        ({"allowed_hosts": ("http://a",)}, "names without port"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(wrong, problem):
    with pytest.raises(InvalidSpecError, match=problem):
        UiSettings(**wrong)
