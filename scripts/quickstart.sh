#!/usr/bin/env bash
# From nothing to new pictures with one command, on a laptop without a GPU:
#
#   bash scripts/quickstart.sh                    about ten minutes of work after the installation
#   bash scripts/quickstart.sh --minutes 60       more training, better pictures
#   bash scripts/quickstart.sh --text             pictures of texts in place of classes, in ./quickstart-text
#   bash scripts/quickstart.sh --out FOLDER       somewhere else
#
# Renders the OpenMoji drawings, trains the tokenizer, extracts codes (and encodes the names), trains the GPT, draws
# pictures and writes report.html. Each finished stage is kept: after an interruption the same command continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

minutes=10
out=
text=
while [ $# -gt 0 ]; do
  case "$1" in
    --minutes) minutes="${2:?--minutes needs a number}"; shift 2 ;;
    --text) text=1; shift ;;
    --out) out="${2:?--out needs a folder}"; shift 2 ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "error: unknown flag $1; known are --minutes N, --text and --out FOLDER" >&2; exit 2 ;;
  esac
done
if ! [[ "$minutes" =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ && "$minutes" =~ [1-9] ]]; then
  echo "error: --minutes must be a number above 0, found $minutes" >&2
  exit 2
fi
out="${out:-quickstart${text:+-text}}"
kind=c2i
[ -z "$text" ] || kind=t2i

# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh requirements.txt
mkdir -p "$out"

# Prints a stage's command, runs it, and notes how long it took.
stage() {
  local name="$1" started=$SECONDS
  shift
  printf '\n== %s\n$ %s\n' "$name" "$*"
  "$@" || { local code=$?; echo "stage '$name' stopped (exit code $code); the same command continues" >&2; exit $code; }
  printf '%s\t%s\n' "$name" "$((SECONDS - started))" >>"$out/seconds.tsv"
}

# The settings of the two small models. docs/quickstart.md says why they are what they are.
tokenizer=(--vq-model VQ-4-S --codebook-size 256 --image-size 32)
vq_flags=("${tokenizer[@]}" --data-path "$out/data/train" --val-data-path "$out/data/val" --val-features none
  --perceptual-weight 0 --disc-weight 0 --reconstruction-loss l1+l2 --gradient-weight 0.5
  --codebook-init kmeans --revive-every 50 --global-batch-size 16
  --optimizer muon --lr 2e-3 --beta2 0.99 --lr-schedule wsd --lr-floor 0.02 --warmup-steps 50
  --mixed-precision none --num-workers 0)
gpt=(--image-size 32 --downsample-size 4)
condition=(--num-classes 99)
[ -z "$text" ] || condition=(--cls-token-num 16 --caption-dim 384)  # MiniLM's width; the longest name has 16 tokens
gpt_flags=("${gpt[@]}" "${condition[@]}" --vocab-size 256 --code-path "$out/codes/train" --val-code-path "$out/codes/val"
  --global-batch-size 32 --optimizer muon --lr 2e-3 --lr-schedule cosine --lr-floor 0.05 --warmup-steps 50
  --mixed-precision none --num-workers 0)
[ -z "$text" ] || gpt_flags+=(--dataset t2i_code --t5-feat-path "$out/features")
drawing=(--batch-size 128 --cfg-scale 2 --temperature 0.9 --top-k 100 --precision none)
shown=(face-smiling face-concerned cat-face heart country-flag animal-mammal food-fruit plant-flower
  transport-ground sky-and-weather clothing zodiac game geometric monkey-face music)
prompts=("grinning face" "red heart" "cat face" "flag: France" "melon" "teddy bear" "sun" "blue square" "sleeping face"
  "flag: Nepal" "green heart" "purple square" "blue apple" "red cat face" "crying pumpkin" "face with a flag")

stage "render the data" python3 dataset/openmoji.py --data-path "$out/data" --size 64
stage "plan" python3 tools/quickstart_plan.py --minutes "$minutes" --plan "$out/plan.json" \
  --vq-flags "${vq_flags[*]}" --gpt-flags "${gpt_flags[*]}" --gpt-models GPT-XS GPT-S
planned() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$out/plan.json" "$1"; }
vq_steps="$(planned vq_steps)"
gpt_steps="$(planned gpt_steps)"
gpt_model=(--gpt-model "$(planned gpt_model)")

stage "train the tokenizer" python3 tokenizer/tokenizer_image/vq_train.py "${vq_flags[@]}" --run-dir "$out/tokenizer" \
  --max-steps "$vq_steps" --log-every 50 --val-every 250 --ckpt-every 250 --keep-last 1
vq_ckpt="$out/tokenizer/checkpoints/$(printf %07d "$vq_steps").pt"

for split in train val; do
  if [ -n "$text" ]; then
    stage "encode the names ($split)" python3 language/extract_t5_feature.py --text-encoder minilm --precision none \
      --data-path "$out/data/$split" --t5-path "$out/features" --num-workers 0
  fi
  stage "extract the codes ($split)" python3 "autoregressive/train/extract_codes_$kind.py" "${tokenizer[@]}" \
    --vq-ckpt "$vq_ckpt" --data-path "$out/data/$split" --code-path "$out/codes/$split" --num-workers 0 \
    $([ "$split" = val ] || echo --ten-crop)
done

stage "train the GPT" python3 "autoregressive/train/train_$kind.py" "${gpt_flags[@]}" "${gpt_model[@]}" \
  --run-dir "$out/gpt" --max-steps "$gpt_steps" --log-every 50 --val-every 100 --ckpt-every 100 --keep-last 1
gpt_ckpt="$out/gpt/checkpoints/$(printf %07d "$gpt_steps").pt"
models=("${tokenizer[@]}" "${gpt[@]}" "${condition[@]}" "${gpt_model[@]}" --gpt-ckpt "$gpt_ckpt" --vq-ckpt "$vq_ckpt")

if [ -z "$text" ]; then
  stage "draw pictures" python3 autoregressive/sample/sample_c2i.py "${models[@]}" "${drawing[@]}" \
    --class-names "$out/data/classes.json" --class-labels "${shown[@]}" --images-per-class 8 --columns 8 \
    --output "$out/samples.png"
else
  shown=("${prompts[@]}")
  stage "draw pictures" python3 autoregressive/sample/sample_t2i.py "${models[@]}" "${drawing[@]}" \
    --text-encoder minilm --prompts "${prompts[@]}" --images-per-prompt 8 --columns 8 --output "$out/samples.png"
  awk 'NR % 5 == 1' "$out/data/train/train.jsonl" >"$out/names.jsonl"  # every fifth name that was trained on
  stage "draw names" python3 autoregressive/sample/sample_t2i_ddp.py "${models[@]}" "${drawing[@]:2}" \
    --text-encoder minilm --prompt-csv "$out/names.jsonl" --per-proc-batch-size 128 --sample-dir "$out/named"
  stage "compare with the drawings" python3 evaluations/t2i/retrieval.py "${tokenizer[@]}" --vq-ckpt "$vq_ckpt" \
    --samples "$(dirname "$out"/named/*/result.jsonl)" --data-path "$out/data/train" --output "$out/retrieval.json"
fi

stage "write the report" python3 tools/quickstart_report.py --folder "$out" --vq-ckpt "$vq_ckpt" ${text:+--text} \
  --rows "${shown[@]}"
