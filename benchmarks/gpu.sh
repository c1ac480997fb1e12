#!/usr/bin/env bash
# Llama-3.1-8B without 7 of its 32 layers, beside published numbers: the original model, the layers of
# lowest Block Influence removed, the others refitted, and the automatic choice refitted.
#
#     benchmarks/gpu.sh [OUT]
#
# The protocol is that of LinearPatch (NeurIPS 2025; its README and code): WikiText-2 calibrates,
# windows of 2048 tokens, perplexity on WikiText-2, C4 and PTB by their pieces (published.py), nine
# zero-shot tasks by lm-eval (they took version 0.4.4; acc_norm where a task has it). "Kept" is
# theirs: the mean of the tasks' ratios. PTB needs a copy of its validation split: PTB=ptb.valid.txt.
# Their tables say LLaMA-3-8B, their README links Llama-3.1-8B; MODEL=meta-llama/Meta-Llama-3-8B
# measures the other. They evaluate in float16, this in the file's bfloat16, and the number of
# windows to calibrate on is ours. OUT (gpu_results) takes texts, three models of 13 GB, 31 GB more
# while one is refitted, and results; interrupted, the same command continues. Needs
# `pip install -e ".[eval]"` and access to the model at the hub.
#
# NOT RUN HERE: no command was run on a GPU or on an 8B. A test runs all steps after the download of
# the texts on a tiny Llama. What follows is computed, with the arithmetic of docs/scaling.md: a
# window of 2048 tokens is 31 TFLOP, 0.5 s at an assumed 60 TFLOP/s, in float64 0.5; a GPU of 24 GB.
# auto fills it most: 16.1 GB of weights, 2 GB of states, 1.6 GB of logits in bfloat16 and float32.
#
#     rank, 128 windows in 1.009 passes each (results/scoring.json)          0.02 hours
#     refit of 25 layers: 128 windows in 2.43 passes (results/healing.json) and 16 judged three
#       times, 180 s; sums, 20 s; solving, 140 s; reading, 50 s               0.11
#     auto: 13 refits on 16 windows, 1,850 s of solving, 30 s of sums and
#       480 s of passes                                                       0.66, its refit 0.11
#     evaluation, five times: 141 + 256 windows, and nine tasks of some 8 million tokens (an
#       estimate, nobody counted them)                                        3
#     in all about 4 hours; AUTO=no leaves auto, its refit and two evaluations out: 2 hours
set -euo pipefail
MODEL=${MODEL:-meta-llama/Llama-3.1-8B}
N=${N:-7} SIZE=${SIZE:-2048} WINDOWS=${WINDOWS:-128} HELD=${HELD:-16} AUTO=${AUTO:-yes}
# names of lm-eval, or whole paths of YAML files
TASKS=${TASKS:-arc_challenge,arc_easy,boolq,hellaswag,piqa,winogrande,wsc273,race,copa}
WIKITEXT=${WIKITEXT:-} C4=${C4:-} PTB=${PTB:-}  # local copies; C4=none leaves it out
published=$(realpath -m "$(dirname "$0")/studies/published.py")
out=$(realpath -m "${1:-gpu_results}")
for name in MODEL WIKITEXT C4 PTB; do  # "none" and names at the hub stay
    [ ! -e "${!name}" ] || printf -v "$name" %s "$(realpath "${!name}")"
done
[ -z "$PTB" ] || realpath -e "$PTB" >/dev/null
mkdir -p "$out"
cd "$out"

# step NAME COMMAND...: unless NAME is there
step() {
    if [ -e "$1" ]; then
        echo "=== $1: there already"
        return
    fi
    echo "=== $1: ${*:2}"
    "${@:2}"
}

# The rows of WikiText-2 as two texts, joined as published perplexities join them.
texts() {
    python - <<'END'
from pathlib import Path
from short_gpt.data import texts
from short_gpt.evaluation.perplexity import WIKITEXT2
for split, name in (("train", "calibration"), ("validation", "held_out")):
    Path(f"{name}.txt").write_text("\n\n".join(texts(WIKITEXT2, split=split)), encoding="utf-8")
END
}

