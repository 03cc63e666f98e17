#!/bin/sh
# Looks up the digests of the base images of Dockerfile and compose.yaml and writes them into .env in
# this folder. Needs docker (buildx) or skopeo, and access to the registry.
set -eu
cd "$(dirname "$0")"
test -e .env || { echo "copy env.example to .env first" >&2; exit 1; }

digest() {
  if command -v skopeo >/dev/null; then
    skopeo inspect --format '{{.Digest}}' "docker://$1"
  else
    docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$1"
  fi
}

pin() {
  found=$(digest "docker.io/library/$2")
  sha256=${found#sha256:}
  case $sha256 in
    *[!0-9a-f]* | "") echo "$2: expected a digest, found: $found" >&2; exit 1 ;;
  esac
  test "${#sha256}" = 64 || { echo "$2: expected a SHA-256, found: $found" >&2; exit 1; }
  { grep -v "^$1=" .env || true; echo "$1=$sha256"; } >.env.new
  chmod 600 .env.new
  mv .env.new .env
  echo "$2 $found"
}

pin PYTHON_SHA256 python:3.11-slim
pin POSTGRES_SHA256 postgres:16
