#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU and that no other machine can tell, in under eight minutes: tests, speed of the loss
# and of a step beside open_clip's and with captions cut to their lengths, memory predicted beside measured, pictures that
# are held on the device, and views that are made there; last, if time is left, a run's seconds to its first step
# (start.log) and the loss at 65,536 and 1,048,576 pairs. Results go to the folder given (default: gpu_check). A step that
# reaches its limit, or that of the whole, is ended and named, and the exit code is 1.
#
#   tools/gpu_check.sh [FOLDER]
set -uo pipefail
out=$(realpath -m "${1:-gpu_check}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
whole=470 # seconds
failed=0

run() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    local left=$((whole - SECONDS))
    limit=$((limit < left ? limit : left))
    echo "== $name"
    [ "$limit" -gt 0 ] || { echo "$name was not run: no time is left of $whole s"; failed=1; return; }
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    local code=$?
    tail -n 25 "$out/$name.log"
    [ "$code" -eq 0 ] || { echo "$name ended with $code, all of it in $out/$name.log"; failed=1; }
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no NVIDIA GPU is visible"' || exit 2
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/card.txt"
run similarity_tests 90 "$python" -m pytest -q -m cuda tests/similarity
run similarity 70 "$python" tools/benchmark_similarity.py --quick --json "$out/similarity.json"
run step 110 "$python" tools/benchmark_step.py --quick --variants plain cached open_clip accumulated --out "$out/step"
run memory 75 "$python" tools/benchmark_memory.py --device cuda --phases
run trim 25 "$python" tools/benchmark_engine.py trim --config configs/quickstart.yaml
run loader 45 "$python" tools/benchmark_loader.py emoji/train --image-size 32 --batch 2048 --samples 16384 --rounds 1 \
    --workers 0 --resident none host device --json "$out/loader.json"
run data_tests 30 "$python" -m pytest -q -m cuda tests/data
run augment 60 "$python" tools/benchmark_loader.py --photos 500 --image-size 224 --batch 512 --samples 4096 --rounds 1 \
    --workers 8 --augment-on workers device --randaugment 2 7 --json "$out/augment.json"
run engine_tests 110 "$python" -m pytest -q -m cuda tests/engine
run start 40 "$python" -m amclr_scale train --config quickstart run.folder="$out/runs" execution.precision=bf16 \
    execution.workers=6 train.samples=25600 "evaluation.splits=[emoji/val_concept]"
run large 90 "$python" tools/benchmark_similarity.py --large --batch 65536 1048576 --methods clip --json "$out/large.json"
exit "$failed"
