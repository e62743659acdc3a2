#!/usr/bin/env bash
# What must be known on a GPU. Each item ends within 10 minutes, prints its tables last and leaves its logs in OUT.
#     bash tests/evidence/gpu.sh OUT [1|2|3]     1: does it work   2: what a layer costs   3: what a model costs
# Without CUDA, or with DEVICE=cpu, shapes and runs are small: that tests the script. PYTHON names the interpreter.
set -u
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 1
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python}
device=${DEVICE:-$($python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
small=$([ "$device" = cpu ] && echo yes)

# step NAME COMMAND...: its output into OUT/NAME.log; one row with its seconds, and the last line where it failed.
step() {
    local name=$1 began=$SECONDS left=$((570 - SECONDS)) result=ok
    shift
    if ! timeout -k 5 $((left > 5 ? left : 1)) "$@" >"$out/$name.log" 2>&1; then
        result="failed or out of time: $(tail -n 1 "$out/$name.log" | cut -c-300)"
    fi
    echo "| $name | $((SECONDS - began)) | $result |" | tee -a "$out/steps.md"
}

# killed FOLDER COMMAND...: SIGKILL as soon as FOLDER holds a checkpoint.
killed() {
    local folder=$1
    shift
    rm -rf "$folder"
    "$@" &
    while kill -0 $! && [ ! -e "$folder/checkpoint.pt" ]; do sleep 0.1; done 2>/dev/null
    kill -KILL $!
    wait $!
    [ -e "$folder/checkpoint.pt" ]
}
export -f killed

# losses NAME: lines of "step loss" from a run's log.
losses() {
    sed -n 's#^step \([0-9]*\)/[0-9]* | loss \([0-9.]*\) .*#\1 \2#p' "$out/$1.log"
}

item1() {
    local run="$python train.py --device=$device --overwrite=true" suite=tests arc=""
    if [ "$small" ]; then
        run="$run --max_steps=24 --batch_size=8 --eval_examples=50 --checkpoint_interval=5"
        suite=tests/test_metrics.py arc="--max_steps=2 --batch_size=2 --eval_examples=5"
    fi
    step pytest $python -m pytest -q $suite
    step sarcasm $run --out_dir="$out/sarcasm"
    printf '"%s"\n' "area man wins pie contest" "senate passes budget after long debate" >"$out/texts.jsonl"
    step predict $python train.py --device=$device --predict="$out/texts.jsonl" --out_dir="$out/sarcasm"
    step killed bash -c "killed $out/resumed $run --out_dir=$out/resumed"
    step resumed $run --out_dir="$out/resumed" --resume=true
    step losses bash -c "killed $out/losses $run --log_interval=1 --out_dir=$out/losses"
    step losses_cpu bash -c "killed $out/losses_cpu $run --log_interval=1 --device=cpu --out_dir=$out/losses_cpu"
    step sarcasm_compiled $run --compile=true --out_dir="$out/sarcasm_compiled"
    step arc_easy $run --task=arc_easy $arc --out_dir="$out/arc_easy"
    step arc_easy_compiled $run --task=arc_easy $arc --compile=true --out_dir="$out/arc_easy_compiled"
    printf '\n| run | its last line |\n|---|---|\n'
    for name in sarcasm predict resumed sarcasm_compiled arc_easy arc_easy_compiled; do
        echo "| $name | $(tail -n 1 "$out/$name.log") |"
    done
    cmp "$out"/{sarcasm,resumed}/metrics.jsonl && echo "killed and resumed: the same numbers"
    printf '\n| step | loss here | loss on a CPU in float32 |\n|---:|---:|---:|\n'
    paste <(losses losses) <(losses losses_cpu) | awk '
        NF == 4 && (NR == 1 || NR % 5 == 0) {print "| " $1 " | " $2 " | " $4 " |"}
        NF == 4 {d = $2 > $4 ? $2 - $4 : $4 - $2; if (d > most) most = d}
        END {print "largest difference: " most + 0}'
}

benchmark="$python tests/evidence/benchmark.py --device=$device"
item2() {
    local sizes="--shapes=768x768,4096x4096,14336x4096 --tokens=512,2048,8192,16384 --rank=32 --rounds=5"
    [ "$small" ] && sizes="--shapes=96x64 --tokens=16,32 --rounds=2"
    step layers $benchmark $sizes --dtype=bfloat16,float32
    cat "$out/layers.log"
}

item3() {
    local llama="--models=llama3-8b --batch=4x512,16x256 --rank=32 --rounds=5" batch="--batch=32x128 --rank=8"
    [ "$small" ] && llama="--models=llama-tiny --batch=2x16,2x32 --rounds=2" batch="--batch=2x16 --rounds=1"
    step llama_checkpointing $benchmark $llama --checkpointing=true
    step llama $benchmark $llama
    step minilm $benchmark --models=minilm $batch
    step smollm2 $benchmark --models=smollm2 $batch
    cat "$out"/{llama_checkpointing,llama,minilm,smollm2}.log
}

for item in ${2:-1 2 3}; do
    SECONDS=0
    echo "| item $item | seconds | result |" >"$out/steps.md"
    echo "|---|---:|---|" >>"$out/steps.md"
    "item$item"
    echo
    cat "$out/steps.md"
done
