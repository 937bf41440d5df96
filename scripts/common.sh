# shellcheck shell=bash
# Sourced by the other scripts: paths, messages, and children that do not outlive the script.
# shellcheck disable=SC2034  # used by the scripts that source this
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
child=0

# Runs a command and waits for it. The command has a process group of its own, so that stop() can
# end all that it started, and a signal is handled at once and not only when the command is done.
run() {
  local status=0
  set -m
  "$@" < /dev/null &
  child=$!
  set +m
  wait "$child" || status=$?
  child=0
  return "$status"
}

stop() {
  trap '' INT TERM HUP
  if [ "$child" != 0 ]; then
    kill -TERM -- "-$child" 2> /dev/null || true
    wait "$child" 2> /dev/null || true
    # A function of the script ends before what it has started, which has ten seconds.
    for _ in $(seq 100); do
      kill -0 -- "-$child" 2> /dev/null || break
      sleep 0.1
    done
    kill -KILL -- "-$child" 2> /dev/null || true
  fi
  echo "$(basename "$0"): stopped by a signal" >&2
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

say() {
  if [ -t 1 ]; then printf '\n\033[1m%s\033[0m\n' "$*"; else printf '\n%s\n' "$*"; fi
}
fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}
# The same of a wrong call.
refuse() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}
