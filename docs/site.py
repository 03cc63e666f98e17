"""Collect the pages of the documentation site in build/pages: `python docs/site.py`.

Most pages are the Markdown files of `docs/`. The home page is README.md. The command line's page
comes from cyclopts, the deployments' page from prefect.yaml and the parameter schemas of the flows,
and the tutorial from its script.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jupytext
import yaml

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
MADE_FROM = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "infra/README.md": "infra.md",
}
"""Files outside `docs/` that are pages of the site."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def page_of(path: str) -> str | None:
    """Return the page that shows a file of the repository; None if no page does."""
    if path in MADE_FROM:
        return MADE_FROM[path]
    is_page = path.startswith("docs/") and path.endswith((".md", ".png", ".svg"))
    return path.removeprefix("docs/") if is_page else None


def with_links(text: str, path: str) -> str:
    """Return a file's Markdown with links between pages; what is no page is named by its path."""
    source = Path(page_of(path) or path)

    def replaced(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group(0)
        there = (ROOT / path).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
        page = page_of(there)
        if page is None:
            return f"`{there}`" if label.strip("`") in (there, target) else f"{label} (`{there}`)"
        up = "../" * (len(source.parts) - 1)
        return f"{image}[{label}]({up}{page}{anchor or ''})"

    return _LINK.sub(replaced, text)


def command_line() -> str:
    """Return the reference of the command line."""
    from trans_peft.cli.app import app

    return app.generate_docs(output_format="markdown")


def deployments() -> str:
    """Return the reference of prefect.yaml: queue, schedule and parameters of each deployment."""
    lines = [
        "# Deployments",
        "",
        "`prefect.yaml` declares these deployments. `make up` deploys all of them.",
        "",
    ]
    for item in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        path, name = item["entrypoint"].split(":")
        flow = getattr(import_module(path.removesuffix(".py").replace("/", ".")), name)
        schema = json.loads(flow.parameters.model_dump_json())
        lines += [f"## {flow.name}/{item['name']}", "", (flow.description or "").strip(), ""]
        lines += [f"- queue: `{item['work_pool']['work_queue_name']}`"]
        lines += [f"- schedule: `{s['cron']}` ({s['timezone']})" for s in item.get("schedules", [])]
        lines += ["", "| Parameter | Type | Default |", "| --- | --- | --- |"]
        for parameter, kind in rows(schema):
            field = schema["properties"][parameter]
            known = {"default": field.get("default")} if "default" in field else {}
            stated = item.get("parameters", {}).get(parameter, known.get("default", "required"))
            shown = stated if stated == "required" else f"`{json.dumps(stated)}`"
            lines.append(f"| `{parameter}` | {kind} | {shown} |")
        lines.append("")
        for title, definition in schema.get("definitions", {}).items():
            lines += definition_table(title, definition)
    return "\n".join(lines)


def rows(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and type of each property of a JSON schema."""
    for name, field in schema.get("properties", {}).items():
        yield name, type_of(field)


def type_of(field: dict[str, Any]) -> str:
    """Return the type of a JSON schema's field as it is shown."""
    if "$ref" in field:
        return f"`{field['$ref'].rpartition('/')[2]}`"
    for combined in ("anyOf", "allOf"):
        if combined in field:
            return " or ".join(type_of(part) for part in field[combined])
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array" and isinstance(field.get("items"), dict):
        return f"list of {type_of(field['items'])}"
    return str(field.get("type", "any"))


def definition_table(title: str, definition: dict[str, Any]) -> list[str]:
    """Return the fields of one parameter type."""
    if "properties" not in definition:
        return []
    lines = [f"### {title}", "", "| Field | Type | Default |", "| --- | --- | --- |"]
    for name, field in definition["properties"].items():
        default = f"`{json.dumps(field['default'])}`" if "default" in field else "required"
        lines.append(f"| `{name}` | {type_of(field)} | {default} |")
    return [*lines, ""]


def tutorial() -> str:
    """Return the tutorial: the text and the code of its script."""
    return jupytext.writes(jupytext.read(ROOT / "docs" / "tutorial.py"), fmt="md")


def main() -> None:
    """Write every page."""
    sys.path.insert(0, str(ROOT))
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "images", PAGES / "images")
    for file in sorted((ROOT / "docs").rglob("*.md")):
        write(file.relative_to(ROOT).as_posix(), file.read_text())
    for path in MADE_FROM:
        write(path, (ROOT / path).read_text())
    write("docs/tutorial.md", tutorial())
    write("docs/reference/cli.md", command_line())
    write("docs/reference/deployments.md", deployments())


def write(path: str, text: str) -> None:
    """Write the page of one file of the repository."""
    page = PAGES / (page_of(path) or path)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(with_links(text, path))


if __name__ == "__main__":
    main()
