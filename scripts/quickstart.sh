#!/usr/bin/env bash
# From a fresh clone to a trained byte-level language model that writes a sample, on 2 ranks, or on
# the GPU where there is one:
#   scripts/quickstart.sh [--text FILE] [--output DIR] [--steps N] [--config FILE]
#   --text FILE    learn this text instead of the King James Bible (plain text, a few MB)
#   --output DIR   where everything goes (default runs/quickstart); run again to go on after a stop
#   --steps N      optimizer steps (default: those of the configuration)
#   --config FILE  default configs/quickstart.json
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"

text=
output=
steps=
config=$root/configs/quickstart.json
while [ $# -gt 0 ]; do
  case $1 in
    --text | --output | --steps | --config)
      [ $# -ge 2 ] || refuse "$1 needs a value; see --help"
      declare "${1#--}=$2"
      shift 2
      ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) refuse "unknown option '$1'; see --help" ;;
  esac
done
[ -z "$steps" ] || [[ $steps =~ ^[1-9][0-9]*$ ]] || refuse "--steps must be a positive number, not '$steps'"
[ -z "$text" ] || [ -r "$text" ] || refuse "cannot read the text '$text'"
[ -r "$config" ] || refuse "cannot read the configuration '$config'"
[ -n "$output" ] || output=$root/runs/quickstart
mkdir -p "$output"
output=$(cd "$output" && pwd)
began=$SECONDS

# GPUs that the driver shows and CUDA_VISIBLE_DEVICES leaves. With one there is one rank; with more
# there are two.
gpus=0
if command -v nvidia-smi > /dev/null; then gpus=$( (nvidia-smi -L 2> /dev/null || true) | grep -c '^GPU' || true); fi
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  visible=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true)
  [ "$visible" -ge "$gpus" ] || gpus=$visible
fi
ranks=2
[ "$gpus" -ne 1 ] || ranks=1

say "[1/5] Packages"
"$root/scripts/install_dependencies.sh" --for "$([ -n "$text" ] && echo build || echo quickstart)"

say "[2/5] Building (log: build/release/quickstart.log)"
build=$root/build/release
log=$build/quickstart.log
mkdir -p "$build"
# A directory that somebody has configured keeps its options.
options=()
[ -f "$build/CMakeCache.txt" ] ||
  options=(-G Ninja -DCMAKE_BUILD_TYPE=Release -DSTRETTO_BUILD_TESTS=OFF
    -DSTRETTO_BUILD_BENCHMARKS=OFF "-DSTRETTO_CUDA=$([ "$gpus" -gt 0 ] && echo AUTO || echo OFF)")
if ! run cmake -S "$root" -B "$build" "${options[@]}" > "$log" 2>&1 ||
  ! run cmake --build "$build" --target stretto-gpt stretto-tokenize stretto-ngram >> "$log" 2>&1; then
  tail -n 30 "$log" >&2
  fail "the build failed; the end of its log is above"
fi
gpt=$build/examples/gpt/stretto-gpt
tokenize=$build/tools/stretto-tokenize
ngram=$build/tools/stretto-ngram

say "[3/5] Text"
if [ -z "$text" ]; then
  text=$output/bible.txt
  bible -f gen1:1-rev22:21 > "$text"
fi
# The last tenth is held out. A run that goes on must go on with the same text.
run "$tokenize" --tokenizer bytes --output "$output/new" --validation-fraction 0.1 \
  --split-documents none "$text" > "$output/text.log" || fail "'$text' could not be tokenised"
sed -E 's#/new[.](train|validation)[.]#/\1.#' "$output/text.log"
rm -f "$output/text.log"
for split in train validation; do
  if [ -d "$output/checkpoints" ] && ! cmp -s "$output/new.$split.bin" "$output/$split.bin"; then
    rm -f "$output"/new.*.bin
    fail "'$output' holds a run on another text; choose another --output or delete it"
  fi
  mv -f "$output/new.$split.bin" "$output/$split.bin"
done

on=$([ "$gpus" -gt 0 ] && echo "GPU" || echo "CPU")
say "[4/5] Training on $on, ranks: $ranks, with mpirun (from the newest checkpoint, if there is one)"
settings=(--set "output=$output" --set "data.train=$output/train.bin"
  --set "data.validation=$output/validation.bin")
if [ "$text" != "$output/bible.txt" ]; then  # the sample goes on from the first words
  prompt=$(head -c 400 "$text" | LC_ALL=C tr -cs 'A-Za-z,.' ' ' | cut -c 1-24)
  settings+=(--set "sample.prompt=\"${prompt# }\"")
fi
[ -z "$steps" ] || settings+=(--set "steps=$steps" --set "optimizer.warmup=$((steps / 20))")
run "$root/scripts/mpirun.sh" "$ranks" "$gpt" "$config" "${settings[@]}" || fail "training failed, see above"

say "[5/5] Result"
baseline=$(run "$ngram" --train "$output/train.bin" --validation "$output/validation.bin" --order 3)
baseline=$(sed -n 's/.*held-out loss: \([0-9.]*\).*/\1/p' <<< "$baseline")
loss=$(sed -n 's/.*"eval_loss": *\([0-9.]*\).*/\1/p' "$output/metrics.jsonl" | tail -n 1)
[ -n "$loss" ] || fail "no held-out loss in '$output/metrics.jsonl'"
[ -n "$baseline" ] || fail "stretto-ngram printed no loss"
echo "metrics: $output/metrics.jsonl    loss curve: $output/loss.svg"
echo "checkpoint: $output/checkpoints"
printf 'whole quick start: %d min %d s\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
printf 'held-out loss: %.4f nats/byte\n' "$loss"
printf 'order-3 n-gram baseline: %.4f nats/byte on the same split\n' "$baseline"
