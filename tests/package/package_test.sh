#!/usr/bin/env bash
# Uses Stretto as other projects do. Each case exits non-zero when something is wrong:
#   package_test.sh install      BUILD_DIRECTORY WORK   installs to WORK/prefix and moves it to WORK/moved
#   package_test.sh embed        SOURCE WORK            builds examples/embed on it, runs it on 2 ranks
#   package_test.sh pkg_config   SOURCE WORK            one compiler command with pkg-config's flags
#   package_test.sh components   SOURCE WORK            components that exist, and one that does not
#   package_test.sh subdirectory SOURCE WORK            add_subdirectory instead of an installation
set -euo pipefail
kind=$1
from=$2
work=$3
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$work"
cd "$work"
unset CMAKE_PREFIX_PATH stretto_DIR

die() {
  echo "package test '$kind': $*" >&2
  exit 1
}

case $kind in
  install)
    rm -rf prefix moved
    cmake --install "$from" --prefix "$work/prefix" > install.log || die "see $work/install.log"
    mv prefix moved
    # Nothing may point back to where it was built or first installed.
    if grep -rlF --include='*.cmake' --include='*.pc' -e "$from" -e "$work/prefix" moved; then
      die "these files hold paths of the build or of the first prefix"
    fi
    # Trainers that the documentation has users run, and programs that look for another beside them.
    for program in stretto-gpt train_varlen stretto-tokenize stretto-run stretto-keeper; do
      "moved/bin/$program" --help > /dev/null || die "$program does not start"
    done
    ;;

  embed)
    rm -rf embed
    cmake -S "$from/examples/embed" -B embed -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DCMAKE_PREFIX_PATH="$work/moved"
    cmake --build embed
    [ -f "$work/moved/lib/cmake/stretto/strettoConfig.cmake" ] || die "nothing is installed"
    grep -q '^stretto_DIR.*=.*/moved/' embed/CMakeCache.txt || die "it found another installation"
    ranks=2
    command -v mpirun > /dev/null || ranks=1
    # Its own source is text enough; several copies make an epoch longer.
    cat "$from"/include/stretto/*/*.h | LC_ALL=C tr -cd '\11\12\40-\176' > embed/text
    if [ $ranks = 2 ]; then
      "$from/scripts/mpirun.sh" 2 embed/embed embed/text > embed/output
    else
      embed/embed embed/text > embed/output
    fi
    head -n 1 embed/output
    tail -n 1 embed/output
    # 100 steps, each printed once: by one rank only. Bytes at random are ln 256 = 5.5 nats.
    awk '{ if ($1 != "step" || $2 != NR) exit 1; loss[NR] = $4 }
         END { exit !(NR == 100 && loss[1] > 4.5 && loss[100] < loss[1] - 1.5) }' \
      embed/output || die "the loss did not fall as it must, see $work/embed/output"
    if [ -e /dev/full ] && embed/embed embed/text > /dev/full 2> embed/errors; then
      die "lost output is no error"
    fi
    ;;

  pkg_config)
    command -v pkg-config > /dev/null || { echo "SKIP: pkg-config is not installed"; exit 0; }
    export PKG_CONFIG_PATH=$work/moved/lib/pkgconfig
    # pkg-config escapes the spaces of paths for a shell.
    flags=$(pkg-config --cflags --libs stretto)
    eval "${CXX:-c++} -std=c++20 -Wl,-rpath,'$work/moved/lib' -o pkg_config_program" \
      "'$here/pkg_config.cc'" "$flags"
    ./pkg_config_program
    ;;

  components)
    rm -rf components
    cmake -S "$here/components" -B components -G Ninja -DCMAKE_PREFIX_PATH="$work/moved"
    ;;

  subdirectory)
    rm -rf subdirectory
    cmake -S "$here/subdirectory" -B subdirectory -G Ninja -DSTRETTO_SOURCE="$from" \
      -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0
    cmake --build subdirectory --target use_core
    subdirectory/use_core
    ;;

  *) die "unknown case" ;;
esac
