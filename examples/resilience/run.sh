#!/usr/bin/env bash
# Trains a small model twice, once undisturbed and once with a rank that is killed in the middle, and
# puts the losses side by side:
#   examples/resilience/run.sh [--text FILE] [--output DIR] [--launcher mpi|env]
#   --text FILE   what to learn (default: this project's documentation)
#   --output DIR  where everything goes (default runs/resilience); removed first
#   --launcher    who starts the 2 ranks: mpirun, or stretto-run itself (default env)
#                 (programs come from build/release, or from the directory in STRETTO_BUILD)
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/../../scripts/common.sh"
output=$root/runs/resilience launcher=env text=
while [ $# -gt 0 ]; do
  case $1 in
    --text | --output | --launcher)
      [ $# -ge 2 ] || refuse "$1 needs a value; see --help"
      declare "${1#--}=$2"
      shift 2
      ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) refuse "unknown option '$1'; see --help" ;;
  esac
done
# SIGKILL at this step; a checkpoint every 20, so that a few steps are lost.
steps=120 kill_after=50 every=20
build=${STRETTO_BUILD:-$root/build/release}
for program in tools/stretto-run tools/stretto-tokenize examples/gpt/stretto-gpt; do
  [ -x "$build/$program" ] || fail "'$build/$program' is not there; build first (README.md)"
done
rm -rf "$output"
mkdir -p "$output"
if [ -z "$text" ]; then
  text=$output/text.txt
  cat "$root"/docs/*.md "$root"/docs/decisions/*.md > "$text"
fi
"$build/tools/stretto-tokenize" --output "$output/text" --split-documents none "$text" > /dev/null

job=
trap '[ -z "$job" ] || { kill -INT $job 2> /dev/null; wait $job 2> /dev/null; }; exit 143' TERM HUP

# train NAME: 2 ranks under stretto-run, in the place of a shell of their own; what it says goes to the
# terminal, what they say to a file.
train() {
  exec "$build/tools/stretto-run" --ranks 2 --launcher "$launcher" --delay 0.5 \
    --mpirun "mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1" \
    --directory "$output/$1-incidents" -- \
    "$build/examples/gpt/stretto-gpt" "$root/configs/quickstart.json" \
    --set output="$output/$1" --set steps=$steps --set checkpoint.every=$every \
    --set data.train="$output/text.train.bin" --set data.validation="$output/text.validation.bin" \
    --set sample.tokens=0 --set runtime.device=cpu --set runtime.threads=1 --set evaluate.every=0 \
    > "$output/$1.log" 2> >(grep --line-buffered '^stretto-run' >&2)
}

echo "== undisturbed"
train undisturbed &
job=$!
wait $job
echo "== with a rank killed after step $kill_after"
train killed &
job=$!
# A rank's guard writes down its process, rank 0 a line for each step.
until [ "$(cat "$output/killed/metrics.jsonl" 2> /dev/null | wc -l)" -ge $kill_after ]; do
  kill -0 $job 2> /dev/null || fail "the job ended early; see $output/killed.log"
  sleep 0.02
done
victim=$(sed -n 's/.*"started".*"pid":\([0-9]*\).*/\1/p' "$output"/killed-incidents/live-*/rank-1.events)
echo "kill -9 $victim (rank 1)"
kill -9 "$victim"
wait $job

echo "== the report ($output/killed-incidents/incident-0001/report.txt)"
cat "$output/killed-incidents/incident-0001/report.txt"
echo "== losses"
loss_of() { sed -n 's/.*"step":\([0-9]*\),"loss":\([^,]*\),.*/\1 \2/p' "$output/$1/metrics.jsonl"; }
paste -d ' ' <(loss_of undisturbed) <(loss_of killed) | awk '
  NR == 1 { printf "%6s %12s %12s\n", "step", "undisturbed", "killed"; top = $2 }
  $1 != $3 || $2 != $4 { different++ }
  $1 == 1 || $1 % 10 == 0 {
    bar = sprintf("%*s", 40 * $4 / top, ""); gsub(/ /, "#", bar)
    printf "%6d %12.6f %12.6f %s\n", $1, $2, $4, bar
  }
  END {
    printf "%d steps, ", NR
    if (different) { printf "%d of them with another loss\n", different; exit 1 }
    print "all losses the same to the last bit"
  }'
echo "curves: $output/undisturbed/loss.svg $output/killed/loss.svg"
