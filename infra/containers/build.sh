#!/bin/sh
# Builds the three images with buildah, without a daemon and without privileges for containers
# (chroot isolation), writes the packages of each to build/images (CycloneDX), and prints its size:
#
#   infra/containers/build.sh              on python:3.11-slim, by its digest in .env (pin.sh)
#   infra/containers/build.sh --stand-in   where no registry can be reached: on a Debian bookworm with
#                                          its Python 3.11, made by debootstrap (needs root)
#
# PIP_EXTRA_INDEX_URL names torch's index (Dockerfile). BUILD_VOLUMES are further options of
# `buildah bud`, for example --volume=/opt/wheels:/opt/wheels:ro.
set -eu
cd "$(dirname "$0")/../.."
export BUILDAH_ISOLATION=chroot
base=docker.io/library/python:3.11-slim

# Debian's Python is not the one of python:3.11-slim, but has the same version and place in the image:
# `python` and `pip` install for the whole image. The package settings of this machine (proxy's
# certificate, pip.conf) are part of the stand-in, because nothing of them belongs into the Dockerfile.
stand_in() {
  folder=$(mktemp --directory)
  debootstrap --variant=minbase --include=python3,python3-pip,python3-venv,ca-certificates \
    bookworm "$folder" >&2
  ln -s python3 "$folder/usr/bin/python"
  rm "$folder"/usr/lib/python3.*/EXTERNALLY-MANAGED
  rm -rf "$folder"/var/cache/apt/archives/*.deb
  cp /etc/ssl/certs/ca-certificates.crt "$folder/etc/ssl/certs/ca-certificates.crt"
  for settings in /etc/pip.conf /etc/xdg/pip /root/.config/pip; do
    test ! -e "$settings" || cp --recursive --parents "$settings" "$folder"
  done
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$folder" / >&2
  rm -rf "$folder"
  buildah config --cmd python3 --env PIP_BREAK_SYSTEM_PACKAGES=1 "$container"
  buildah commit --quiet --rm "$container" "$base" >&2
}

pull=--pull=false # only where it is not here yet
case "${1:-}" in
  --stand-in)
    pull=--pull-never
    buildah inspect --type image "$base" >/dev/null 2>&1 || stand_in
    digest=$(buildah inspect --type image --format '{{.FromImageDigest}}' "$base")
    PYTHON_SHA256=${digest#sha256:}
    ;;
  "")
    PYTHON_SHA256=$(sed -n 's/^PYTHON_SHA256=//p' infra/containers/.env)
    test -n "$PYTHON_SHA256" || { echo "run infra/containers/pin.sh first" >&2; exit 1; }
    ;;
  *) echo "usage: $0 [--stand-in]" >&2; exit 2 ;;
esac

for target in servers bridge worker; do
  # shellcheck disable=SC2086  # several options
  buildah bud $pull --layers --target "$target" --tag "trans-peft-$target" \
    --build-arg "PYTHON_SHA256=$PYTHON_SHA256" \
    --build-arg "PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL:-}" \
    --ignorefile infra/containers/Dockerfile.dockerignore ${BUILD_VOLUMES:-} \
    --file infra/containers/Dockerfile . >&2
done

mkdir -p build/images
for target in servers bridge worker; do
  container=$(buildah from --pull-never "trans-peft-$target")
  buildah run "$container" -- python - "trans-peft-$target" \
    <infra/containers/sbom.py >"build/images/trans-peft-$target.cdx.json"
  buildah rm "$container" >/dev/null
done
buildah images --format '{{.Name}} {{.Size}}' | grep trans-peft-
