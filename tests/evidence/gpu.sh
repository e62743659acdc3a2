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

# killed LINES FOLDER COMMAND...: SIGKILL as soon as FOLDER/metrics.jsonl has so many lines.
killed() {
    local lines=$1 folder=$2
    shift 2
    rm -rf "$folder"
    "$@" &
    while kill -0 $! && [ "$(cat "$folder/metrics.jsonl" | wc -l)" -lt "$lines" ]; do sleep 0.1; done 2>/dev/null
    kill -KILL $!
    wait $!
    [ "$(wc -l <"$folder/metrics.jsonl")" -ge "$lines" ]
}
export -f killed

item1() {
    local run="$python train.py --device=$device" losses=50 lines=12 suite=tests arc=""
    if [ "$small" ]; then
        run="$run --max_steps=24 --eval_examples=50 --checkpoint_interval=5 --log_interval=2"
        losses=10 lines=4 suite=tests/test_evidence.py arc="--max_steps=2 --eval_examples=20"
    fi
    step pytest $python -m pytest -q $suite
    step sarcasm $run --out_dir="$out/sarcasm"
    step killed bash -c "killed $lines $out/resumed $run --out_dir=$out/resumed"
    step resumed $run --out_dir="$out/resumed" --resume=true
    run="$run --log_interval=1"
    step losses bash -c "killed $losses $out/losses $run --out_dir=$out/losses"
    step losses_cpu bash -c "killed $losses $out/losses_cpu $run --device=cpu --out_dir=$out/losses_cpu"
    run=${run% *}
    step arc_easy $run --task=arc_easy $arc --out_dir="$out/arc_easy"
    step sarcasm_compiled $run --compile=true --out_dir="$out/sarcasm_compiled"
    step arc_easy_compiled $run --task=arc_easy $arc --compile=true --out_dir="$out/arc_easy_compiled"
    $python - "$out" "$losses" <<'END'
import json, pathlib, sys
def lines(run):
    path = pathlib.Path(sys.argv[1], run, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
print("\n| run | result | killed and resumed |\n|---|---|---|")
for run in ("sarcasm", "resumed", "sarcasm_compiled", "arc_easy", "arc_easy_compiled"):
    end = lines(run)[-1:]
    result = f"{end[0]['metric']} {end[0]['value']:.4f}" if end and "final" in end[0] else "none"
    same = ("the same line" if end == lines("sarcasm")[-1:] else "ANOTHER LINE") if run == "resumed" else ""
    print(f"| {run} | {result} | {same} |")
pairs = [(a["step"], a["loss"], b["loss"]) for a, b in zip(lines("losses"), lines("losses_cpu"))][:int(sys.argv[2])]
print("\n| step | loss here | loss on a CPU in float32 |\n|---:|---:|---:|")
for step, here, cpu in pairs[:1] + pairs[4::5]:
    print(f"| {step} | {here:.4f} | {cpu:.4f} |")
print("largest difference:", max((abs(a - b) for _, a, b in pairs), default="no losses"))
END
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
