#!/usr/bin/env bash
# Installs a build, moves the tree, and builds a consumer from it with CMake and with a plain compiler call.
#
#   install_test.sh BUILD_DIR SOURCE_DIR CXX
set -euo pipefail

build=$(realpath "$1") source=$(realpath "$2") cxx=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

expect_output() {
  local name=$1 line
  shift
  "$@" > "$work/$name.txt"
  for line in 'token 0: out 1.0000 2.0000 lse 0.7071' 'token 1: out 2.3395 3.3395 lse 1.1079' \
    'token 2: out 3.5105 4.5105 lse 2.1004'; do
    if ! grep -qxF "one pass $line" "$work/$name.txt" || ! grep -qxF "ring $line" "$work/$name.txt"; then
      echo "install_test: $name does not print '$line' for both ways:" >&2
      cat "$work/$name.txt" >&2
      exit 1
    fi
  done
  echo "install_test: $name ok"
}

cmake --install "$build" --prefix "$work/first" > /dev/null
mv "$work/first" "$work/installed"
prefix=$work/installed
if grep -rIl -e "$source" -e "$work/first" "$prefix"; then
  echo "install_test: the files above name folders of the build" >&2
  exit 1
fi

"$prefix/bin/annulus" --help > /dev/null
echo "install_test: program ok"

# Each public header alone: it must bring what it needs.
for header in "$prefix"/include/annulus/*.h; do
  "$cxx" -std=c++20 -Wall -Wextra -Werror -fsyntax-only -x c++ -I "$prefix/include" \
    -include "$header" /dev/null
done
echo "install_test: headers ok"

cmake -S "$source/examples/consumer" -B "$work/consumer" -G Ninja -DCMAKE_CXX_COMPILER="$cxx" \
  -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$prefix" > /dev/null
cmake --build "$work/consumer" > /dev/null
expect_output cmake "$work/consumer/consumer"

pc_dir=$(dirname "$(find "$prefix" -name annulus.pc)")
read -ra flags <<< "$(PKG_CONFIG_PATH=$pc_dir pkg-config --static --cflags --libs annulus)"
"$cxx" -std=c++20 "$source/examples/consumer/consumer.cc" "${flags[@]}" -o "$work/plain"
expect_output pkg_config "$work/plain"
