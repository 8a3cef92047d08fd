#!/usr/bin/env bash
# Builds and runs the stand-alone tests of the native kernels: csrc/tests/run.sh [--objects FOLDER] [VARIANT...]
#   emulator           the emulator of CUDA: right kernels pass, planted faults are found
#   emulator_ucontext  the same without its assembly, with UndefinedBehaviorSanitizer
#   cuda               the CUDA kernels, run by the emulator
#   count              what they do on the layers of an encoder, counted by the emulator
# and of the CPU kernels
#   plain    as they are
#   address  with AddressSanitizer and UndefinedBehaviorSanitizer
#   thread   with ThreadSanitizer: needs clang, its libomp and archer
#   neon     for aarch64, run by qemu: needs aarch64-linux-gnu-g++ and qemu-aarch64
#   python   the native backend's Python tests, with a library built as in "address": needs the packages of [test]
# Without a variant: all but python. FOLDER holds what tests/kernels/emulated_cuda.py has compiled of the emulator and the
# CUDA kernels, from the same sources; the variants emulator, cuda and count link that. CXX names the compiler, CXXFLAGS
# adds flags, PYTHON names the interpreter. Exit status: 0 all good, 77 what was asked for was skipped (with the reason in
# the output) and nothing failed, else a failure.
set -euo pipefail
tests=$(cd "$(dirname "$0")" && pwd)
csrc=$(dirname "$tests")
root=$(dirname "$csrc")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Three threads on fewer processors spend most of their time in libgomp's busy waiting otherwise.
export OMP_WAIT_POLICY=passive
skipped=0
objects=
if [[ ${1:-} == --objects ]]; then
  objects=$2
  shift 2
fi

skip() {
  echo "skipped: $*"
  skipped=$((skipped + 1))
}

