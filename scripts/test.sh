#!/usr/bin/env bash
# Builds everything that this machine can build and runs all tests:
#   scripts/test.sh [--sanitize] [--jobs N]
#   --sanitize  instead: AddressSanitizer and UndefinedBehaviorSanitizer on core, comm,
#               operations, kernels and readers, then ThreadSanitizer on streams and worlds of threads
#   --jobs N    parallel jobs (default: the number of cores)
# Ends with ctest's summary and its exit status.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"

jobs=$(nproc)
sanitize=
while [ $# -gt 0 ]; do
  case $1 in
    --sanitize) sanitize=1; shift ;;
    --jobs) jobs=${2:-}; shift; [ $# -gt 0 ] && shift ;;
    --jobs=*) jobs=${1#--jobs=}; shift ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) refuse "unknown option '$1'; see --help" ;;
  esac
done
[[ $jobs =~ ^[1-9][0-9]*$ ]] || refuse "--jobs must be a positive number, not '$jobs'"
export CTEST_PARALLEL_LEVEL=$jobs CMAKE_BUILD_PARALLEL_LEVEL=$jobs

# Configures and builds: build DIRECTORY "TARGETS" CMAKE_OPTIONS...
build() {
  local directory=$1 targets=$2
  shift 2
  run cmake -S "$root" -B "$directory" -G Ninja "$@" || fail "cmake failed, see above"
  # shellcheck disable=SC2086  # target names are single words
  run cmake --build "$directory" ${targets:+--target $targets} || fail "the build failed, see above"
}

# Runs ctest, then prints what was skipped and why, then ctest's summary.
# test_in DIRECTORY CTEST_OPTIONS...
test_in() {
  local directory=$1 log=$1/ctest.log status=0
  shift
  run bash -c 'set -o pipefail; log=$1; shift; ctest "$@" 2>&1 | tee "$log"' _ "$log" \
    --test-dir "$directory" --output-on-failure --no-tests=error "$@" || status=$?
  local skipped
  skipped=$(skipped_tests "$log" "$directory/Testing/Temporary/LastTest.log")
  if [ -n "$skipped" ]; then
    say "Skipped:"
    echo "$skipped"
  fi
  echo
  sed -n '/^[0-9]*% tests passed/,/^Total Test time/p' "$log"
  return "$status"
}

# "  NAME: reason" for each test that ctest's output calls skipped. The reason is the line after
# GoogleTest's "file.cc:12: Skipped", or the last line that the test printed.
skipped_tests() {
  awk '
    NR == FNR {
      if (/^The following tests did not run:/) listed = 1
      else if (listed && /^\t *[0-9]+ - .*\)$/) skipped[$3] = 1
      next
    }
    /^[0-9]+\/[0-9]+ Testing: / { name = $3; reason = ""; after = 0; found = 0; next }
    /^<end of output>/ {
      sub(/^(SKIP|skipped): /, "", reason)
      if (name in skipped) { print "  " name ": " reason; delete skipped[name] }
      next
    }
    after { reason = $0; after = 0; found = 1 }
    /\.cc:[0-9]+: Skipped$/ { after = 1 }
    !found && !/^(-+|Output:|Command:|Directory:|"|$)/ { reason = $0 }
    END { for (name in skipped) print "  " name ": not run" }' "$1" "$2"
}

"$root/scripts/install_dependencies.sh" --for test
say "Machine"
echo "$(nproc) cores, $(awk '/^MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo) memory," \
  "$(c++ --version | head -n 1), $(cmake --version | head -n 1)"

if [ -z "$sanitize" ]; then
  timeout 120 "$root/scripts/fetch_gpt2_vocabulary.sh" > /dev/null 2>&1 < /dev/null ||
    echo "GPT-2's vocabulary could not be fetched from PyPI; the test that needs it is skipped"
  say "Build"
  build "$root/build/release" "" -DCMAKE_BUILD_TYPE=Release -DSTRETTO_BUILD_TESTS=ON \
    -DSTRETTO_BUILD_BENCHMARKS=ON -DSTRETTO_CUDA=AUTO
  say "Tests"
  test_in "$root/build/release"
  exit
fi

# Programs under a sanitizer take long to compile: only what reads hostile input or shares memory
# between threads.
memory_targets="core_test comm_test ops_test data_test plan_test snapshot_test"
thread_targets="core_test comm_test data_test snapshot_test model_test parallel_test pipeline_trainer_test trainer_test zero_trainer_test tensor_trainer_test"
# What they report ends the test; by default undefined behaviour is only printed.
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
status=0
say "AddressSanitizer and UndefinedBehaviorSanitizer"
build "$root/build/asan-ubsan" "$memory_targets" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DSTRETTO_SANITIZE=address,undefined -DSTRETTO_BUILD_TESTS=ON -DSTRETTO_BUILD_BENCHMARKS=OFF \
  -DSTRETTO_CUDA=OFF
test_in "$root/build/asan-ubsan" -R "^(${memory_targets// /|})\\." || status=$?
say "ThreadSanitizer"
build "$root/build/tsan" "$thread_targets" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DSTRETTO_SANITIZE=thread -DSTRETTO_BUILD_TESTS=ON -DSTRETTO_BUILD_BENCHMARKS=OFF \
  -DSTRETTO_CUDA=OFF
test_in "$root/build/tsan" -R "^(${thread_targets// /|})\\." || status=$?
exit "$status"
