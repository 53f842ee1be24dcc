#!/usr/bin/env bash
# From nothing to a comparison of orders, on a CPU, with no network but the package index: about 5 minutes on 2 cores,
# after set-up.
# Everything lands in runs/demo. Stop it at any time and start it again: it continues where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
at=runs/demo
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1/6  The corpus: the source of this Python's standard library, and a tokenizer trained on it"
[ -d $at/shards ] || python -m data.sample --out $at/shards --tokens 800000

say "2/6  A small reference model, trained on a part of the corpus that is neither scored nor trained on afterwards"
reference_shards="$at/shards/stdlib_reference_*.bin"
if [ ! -f $at/orders/reference.npy ]; then
  python -m curriculum.score "$reference_shards" --reference none --out $at/reference-scores --max-len 256 > /dev/null
  python -m curriculum.order --scores $at/reference-scores --measure length --out $at/orders/reference.npy
fi
python train_gpt.py configs/demo.toml --run.name reference --run.out_dir $at/reference \
  --data.shards "$reference_shards" --data.order $at/orders/reference.npy

say "3/6  Score every segment of the training and validation shards with it"
python -m curriculum.score $at/shards --reference $at/reference --out $at/scores --max-len 256 --unit-tokens 100000

say "4/6  Three orders of the same 196,608 tokens, two seeds each"
make_order() {  # name, schedule, seed
  local file=$at/orders/$1-$3.npy
  [ -f "$file" ] || python -m curriculum.order --scores $at/scores --measure entropy --schedule "$2" --bins 16 \
    --tokens 196608 --seed "$3" --out "$file"
}
for seed in 0 1; do
  make_order random random $seed
  make_order increasing increasing $seed
  make_order warmup 'warmup_then_random(0.2)' $seed
done
python -m scripts.preview $at/orders/warmup-0.npy

say "5/6  Train a small GPT on each"
for seed in 0 1; do
  for arm in random increasing warmup; do
    python train_gpt.py configs/demo.toml --run.name $arm --run.seed $seed --run.out_dir $at/$arm/seed$seed \
      --data.order $at/orders/$arm-$seed.npy
  done
done

say "6/6  Compare"
python -m scripts.leaderboard $at/random $at/increasing $at/warmup --baseline random --out $at/report.html
