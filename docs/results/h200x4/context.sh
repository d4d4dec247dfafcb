#!/usr/bin/env bash
# Rows of 1,048,576 tokens of samba-421m on 4 GPUs that share them, and before that the same training with 1, 2 and 4
# processes a row at a length that one GPU holds, to see that the losses are the same. About 10 minutes on 4 H200s.
#
#   docs/results/h200x4/context.sh OUT
#
# Writes OUT/{one,two,four,million}/metrics.jsonl and prints what they hold. To try the script itself on a CPU:
#   MODEL=samba-micro DEVICE=cpu DTYPE=float32 SHORT=512 LENGTH=4096 docs/results/h200x4/context.sh /tmp/context
set -euo pipefail
out=${1:?where to write}
model=${MODEL:-samba-421m} device=${DEVICE:-auto} dtype=${DTYPE:-bfloat16}
short=${SHORT:-65536} length=${LENGTH:-1048576} steps=${STEPS:-4}
mkdir -p "$out"

# Bytes of made-up words, in documents of up to 300,000 tokens: some begin within parts of rows, some reach over several.
python - "$out/text.jsonl" "$length" <<'PYTHON'
import json
import random
import sys

path, length = sys.argv[1], int(sys.argv[2])
draw, words, written = random.Random(0), ["one", "two", "three", "four", "five", "six", "seven", "eight"], 0
with open(path, "w") as file:
    while written < 5 * length:
        text = " ".join(draw.choices(words, k=draw.randint(100, max(200, length // 18))))
        written += len(text)
        file.write(json.dumps({"text": text}) + "\n")
PYTHON
rm -rf "$out/data" && samba-lm data prepare "$out/text.jsonl" --out "$out/data"

cat >"$out/recipe.toml" <<TOML
[model]
name = "$model"
vocab_size = 32000

[data]
train = "$out/data"
documents = true

[train]
steps = $steps
batch_size = 1
device = "$device"
dtype = "$dtype"
activation_checkpointing = "full"
log_every = 1
save_every = 0
TOML

run() { # NAME PROCESSES LENGTH
    rm -rf "${out:?}/$1"
    torchrun --standalone --nproc-per-node "$2" -m samba_lm train "$out/recipe.toml" \
        --parallel.context "$2" --train.length "$3" --train.out "$out/$1"
}

run one 1 "$short"
run two 2 "$short"
run four 4 "$short"
run million 4 "$length"

python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

print(f"\n{'run':8} {'step':>4} {'loss':>9} {'norm':>9} {'tokens/s':>12} {'GB a GPU':>9}")
for name in ("one", "two", "four", "million"):
    for line in (Path(sys.argv[1]) / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        memory = record.get("memory_peak", 0) / 1e9
        print(
            f"{name:8} {record['step']:4} {record['loss']:9.5f} {record['grad_norm']:9.5f} "
            f"{record['tokens_per_s']:12,.0f} {memory:9.1f}"
        )
PYTHON
