#!/usr/bin/env bash
# Everything that needs a GPU, in one command and within nine minutes: bench/gpu_check.sh [FOLDER]
#
# Builds, compares every kernel with `reference`, runs the tests that need a GPU, profiles and measures whole steps and
# layers, and looks for wrong accesses and races: what matters most comes first, so that little is lost where the time
# ends. Stops at nothing: each part has its own log in FOLDER (default: bench/results/gpu-check), and `summary.md` there
# says which failed. The exit status is 0 if none did, 1 if some did, 2 if there is no GPU to check.
set -uo pipefail
cd "$(dirname "$0")/.."
# This checkout, not one that happens to be installed.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# What a part has written is in its log if it is cut off.
export PYTHONUNBUFFERED=1

python=${PYTHON:-python3}
folder=$(realpath -m "${1:-bench/results/gpu-check}")
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu_check: torch sees no GPU; nothing was checked" >&2
  exit 2
}
mkdir -p "$folder"
summary=$folder/summary.md
failed=0
end=$((SECONDS + 540))

# part NAME SECONDS COMMAND...: runs it for at most that long, and no longer than what is left. Fails if it does.
part() {
  local name=$1 seconds=$2 status=0 start=$SECONDS left=$((end - SECONDS))
  shift 2
  if [[ $left -lt 10 ]]; then
    echo "| $name | not run: out of time | |" | tee -a "$summary"
    return 1
  fi
  [[ $seconds -lt $left ]] || seconds=$left
  timeout --kill-after=5 "$seconds" "$@" > "$folder/$name.log" 2>&1 || status=$?
  local verdict="ok"
  [[ $status == 0 ]] || verdict="FAILED ($status)"
  [[ $status != 124 && $status != 137 ]] || verdict="CUT OFF after $seconds s"
  echo "| $name | $verdict | $((SECONDS - start)) s |" | tee -a "$summary"
  [[ $status == 0 ]]
}

# beside PART...: starts a part whose time means nothing; `all_done` waits for those that were started.
beside() {
  part "$@" &
  jobs+=($!)
}
all_done() {
  local job
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  jobs=()
}
jobs=()

# alone PART...: runs a part whose time is measured.
alone() { part "$@" || failed=1; }

# tests PROCESSES ARGUMENT...: the command that runs tests, in several processes where pytest-xdist is installed.
tests() {
  local processes=$1
  shift
  command=("$python" -m pytest -q -p no:cacheprovider "$@")
  # pytest-benchmark warns that it is of no use there, and warnings are errors.
  if "$python" -c 'import xdist' 2> /dev/null; then command+=(-p no:benchmark -n "$processes"); fi
}

{
  echo "# GPU check, $(date -u +%Y-%m-%d), commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
  echo
  "$python" -c 'import torch; print(torch.__version__, "on", torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
  echo
  echo "| part | verdict | time |"
  echo "| --- | --- | ---: |"
} > "$summary"

alone machine 20 nvidia-smi
alone build 240 env S3D_CUDA=1 "$python" setup.py build_ext --inplace

# Right or wrong. Side by side, for all of them wait for a compiler or the host: Triton compiles one kernel at a time.
tests 4 tests/kernels/test_gpu.py -k "not triton" && beside kernels 150 env OMP_NUM_THREADS=1 "${command[@]}"
tests 6 tests/kernels/test_gpu.py -k "triton" && beside triton 150 env OMP_NUM_THREADS=1 "${command[@]}"
tests 2 tests/test_pretrain_gpu.py && beside trainer 150 env OMP_NUM_THREADS=1 "${command[@]}"
tests 2 tests/segmentation/test_finetune_gpu.py && beside segmentation 150 env OMP_NUM_THREADS=1 "${command[@]}"
beside selfcheck 150 env OMP_NUM_THREADS=1 "$python" -m s3d_kernels.selfcheck --device cuda
all_done

# Fast or slow. Nothing else runs.
alone step-profile 90 "$python" bench/gpu_step_profile.py "$folder/step-profile"
alone steps 110 "$python" -m pytest -q bench/ --benchmark --patch-size 160 --mask-ratios 0.75 --dtypes bfloat16 \
  --contenders "native,native plain decoder,torch,dense masked,dense" --seconds 5 -k test_step --results "$folder/results"
alone layers 60 "$python" -m pytest -q bench/ --benchmark --patch-size 160 --mask-ratios 0.75 --dtypes bfloat16 \
  --contenders "native,triton,dense masked,dense,dense channels-last" --seconds 0.3 -k "test_layer and conv_3" --results "$folder/results"

# Wrong accesses and races. Without torch's pool of memory, in which an access beyond a tensor is one to another. A test
# takes 15 to 35 seconds there.
for tool in memcheck racecheck; do
  beside "$tool" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q \
    -p no:cacheprovider tests/kernels/test_gpu.py -k "oracle and native-False-torch.bfloat16 and (3-native or norm-native) and not (1x3x3 or group or batch or average)"
done
all_done

# The rest, as far as there is time.
alone profile 60 "$python" -m s3d profile --output-dir "$folder/profile" --preset resenc-l --patch-size 160 160 160 \
  --mask-block 32 --batch-size 1 --precision bfloat16 --steps 2
alone steps-others 120 "$python" -m pytest -q bench/ --benchmark --patch-size 160 --mask-ratios 0.75 --dtypes bfloat16,float32 \
  --contenders "native,triton,torch,dense masked,dense channels-last" --seconds 5 -k "test_encoder or test_step" --results "$folder/others"

echo
cat "$summary"
exit "$failed"
