#!/usr/bin/env bash
# Fetches GPT-2's vocabulary to data-cache/gpt2.tiktoken (or to the path given): it is an asset
# (MIT licence) of the source package openai-whisper on PyPI. Needs python3 with pip.
set -euo pipefail

target="${1:-$(cd "$(dirname "$0")/.." && pwd)/data-cache/gpt2.tiktoken}"
package="openai-whisper==20250625"
checksum="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

matches() { echo "${checksum}  $1" | sha256sum --check --status 2>/dev/null; }

if [[ -f "${target}" ]] && matches "${target}"; then
  echo "${target} is there"
  exit 0
fi
work="$(mktemp -d)"
trap 'rm -rf "${work}"' EXIT
"${PYTHON:-python3}" -m pip download --quiet --no-deps --no-binary openai-whisper \
  --dest "${work}" "${package}"
tar --extract --gzip --file "${work}"/*.tar.gz --directory "${work}" --wildcards \
  '*/whisper/assets/gpt2.tiktoken' --strip-components 3
if ! matches "${work}/gpt2.tiktoken"; then
  echo "the vocabulary in ${package} is not the expected one; nothing was installed" >&2
  exit 1
fi
mkdir -p "$(dirname "${target}")"
mv "${work}/gpt2.tiktoken" "${target}"
echo "${target} installed"
