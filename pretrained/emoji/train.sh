#!/usr/bin/env bash
# How the models in this folder were trained, from nothing:
#
#   bash pretrained/emoji/train.sh [--out FOLDER]
#
# Every stage continues after an interruption, and a finished one is not repeated. The README beside this file has the
# figures and the time it took. The weights in this folder are replaced at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=emoji
[ "${1:-}" = --out ] && out="${2:?--out needs a folder}"
here=pretrained/emoji

vq_steps=4200
class_steps=2600
text_steps=2000
tokenizer=(--vq-model VQ-8-S --codebook-size 512 --image-size 64)
training=(--optimizer muon --lr 2e-3 --lr-floor 0.02 --warmup-steps 50 --mixed-precision bf16 --num-workers 0
  --log-every 50 --val-every 300 --ckpt-every 300 --keep-last 1)
gpt=(--gpt-model GPT-S --vocab-size 512 --image-size 64 --downsample-size 8 --global-batch-size 32
  --lr-schedule cosine --ema --ema-decay 0.998)
text=(--cls-token-num 16 --caption-dim 384)

python3 dataset/openmoji.py --data-path "$out/data" --size 128

python3 tokenizer/tokenizer_image/vq_train.py "${tokenizer[@]}" "${training[@]}" --max-steps $vq_steps \
  --data-path "$out/data/train" --val-data-path "$out/data/val" --val-features none \
  --perceptual-weight 0 --disc-weight 0 --reconstruction-loss l1+l2 --gradient-weight 0.5 \
  --codebook-init kmeans --revive-every 50 --global-batch-size 16 --beta2 0.99 --lr-schedule wsd \
  --run-dir "$out/tokenizer"
vq="$out/tokenizer/checkpoints/$(printf %07d $vq_steps).pt"

for split in train val; do
  views=()
  [ $split = val ] || views=(--ten-crop)
  python3 autoregressive/train/extract_codes_c2i.py "${tokenizer[@]}" --vq-ckpt "$vq" --num-workers 0 \
    --data-path "$out/data/$split" --code-path "$out/codes-class/$split" "${views[@]}"
  python3 language/extract_t5_feature.py --text-encoder minilm --precision none --num-workers 0 \
    --data-path "$out/data/$split" --t5-path "$out/features"
  python3 autoregressive/train/extract_codes_t2i.py "${tokenizer[@]}" --vq-ckpt "$vq" --num-workers 0 \
    --data-path "$out/data/$split" --code-path "$out/codes-text/$split" "${views[@]}"
done

python3 autoregressive/train/train_c2i.py "${gpt[@]}" "${training[@]}" --max-steps $class_steps --num-classes 99 \
  --code-path "$out/codes-class/train" --val-code-path "$out/codes-class/val" --run-dir "$out/gpt-class"
python3 autoregressive/train/train_t2i.py "${gpt[@]}" "${training[@]}" --max-steps $text_steps "${text[@]}" \
  --dataset t2i_code --t5-feat-path "$out/features" \
  --code-path "$out/codes-text/train" --val-code-path "$out/codes-text/val" --run-dir "$out/gpt-text"

export_weights() { python3 tools/export_weights.py --precision fp16 --ckpt "$1" --output "$here/$2.safetensors"; }
export_weights "$vq" tokenizer
export_weights "$out/gpt-class/checkpoints/$(printf %07d $class_steps).pt" class
export_weights "$out/gpt-text/checkpoints/$(printf %07d $text_steps).pt" text
cp "$out/data/classes.json" "$here/classes.json"