# build FOLDER COMPILER FLAGS...: every instruction set with its own flags, as setup.py does.
build() {
  local folder=$1 cxx=$2 source flags machine job openmp=-fopenmp jobs=()
  shift 2
  mkdir -p "$folder"
  machine=$("$cxx" -dumpmachine)
  echo 'int main() { return 0; }' > "$folder/try.cc"
  "$cxx" -fopenmp "$folder/try.cc" -o "$folder/try" 2> /dev/null || { openmp= && echo "without OpenMP: one thread"; }
  for source in "$csrc"/cpu/isa_*.cc "$tests"/*.cc; do
    case $(basename "$source") in
      isa_avx2.cc) flags="-mavx2 -mfma -mf16c" ;;
      isa_avx512.cc) flags="-mavx512f -mavx512vl -mfma -mprefer-vector-width=512" ;;
      *) flags= ;;
    esac
    [[ -z $flags || $machine == x86_64* ]] || continue
    # shellcheck disable=SC2086
    "$cxx" -std=c++17 -O1 -fno-trapping-math -fno-math-errno $openmp -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi \
      "-I$csrc" "-I$csrc/include" "$@" $flags ${CXXFLAGS:-} -c "$source" -o "$folder/$(basename "$source" .cc).o" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job"; done
  # shellcheck disable=SC2086
  "$cxx" $openmp "$@" ${CXXFLAGS:-} "$folder"/*.o -o "$folder/test_cpu"
}

plain() {
  build "$work/plain" "${CXX:-c++}"
  "$work/plain/test_cpu"
}

sanitizers=(-g -fsanitize=address,undefined -fno-sanitize-recover=all)

address() {
  build "$work/address" "${CXX:-c++}" "${sanitizers[@]}"
  "$work/address/test_cpu" --every 3
}

thread() {
  # GCC's libgomp is not instrumented: ThreadSanitizer takes every result read behind one of its barriers for a race.
  # Archer, which comes with LLVM's libomp, tells it about them.
  local cxx archer status
  cxx=$(compgen -c clang++ | grep -E '^clang\+\+(-[0-9]+)?$' | sort -V | head -n 1 || true)
  [[ -n $cxx ]] || { skip "no clang++ (and GCC's libgomp hides its barriers from ThreadSanitizer)"; return; }
  mkdir -p "$work/thread"
  echo 'int main() {}' > "$work/thread/try.cc"
  "$cxx" -fopenmp -fsanitize=thread "$work/thread/try.cc" -o "$work/thread/try" 2> /dev/null ||
    { skip "$cxx has no libomp or no ThreadSanitizer"; return; }
  archer=$(dirname "$(readlink -f "$(ldd "$work/thread/try" | grep -o '/[^ ]*libomp[^ ]*')")")/libarcher.so
  [[ -e $archer ]] || { skip "no libarcher.so beside the libomp of $cxx"; return; }
  build "$work/thread" "$cxx" -g -fsanitize=thread
  # libomp itself is not instrumented.
  export OMP_TOOL_LIBRARIES=$archer TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66"
  status=0
  "$work/thread/test_cpu" --race > "$work/thread/race.txt" 2>&1 || status=$?
  if [[ $status != 66 ]] || ! grep -q 'ThreadSanitizer: data race' "$work/thread/race.txt"; then
    cat "$work/thread/race.txt"
    echo "a race between two threads of OpenMP was not found: the test would mean nothing"
    return 1
  fi
  TSAN_OPTIONS="$TSAN_OPTIONS halt_on_error=1" "$work/thread/test_cpu" --every 12
}

neon() {
  local tool
  for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
    [[ -n $(command -v $tool) ]] || { skip "no $tool"; return; }
  done
  build "$work/neon" aarch64-linux-gnu-g++ -static
  qemu-aarch64 "$work/neon/test_cpu" --every 8
}

# The backend loads the library beside the package, so a copy of both is built and tested.
python() {
  local copy=$work/python python=${PYTHON:-python3} preload="" name
  mkdir "$copy"
  cp -r "$root"/{s3d,s3d_kernels,csrc,tests,setup.py,pyproject.toml,README.md,LICENSE} "$copy"
  rm -f "$copy"/s3d_kernels/*.so
  cd "$copy"
  CXXFLAGS="${sanitizers[*]} -O1" S3D_NATIVE=1 S3D_CUDA=0 "$python" setup.py -q build_ext --inplace
  # The copy must be what is imported, also where another one is installed.
  for name in libasan.so libubsan.so; do preload="$preload $("${CXX:-c++}" -print-file-name=$name)"; done
  PYTHONPATH=$copy LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 "$python" - <<'END'
import pathlib, sys
import pytest, s3d_kernels
from s3d_kernels.backends import native

assert pathlib.Path(s3d_kernels.__file__).is_relative_to(pathlib.Path.cwd()), s3d_kernels.__file__
assert b"__asan_init" in native.CPU.path.read_bytes(), "the library was built without AddressSanitizer"
options = ["-q", "-p", "no:cacheprovider", "--timeout=3000"]
sys.exit(
    pytest.main([*options, "tests/kernels/test_native.py"])
    or pytest.main([*options, "tests/kernels/test_operators.py", "-k", "native"])
)
END
}

# build_emulated PROGRAM "SOURCES" FLAGS...: the emulator and what it runs.
build_emulated() {
  local folder source compiled job jobs=() linked=() program=$1 sources=$2
  shift 2
  folder=$(dirname "$program")
  mkdir -p "$folder"
  for source in "$csrc"/emulator/*.cc $sources; do
    compiled=$objects/$(basename "$(dirname "$source")")_$(basename "$source").o
    if [[ -n $objects && -e $compiled ]]; then
      linked+=("$compiled")
      continue
    fi
    # shellcheck disable=SC2086
    "${CXX:-c++}" -std=c++17 -O1 -Wall -Wextra -Wno-unknown-pragmas -DS3D_EMULATOR "-I$csrc" "-I$csrc/include" \
      "$@" ${CXXFLAGS:-} -x c++ -c "$source" -o "$folder/$(basename "$source").o" &
    jobs+=($!)
    if [[ ${#jobs[@]} -ge $(nproc) ]]; then
      wait "${jobs[0]}"
      jobs=("${jobs[@]:1}")
    fi
  done
  for job in "${jobs[@]}"; do wait "$job"; done
  # shellcheck disable=SC2086
  "${CXX:-c++}" "$@" ${CXXFLAGS:-} "$folder"/*.o "${linked[@]}" -o "$program"
}

emulator_tests="$csrc/emulator/tests/main.cc $(echo "$csrc"/emulator/tests/test_*.cu)"

emulator() {
  build_emulated "$work/emulator/test_emulator" "$emulator_tests"
  "$work/emulator/test_emulator"
  "$work/emulator/test_emulator" --speed
}

emulator_ucontext() {
  local objects=
  build_emulated "$work/ucontext/test_emulator" "$emulator_tests" -DS3D_EMULATOR_UCONTEXT -g \
    -fsanitize=undefined -fno-sanitize-recover=all
  "$work/ucontext/test_emulator"
}

cuda() {
  build_emulated "$work/cuda/test_cuda" "$(echo "$csrc"/cuda/*.cu "$csrc"/cuda/tests/*.c[cu])"
  "$work/cuda/test_cuda" --list | xargs -n 1 -P "$(nproc)" "$work/cuda/test_cuda"
}

# The table in docs/performance.md.
count() {
  build_emulated "$work/cuda/test_cuda" "$(echo "$csrc"/cuda/*.cu "$csrc"/cuda/tests/*.c[cu])"
  "$work/cuda/test_cuda" --count
}

variants=("$@")
[[ $# -gt 0 ]] || variants=(emulator emulator_ucontext cuda plain address thread neon)
for variant in "${variants[@]}"; do
  case $variant in
    emulator | emulator_ucontext | cuda | count | plain | address | thread | neon | python) ;;
    *) echo "unknown variant $variant; known: emulator emulator_ucontext cuda count plain address thread neon python" >&2 && exit 2 ;;
  esac
  echo "== $variant"
  # Not in a condition, where the shell would go on behind errors.
  start=$SECONDS
  $variant
  echo "== $variant: $((SECONDS - start)) s"
done
[[ $skipped == 0 ]] || exit 77
