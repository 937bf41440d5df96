#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that Stretto needs and that are missing.
#   scripts/install_dependencies.sh [--for build|quickstart|test|all]
# Prints nothing when nothing is missing. As root it installs; with passwordless sudo it installs
# through sudo; otherwise it prints the command to run and exits with 1.
set -euo pipefail

goal="test"
while [ $# -gt 0 ]; do
  case $1 in
    --for) goal=${2:-}; shift; [ $# -gt 0 ] && shift ;;
    --for=*) goal=${1#--for=}; shift ;;
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "install_dependencies.sh: unknown option '$1'; see --help" >&2; exit 2 ;;
  esac
done
case $goal in
  build | quickstart | test | all) ;;
  *) echo "install_dependencies.sh: --for must be build, quickstart, test or all" >&2; exit 2 ;;
esac

# Package, the command it brings where any provider of that command will do ("-": none), the purpose.
needed="
g++                 c++          compiler (GCC 12 or later)
cmake               cmake        build system
ninja-build         ninja        build system
pkg-config          pkg-config   finds the libraries below
libopenmpi-dev      -            ranks: MPI headers
openmpi-bin         mpirun       ranks: launcher
libopenblas-dev     -            matrix products on the CPU
libabsl-dev         -            error values
libspdlog-dev       -            logging
libfmt-dev          -            logging
nlohmann-json3-dev  -            JSON
libisal-dev         -            checksums
libxxhash-dev       -            hashes
libpcre2-dev        -            regular expressions of tokenizers
libutf8proc-dev     -            Unicode tables of tokenizers
"
[ "$goal" = quickstart ] || [ "$goal" = all ] && needed+="
bible-kjv           bible        prints the text of the quick start
bible-kjv-text      -            the King James Bible (public domain), the quick start's text
"
[ "$goal" = test ] || [ "$goal" = all ] && needed+="
libgtest-dev        -            tests
libgmock-dev        -            tests
python3             python3      tests that start and stop ranks
iproute2            ip           two machines of a test: network namespaces
python3-pip         -            fetches GPT-2's vocabulary for a test
"
[ "$goal" = all ] && needed+="
ccache              ccache       faster rebuilds (optional)
clang               clang        fuzzers and sanitizers (optional)
clang-format        clang-format code style (optional)
clang-tidy          clang-tidy   code checks (optional)
"

if ! command -v dpkg-query > /dev/null; then
  [ "${STRETTO_SKIP_INSTALL:-}" = 1 ] && exit 0
  echo "This script knows Debian and Ubuntu only. Install what these packages hold, then run again" >&2
  echo "with STRETTO_SKIP_INSTALL=1:" >&2
  awk 'NF { print "  " $1 }' <<< "$needed" >&2
  exit 1
fi

names=$(awk 'NF { print $1 }' <<< "$needed")
# shellcheck disable=SC2086  # package names are single words
installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' $names 2> /dev/null |
  awk '$1 == "installed" { print $2 }' || true)
missing=()
reasons=""
while read -r package command purpose; do
  [ -z "$package" ] && continue
  grep -qxF -- "$package" <<< "$installed" && continue
  [ "$command" != - ] && command -v "$command" > /dev/null && continue
  missing+=("$package")
  reasons+=$(printf '  %-20s %s' "$package" "$purpose")$'\n'
done <<< "$needed"
[ ${#missing[@]} = 0 ] && exit 0

echo "Missing packages:"
printf '%s' "$reasons"
install=(apt-get install -y --no-install-recommends "${missing[@]}")
if [ "$(id -u)" = 0 ]; then
  prefix=(env)
elif command -v sudo > /dev/null && sudo -n true 2> /dev/null; then
  prefix=(sudo -n env)
else
  echo "Install them as root, then run this again:" >&2
  echo "  apt-get update && ${install[*]}" >&2
  exit 1
fi

echo "Installing them with apt-get ..."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  "${prefix[@]}" DEBIAN_FRONTEND=noninteractive "$@" < /dev/null >> "$log" 2>&1
}
# Package lists may be absent (containers) or stale: fetch them only then.
if ! apt "${install[@]}"; then
  if ! { apt apt-get update && apt "${install[@]}"; }; then
    tail -n 20 "$log" >&2
    echo "apt-get could not install them; its last lines are above. To see it all, run as root:" >&2
    echo "  apt-get update && ${install[*]}" >&2
    exit 1
  fi
fi
echo "Installed ${#missing[@]} packages."
