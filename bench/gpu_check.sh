#!/usr/bin/env bash
# Everything that needs a GPU, in one command and within nine minutes: bench/gpu_check.sh [FOLDER]
#
# Builds, compares every kernel with `reference`, runs the tests that need a GPU, looks for wrong accesses and races,
# measures layers and whole steps, and records what a step does. Stops at nothing: each part has its own log in FOLDER
# (default: bench/results/gpu-check), and `summary.md` there says which failed. The exit status is 0 if none did, 1 if
# some did, 2 if there is no GPU to check.
set -uo pipefail
cd "$(dirname "$0")/.."
# This checkout, not one that happens to be installed.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

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

# part NAME SECONDS COMMAND...: runs it for at most that long, and no longer than what is left.
part() {
  local name=$1 seconds=$2 status=0 start=$SECONDS left=$((end - SECONDS))
  shift 2
  if [[ $left -lt 10 ]]; then
    echo "| $name | not run: out of time | |" | tee -a "$summary"
    failed=1
    return
  fi
  [[ $seconds -lt $left ]] || seconds=$left
  timeout --kill-after=5 "$seconds" "$@" > "$folder/$name.log" 2>&1 || status=$?
  local verdict="ok"
  [[ $status == 0 ]] || { verdict="FAILED ($status)"; failed=1; }
  [[ $status != 124 && $status != 137 ]] || verdict="CUT OFF after $seconds s"
  echo "| $name | $verdict | $((SECONDS - start)) s |" | tee -a "$summary"
}

{
  echo "# GPU check, $(date -u +%Y-%m-%d), commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
  echo
  "$python" -c 'import torch; print(torch.__version__, "on", torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
  echo
  echo "| part | verdict | time |"
  echo "| --- | --- | ---: |"
} > "$summary"

part machine 20 nvidia-smi
part build 240 env S3D_CUDA=1 "$python" setup.py build_ext --inplace
part selfcheck 60 "$python" -m s3d_kernels.selfcheck --device cuda
part tests 150 "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_gpu.py
part trainer 90 "$python" -m pytest -q -p no:cacheprovider tests/test_pretrain_gpu.py
part segmentation 60 "$python" -m pytest -q -p no:cacheprovider tests/segmentation/test_finetune_gpu.py
# Without torch's pool of memory, in which an access beyond a tensor is one to another.
for tool in memcheck racecheck; do
  part "$tool" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -p no:cacheprovider \
    tests/kernels/test_gpu.py -k "oracle and native-False-torch.bfloat16 and (3-native or norm-native)"
done
part layers 120 "$python" -m pytest -q bench/ --benchmark --patch-size 160 --mask-ratios 0.75 --dtypes bfloat16 --seconds 1 \
  -k test_layer --results "$folder/results"
part steps 150 "$python" -m pytest -q bench/ --benchmark --patch-size 160 --mask-ratios 0.75 --dtypes bfloat16,float32 \
  --seconds 5 -k "test_encoder or test_step" --results "$folder/results"
part profile 90 "$python" -m s3d profile --output-dir "$folder/profile" --preset resenc-l --patch-size 160 160 160 \
  --mask-block 32 --batch-size 1 --precision bfloat16 --steps 2

echo
cat "$summary"
exit "$failed"