# evaluated NAME MODEL...: perplexities and tasks; of two models, the second's changes too
evaluated() {
    local tasks=() copy=()
    [ "$TASKS" = none ] || tasks=(--tasks "$TASKS")
    [ -z "$WIKITEXT" ] || copy=(--source "$WIKITEXT")
    step "wikitext-2-$1.json" short-gpt evaluate "${@:2}" --data wikitext-2 "${copy[@]}" \
        --size "$SIZE" "${tasks[@]}" --json "wikitext-2-$1.json"
    local models
    models=$(IFS=,; echo "${*:2}")
    [ -z "$PTB" ] || step "ptb-$1.json" python "$published" ptb "$models" --source "$PTB" \
        --size "$SIZE" --out "ptb-$1.json"
    [ "$C4" != none ] || return 0
    copy=()
    [ -z "$C4" ] || copy=(--source "$C4")
    step "c4-$1.json" python "$published" c4 "$models" "${copy[@]}" --size "$SIZE" \
        --out "c4-$1.json"
}

cut=(--data calibration.txt --size "$SIZE" --max_windows "$WINDOWS")
refit=(--heal_by refit --stream --eval_data held_out.txt --eval_windows "$HELD")

step held_out.txt texts
step influence.json short-gpt rank "$MODEL" "${cut[@]}" --stride "$SIZE" --n "$N" \
    --json influence.json
# its proof would open both models in float32, in 36 GB of memory; `prune` copies bytes
step pruned short-gpt prune "$MODEL" pruned --scores influence.json --n "$N" --verify no
step refitted short-gpt heal "$MODEL" refitted "${cut[@]}" "${refit[@]}" --scores influence.json \
    --n "$N" --json refitted.json
evaluated original "$MODEL"
evaluated refitted pruned refitted
if [ "$AUTO" = yes ]; then
    step auto.json short-gpt rank "$MODEL" "${cut[@]}" --stride "$SIZE" --n "$N" --method auto \
        --json auto.json
    step automatic short-gpt heal "$MODEL" automatic "${cut[@]}" "${refit[@]}" --scores auto.json \
        --n "$N" --json automatic.json
    evaluated automatic refitted automatic
fi

python - "$MODEL" <<'END'
import json, sys
from pathlib import Path

rows = {}
texts = ("wikitext-2", "c4", "ptb")
for path in [path for data in texts for path in sorted(Path().glob(f"{data}-*.json"))]:
    for name, own in json.loads(path.read_text())["result"].items():
        row = rows.setdefault("original" if name == sys.argv[1] else name, {})
        row.update({k: v for k, v in own.items() if "change" not in k and "stderr" not in k})
metrics = {name.split()[0] for name in rows["original"] if name.endswith((" acc", " acc_norm"))}
print(f"{'':<24}{'WikiText-2':>12}{'C4':>10}{'PTB':>10}{'tasks':>10}{'kept':>8}")
first = None
for name in ("original", "pruned", "refitted", "automatic"):
    if row := rows.get(name):
        cells = [next((v for k, v in row.items() if k.startswith(f"{data} perplexity")), None)
                 for data in texts]
        tasks = [row.get(f"{task} acc_norm", row.get(f"{task} acc")) for task in sorted(metrics)]
        first = first or tasks
        ratios = [own / before for own, before in zip(tasks, first)]
        cells += [100 * sum(own) / len(own) if own else None for own in (tasks, ratios)]
        shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        print(f"{name:<24}{shown[0]:>12}{shown[1]:>10}{shown[2]:>10}{shown[3]:>10}"
              f"{shown[4]:>8}")
print("""published, 7 of 32 layers of "LLaMA-3-8B" (linked: Llama-3.1-8B):
dense                          6.14      8.88      10.6     73.44  100.00
ShortGPT                      57.76     50.13      67.4     61.54   83.79
ShortGPT + LinearPatch        25.67     28.38      31.2     64.42   87.82
SLEB                          13.12     16.76      21.0     56.06   76.08""")
END
