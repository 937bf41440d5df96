#!/usr/bin/env bash
# Fuzzes the readers of hostile input under ASan and UBSan, each for a minute:
#   scripts/fuzz.sh [SECONDS]
# Findings are left in build/fuzz/findings. Needs clang with libFuzzer (clang, libclang-rt-dev).
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"

seconds=${1:-60}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || refuse "seconds must be a positive number, not '$seconds'"
command -v clang++ > /dev/null ||
  fail "clang++ was not found; on Debian or Ubuntu: apt-get install clang libclang-rt-dev"
readers=(fuzz_config fuzz_safetensors fuzz_token_file fuzz_tokenizer)
build=$root/build/fuzz
run cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_COMPILER=clang++ -DSTRETTO_BUILD_FUZZERS=ON -DSTRETTO_BUILD_TESTS=ON \
  -DSTRETTO_BUILD_BENCHMARKS=OFF -DSTRETTO_CUDA=OFF || fail "cmake failed, see above"
run cmake --build "$build" --target "${readers[@]}" || fail "the build failed, see above"
status=0
for reader in "${readers[@]}"; do
  corpus=$build/corpus/$reader
  mkdir -p "$corpus" "$build/findings"
  say "$reader, $seconds s"
  run "$build/tests/fuzz/$reader" -max_total_time="$seconds" -print_final_stats=1 -verbosity=0 \
    -artifact_prefix="$build/findings/$reader-" "$corpus" \
    "$root/tests/fuzz/seeds/${reader#fuzz_}" || status=1
done
[ "$status" = 0 ] && say "no findings" || say "findings in $build/findings"
exit "$status"
