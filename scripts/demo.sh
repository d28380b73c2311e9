#!/usr/bin/env bash
# Renders a synthetic COCO-format set, trains a small SpineNet RetinaNet on it, evaluates it, draws
# its detections and exports it. About 15 minutes on 2 cores after the installation.
#   bash scripts/demo.sh [FOLDER]      by default runs/demo; a second run goes on where it was
set -euo pipefail
output="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/demo}")"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt

mkdir -p "$output"
if [ ! -f "$output/images/annotations/instances_val.json" ]; then
  echo "== Rendering images"
  python scripts/make_synthetic_coco.py --output="$output/images" --image_size=256 \
    --train_images=3000 --val_images=200
fi
for split in train val; do
  echo "== Converting $split to TFRecord"
  python scripts/make_coco_records.py --images="$output/images/$split" --num_shards=8 \
    --annotations="$output/images/annotations/instances_$split.json" --output="$output/records/$split"
done

spinenet() { # mode, more flags
  python -m spinenet_tf.main --mode="$1" --gin_file=gin_configs/demo.gin --model_dir="$output/model" \
    --gin_param="train/Data.pattern='$output/records/train-*'" \
    --gin_param="eval/Data.pattern='$output/records/val-*'" "${@:2}"
}
echo "== Training and evaluating"
spinenet train_and_eval
echo "== Drawing detections"
spinenet predict --images="$output/images/val/*00[0-9].jpg" --output="$output/pictures"
echo "== Exporting"
spinenet export --output="$output/saved_model"
python scripts/check_saved_model.py --saved_model="$output/saved_model" \
  --images="$output/images/val/*00[0-9].jpg" --results="$output/pictures/results.json"
echo
echo "Done. Everything is in $output:"
echo "  pictures/      detections drawn on validation images"
echo "  saved_model/   for TensorFlow Serving or tf.saved_model.load"
echo "  model/         checkpoints, metrics, TensorBoard summaries"
