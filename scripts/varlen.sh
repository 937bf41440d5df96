#!/usr/bin/env bash
# Trains on documents of unequal length (this project's own files) with static and dynamic meshes,
# and shows what each rank did with its time:
#   scripts/varlen.sh [--ranks N] [--steps N] [--output DIR] [--set section.name=value]... [FILE...]
#   --ranks N      ranks of this machine (default 4)
#   --steps N      steps with each mesh (default 8)
#   --output DIR   where the token files go (default runs/varlen)
#   --set ...      overrides configs/varlen.json
#                  (programs come from build/release, or from the directory in STRETTO_BUILD)
#   FILE...        documents, one each, instead of the project's files
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"

ranks=4
steps=8
output=$root/runs/varlen
files=()
sets=()
while [ $# -gt 0 ]; do
  case $1 in
    --ranks | --steps | --output)
      [ $# -ge 2 ] || refuse "$1 needs a value; see --help"
      declare "${1#--}=$2"
      shift 2
      ;;
    --set)
      [ $# -ge 2 ] || refuse "$1 needs a value; see --help"
      sets+=(--set "$2")
      shift 2
      ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) refuse "unknown option '$1'; see --help" ;;
    *) files+=("$1"); shift ;;
  esac
done
for number in "$ranks" "$steps"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || refuse "--ranks and --steps must be positive numbers, not '$number'"
done
if [ ${#files[@]} -eq 0 ]; then
  while IFS= read -r -d '' file; do files+=("$file"); done < <(
    find "$root"/{src,include,kernels,tests,docs,tools,benchmarks} -type f \
      \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.md' \) -print0 | sort -z)
fi

build=${STRETTO_BUILD:-$root/build/release}
for program in tools/stretto-tokenize examples/varlen/train_varlen; do
  [ -x "$build/$program" ] || fail "'$build/$program' is not there; build first (README.md)"
done
mkdir -p "$output"
run "$build/tools/stretto-tokenize" --tokenizer bytes --output "$output/documents" \
  --validation-fraction 0 --split-documents file "${files[@]}" > "$output/text.log" ||
  fail "the documents could not be tokenised"
rm -rf "$output/static" "$output/unbalanced" "$output/dynamic"
run "$root/scripts/mpirun.sh" "$ranks" "$build/examples/varlen/train_varlen" \
  "$root/configs/varlen.json" --steps "$steps" --set "output=$output" \
  --set "data.train=$output/documents.train.bin" "${sets[@]}"
