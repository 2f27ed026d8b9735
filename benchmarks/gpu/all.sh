#!/usr/bin/env bash
# Everything that needs a GPU, the most valuable first; logs and the CSV go to a folder:
#     bash benchmarks/gpu/all.sh OUT [STEP ...]      steps: tests cpu stock split check tiers fp8 products gated lora more (default: the first five)
set -u
out=${1:?give a folder for the results}
shift
steps=${*:-tests cpu stock split check}
mkdir -p "$out"
cd "$(dirname "$0")/../.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
train() { # name, seconds at most, arguments
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" python -W ignore benchmarks/gpu train --csv "$out/gpu_train.csv" "$@" 2>&1 | tee "$out/$name.log"
}
for step in $steps; do
    case $step in
    tests) timeout 240 python -m pytest -q -m gpu tests/backends/gpu 2>&1 | tee "$out/tests.log" ;;
    cpu) train cpu 240 --batch 1 4 --lora-device cpu gpu --steps 2 ;;
    stock)
        train stock 90 --case stock --batch 1 4
        train stock-9 60 --case stock --layers 9
        ;;
    split) train split 200 --layers 9 --gpu-experts 0 8 16 32 64 --lora-device gpu ;;
    check) train check 200 --check --layers 4 --sequence 512 ;;
    tiers) # half an hour
        python -W ignore benchmarks/gpu tiers --csv "$out/gpu_tiers.csv" 2>&1 | tee "$out/tiers.log"
        python -W ignore benchmarks/gpu tiers --tokens 2048 8192 --slower-bus 2 4 --csv "$out/gpu_tiers.csv" 2>&1 |
            tee -a "$out/tiers.log"
        ;;
    fp8) timeout 300 python -W ignore benchmarks/gpu fp8 --csv "$out/gpu_fp8.csv" 2>&1 | tee "$out/fp8.log" ;;
    products) timeout 300 python -W ignore benchmarks/gpu products --csv "$out/gpu_products.csv" 2>&1 | tee "$out/products.log" ;;
    gated) timeout 400 python -W ignore benchmarks/gpu gated --csv "$out/gpu_gated.csv" 2>&1 | tee "$out/gated.log" ;;
    lora) timeout 180 python -W ignore benchmarks/gpu lora --csv "$out/gpu_lora.csv" 2>&1 | tee "$out/lora.log" ;;
    more)
        train off 300 --batch 1 4 --checkpointing off --steps 2
        train split-cpu 200 --layers 9 --gpu-experts 8 32 64 --lora-device cpu
        ;;
    *) echo "unknown step $step" ;;
    esac
done
