#!/usr/bin/env bash
# Steps on documents of very unequal length with every static mesh and with dynamic ones, side by
# side (stretto-bench varlen), planned by costs that are fitted to these ranks first:
#   scripts/varlen_bench.sh [--ranks N] [--rate RATE] [--capacity N] [--steps N] [--rounds N]
#                           [--repetitions N] [--set section.name=value]... [-- OPTION...]
#   --ranks N      ranks of this machine (default 2)
#   --capacity N   tokens of a rank in a micro-batch (default 4096, the longest document, so that
#                  static meshes of all sizes can hold it)
#   --steps N      steps with each mesh (default 6)
#   --rounds N     how often (default 3)
#   --repetitions N   of what the fit measures (default 7, minutes on a slow link); 0: no fit, costs
#                  follow FLOPs and know nothing of the link
#   --rate RATE    ranks in two network namespaces that a link of this rate joins, as tc writes it:
#                  100mbit. Needs root, `ip netns` and `tc`; exit code 77 without. On CPUs, since both
#                  namespaces see the same GPUs
#   --set ...      overrides configs/varlen.json; what is behind -- goes to stretto-bench varlen
#                  (programs come from build/release, or from the directory in STRETTO_BUILD)
# Documents have 64 to 4,096 tokens, twice as long ones half as often.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"

ranks=2
rate=
capacity=4096
steps=6
rounds=3
repetitions=7
sets=()
while [ $# -gt 0 ]; do
  case $1 in
    --ranks | --rate | --capacity | --steps | --rounds | --repetitions)
      [ $# -ge 2 ] || refuse "$1 needs a value; see --help"
      declare "${1#--}=$2"
      shift 2
      ;;
    --set)
      [ $# -ge 2 ] || refuse "$1 needs a value; see --help"
      sets+=(--set "$2")
      shift 2
      ;;
    --) shift; break ;;
    -h | --help) sed -n '2,19s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) refuse "unknown option '$1'; see --help" ;;
  esac
done
for number in "$ranks" "$capacity" "$steps" "$rounds"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] ||
    refuse "--ranks, --capacity, --steps and --rounds must be positive numbers, not '$number'"
done
[[ $repetitions =~ ^[0-9]+$ ]] || refuse "--repetitions must be a number, not '$repetitions'"
build=${STRETTO_BUILD:-$root/build/release}
program=$build/benchmarks/stretto-bench
[ -x "$program" ] || fail "'$program' is not there; build first (README.md)"

scratch=$(mktemp -d)
names=("stretto-$$-a" "stretto-$$-b")
clean_up() {
  rm -rf "$scratch"
  for name in "${names[@]}"; do ip netns del "$name" 2> /dev/null || true; done
}
trap clean_up EXIT
for length in 64 128 256 512 1024 2048 4096; do
  for _ in $(seq $((4096 / length))); do echo $((length - length / 7)); done
  echo "$length"
done > "$scratch/lengths.txt"
settings=()
[ -z "$rate" ] || settings+=(--set runtime.device=cpu)
settings+=(--set "steps=$steps" --set data.sequence_length=4096 --set "batch.capacity=$capacity"
  --set batch.tokens=16384 "${sets[@]}")
options=("$@")
# By way of whatever starts all ranks.
fit_and_measure() {
  local costs=()
  if [ "$repetitions" -gt 0 ]; then
    costs=(--fit "$scratch/costs.json")
    "$@" "$program" fit "$root/configs/varlen.json" --output "$scratch/costs.json" \
      --repetitions "$repetitions" "${settings[@]}" > "$scratch/fit.log" ||
      fail "the costs could not be fitted"
  fi
  "$@" "$program" varlen "$root/configs/varlen.json" --lengths "$scratch/lengths.txt" \
    "${costs[@]}" --rounds "$rounds" "${settings[@]}" "${options[@]}"
}

if [ -z "$rate" ]; then
  run fit_and_measure "$root/scripts/mpirun.sh" "$ranks"
  exit
fi
[[ $rate =~ ^[1-9][0-9]*[kmg]?bit$ ]] || refuse "--rate is '$rate'; give a rate such as 200mbit"

skip() {
  echo "SKIP: $*" >&2
  exit 77
}
[ "$(id -u)" = 0 ] || skip "network namespaces need root"
for tool in ip tc; do
  command -v "$tool" > /dev/null || skip "there is no '$tool' here; install iproute2"
done
[ $((ranks % 2)) = 0 ] || refuse "--rate halves the ranks between two namespaces; --ranks is $ranks"
inside() { ip netns exec "${names[$1]}" "${@:2}"; }
link_up() {
  for name in "${names[@]}"; do ip netns add "$name" || return; done
  ip link add veth0 netns "${names[0]}" type veth peer name veth0 netns "${names[1]}" || return
  for side in 0 1; do
    inside $side ip addr add "10.98.0.$((side + 1))/24" dev veth0 &&
      inside $side ip link set lo up && inside $side ip link set veth0 up &&
      inside $side tc qdisc add dev veth0 root tbf rate "$rate" burst 64kb latency 400ms || return
  done
}
said=$(link_up 2>&1) || skip "this machine has no network namespaces with a rate limit: $said"

# Runs a command on all ranks; the code of one that failed.
both_sides() {
  local here=$((ranks / 2)) pids=() status=0
  for ((rank = 0; rank < ranks; ++rank)); do
    inside $((rank / here)) env "RANK=$rank" "WORLD_SIZE=$ranks" "LOCAL_RANK=$((rank % here))" \
      "LOCAL_WORLD_SIZE=$here" "GROUP_RANK=$((rank / here))" MASTER_ADDR=10.98.0.1 \
      MASTER_PORT=29556 "$@" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}
echo "two namespaces, a link of $rate each way"
run fit_and_measure both_sides
