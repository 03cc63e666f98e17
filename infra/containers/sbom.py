"""Writes the packages of the image that runs this as an SBOM (CycloneDX 1.5, JSON) to its output.

    buildah run CONTAINER -- python - NAME <infra/containers/sbom.py

The standard library alone, because images have no other packages in common. `docker buildx build
--sbom=true` adds one by syft instead.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import distributions

__all__ = ["debian_packages", "main", "python_packages"]


def python_packages() -> list[dict[str, str]]:
    """Return the installed distributions as components, by their canonical names."""
    found = {(re.sub(r"[-_.]+", "-", one.name).lower(), one.version) for one in distributions()}
    return [
        _component(name, version, f"pkg:pypi/{name}@{version}") for name, version in sorted(found)
    ]


def debian_packages(listed: str) -> list[dict[str, str]]:
    """Return the lines `name version architecture` of dpkg-query as components."""
    found = (line.split(" ") for line in sorted(listed.splitlines()))
    return [
        _component(name, version, f"pkg:deb/debian/{name}@{version}?arch={architecture}")
        for name, version, architecture in found
    ]


def main(name: str) -> int:
    """Write the SBOM of the image with this name."""
    listed = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${Version} ${Architecture}\n"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": name}},
        "components": [*debian_packages(listed), *python_packages()],
    }
    json.dump(document, sys.stdout, indent=1)
    return 0


def _component(name: str, version: str, purl: str) -> dict[str, str]:
    return {"type": "library", "name": name, "version": version, "purl": purl}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
