#!/usr/bin/env bash
# Seconds from SIGKILL of a rank to the first new step, by phase, on whatever device: with snapshots in
# the memory of a keeper, and without, from a checkpoint on a disk whose cache is cold.
#   scripts/recovery.sh [--config FILE] [--set section.name=value]... [--ranks N] [--after STEP]
#                       [--launcher env|mpi] [--keepers N] [--lose rank|node]
#                       [--from snapshots|checkpoint|both] [--output DIR]
#   --config FILE  what to train (default configs/quickstart.json); data and outputs are set here
#   --ranks N      (default 1)
#   --after STEP   kill after this step at the earliest (default 20)
#   --keepers N    as many nodes are played, parity of one among them (default 1)
#   --lose node    the last node's keeper and its memory, too, with its last rank (default rank)
#   --from WHAT    what to go on from (default both, one after the other)
#   --output DIR   where everything goes (default runs/recovery); removed first. The checkpoint's disk
#                  (programs come from build/release, or from the directory in STRETTO_BUILD)
# On a GPU, 1.5 billion parameters and 32 Ki tokens a step:
#   scripts/recovery.sh --config configs/bench_llama_1.5b_cuda.json --set batch.global=16
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"

output=$root/runs/recovery
launcher='env'
ranks=1
after=20
keepers=1
lose='rank'
from='both'
config=$root/configs/quickstart.json
sets=()
while [ $# -gt 0 ]; do
  case $1 in
    --config | --ranks | --after | --launcher | --keepers | --lose | --from | --output)
      [ $# -ge 2 ] || refuse "$1 needs a value; see --help"
      declare "${1#--}=$2"
      shift 2
      ;;
    --set)
      [ $# -ge 2 ] || refuse "$1 needs a value; see --help"
      sets+=(--set "$2")
      shift 2
      ;;
    -h | --help) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) refuse "unknown option '$1'; see --help" ;;
  esac
done
for number in "$ranks" "$after" "$keepers"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] ||
    refuse "--ranks, --after and --keepers must be positive numbers, not '$number'"
done
[ "$keepers" -le "$ranks" ] || refuse "--keepers $keepers are more than --ranks $ranks"
[[ $lose =~ ^(rank|node)$ ]] || refuse "--lose must be rank or node, not '$lose'"
[ "$lose" = rank ] || [ "$keepers" -gt 1 ] || refuse "--lose node needs --keepers 2 or more"
[[ $from =~ ^(snapshots|checkpoint|both)$ ]] ||
  refuse "--from must be snapshots, checkpoint or both, not '$from'"
[[ $launcher =~ ^(env|mpi)$ ]] || refuse "--launcher must be env or mpi, not '$launcher'"
[ -r "$config" ] || refuse "cannot read the configuration '$config'"
[ -n "$output" ] || refuse "--output is empty; name a directory"
build=${STRETTO_BUILD:-$root/build/release}
for program in tools/stretto-run tools/stretto-keeper tools/stretto-tokenize examples/gpt/stretto-gpt; do
  [ -x "$build/$program" ] || fail "'$build/$program' is not there; build first (README.md)"
done
rm -rf "$output"
mkdir -p "$output"
for _ in $(seq 20); do cat "$root"/docs/*.md "$root"/docs/decisions/*.md; done > "$output/text.txt"
"$build/tools/stretto-tokenize" --output "$output/text" --split-documents none "$output/text.txt" > /dev/null
STRETTO_JOB_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export STRETTO_JOB_TOKEN
job=
trap '[ -z "$job" ] || kill -INT $job 2> /dev/null || true' EXIT

# What the ranks' program said last that it could not do; else the last line.
complaint() {
  awk '/^stretto-run: / { on = 0; last = $0; next }
       /^stretto-[a-z]+: / { text = ""; on = 1 }
       on { text = text (text == "" ? "" : "\n") $0 }
       { last = $0 }
       END { print text == "" ? last : text }' "$log"
}
# wait_for SECONDS WHAT COMMAND...: until the command succeeds.
wait_for() {
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    kill -0 $job 2> /dev/null || fail "the job ended before $what; see $log: $(complaint)"
    [ $SECONDS -lt $deadline ] || fail "no $what in time; see $log"
    sleep 0.05
  done
}
stepped() { [ "$(cat "$output/$1/metrics.jsonl" 2> /dev/null | wc -l)" -ge "$after" ]; }
committed() {
  "$build/tools/stretto-keeper" --ask "/tmp/stretto-$(id -u)/recovery-$$-0.sock" 2> /dev/null |
    grep -q 'COMMITTED step'
}
saved() { compgen -G "$output/$1/checkpoints/step-*/stretto.json" > /dev/null; }
reported() { grep -q '"first_step": *[0-9]' "$output/$1-incidents/incident-0001/report.json" 2> /dev/null; }

# recover NAME KEEPERS SETTING...: kills a rank, or what is its node, and leaves when the job has made its first new step.
recover() {
  local name=$1 keepers=$2 job_name=recovery-$$
  shift 2
  log=$output/$name.log
  echo "recovery.sh: $name" >&2
  "$build/tools/stretto-run" --ranks "$ranks" --launcher "$launcher" --keepers "$keepers" \
    --job "$job_name" --delay 0.5 --directory "$output/$name-incidents" \
    --mpirun "mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1" -- \
    "$build/examples/gpt/stretto-gpt" "$config" --set data.train="$output/text.train.bin" \
    --set data.validation= --set evaluate.every=0 --set sample.tokens=0 \
    --set steps=1000000000 --set output="$output/$name" "$@" ${sets[@]+"${sets[@]}"} \
    > "$log" 2>&1 &
  job=$!
  wait_for 600 "step $after" stepped "$name"
  if [ "$keepers" -gt 0 ]; then
    wait_for 600 "committed snapshot" committed
  else
    wait_for 600 "checkpoint" saved "$name"
    sync
    # What the page cache has of it goes; no privilege is needed for a file of one's own.
    find "$output/$name/checkpoints" -type f -exec dd if={} iflag=nocache count=0 status=none \;
  fi
  local victim
  victim=$(sed -n 's/.*"started".*"pid":\([0-9]*\).*/\1/p' \
    "$output/$name-incidents"/live-*/rank-$((ranks - 1)).events)
  kill -9 "$victim"
  if [ "$lose" = node ] && [ "$keepers" -gt 0 ]; then
    local node=$((keepers - 1))
    pkill -9 -f -- "--job $job_name --node $node " || fail "the keeper of node $node is not there"
    rm -f /dev/shm/stretto-"$job_name"-"$node"-*
  fi
  wait_for 900 "report" reported "$name"
  kill -INT $job 2> /dev/null || true
  wait $job 2> /dev/null || true
  job=
}
names=()
if [ "$from" != checkpoint ]; then
  names+=(snapshots)
  recover snapshots "$keepers" --set snapshot.every=1 --set checkpoint.every=0
fi
if [ "$from" != snapshots ]; then
  names+=(checkpoint)
  recover checkpoint 0 --set snapshot.every=0 --set checkpoint.every="$after" --set checkpoint.keep=1
fi

echo "seconds from SIGKILL of a rank to the first new step:"
for name in "${names[@]}"; do
  report=$output/$name-incidents/incident-0001/report.txt
  printf '%-10s %s\n' "$name" "$(sed -n 's/^ *seconds *//p' "$report")"
  printf '%-10s %s\n' "" "$(sed -n 's/^ *went on from *//p' "$report")"
  # Of the attempt that went on: what the ranks did until its first step.
  printf '%-10s %s\n' "" "$(grep -o 'set-up: .*' "$output/$name.log" | tail -1)"
done
