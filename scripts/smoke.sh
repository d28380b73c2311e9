#!/usr/bin/env bash
# Does a task learn? Renders a synthetic set, trains the task's smoke recipe on it from scratch,
# evaluates, draws predictions and exports. 20 to 50 minutes on 2 cores. (Boxes: scripts/demo.sh.)
#   bash scripts/smoke.sh masks|classes [FOLDER]     by default runs/smoke_<task>
set -euo pipefail
case "${1:-}" in
  masks | classes) task="$1" ;;
  *) sed -n 2,4p "$0" >&2; exit 2 ;;
esac
output="$(realpath -m "${2:-$(dirname "${BASH_SOURCE[0]}")/../runs/smoke_$task}")"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt

mkdir -p "$output"
if [ "$task" = masks ]; then
  render="python scripts/make_synthetic_coco.py --image_size=256 --train_images=3000 --val_images=200"
  convert() {
    python scripts/make_coco_records.py --images="$output/images/$1" --num_shards=8 \
      --annotations="$output/images/annotations/instances_$1.json" --output="$output/records/$1"
  }
else
  render="python scripts/make_synthetic_classes.py --train_images=3000 --val_images=500"
  convert() {
    python scripts/make_classification_records.py --images="$output/images" --workers=1 \
      --annotations="$output/images/$1.json" --output="$output/records/$1" --num_shards=4
  }
fi
[ -d "$output/images/val" ] || $render --output="$output/images"
for split in train val; do convert "$split"; done

spinenet() { # mode, more flags
  python -m spinenet_tf.main --mode="$1" --gin_file="gin_configs/smoke/$task.gin" \
    --model_dir="$output/model" --gin_param="train/Data.pattern='$output/records/train-*'" \
    --gin_param="eval/Data.pattern='$output/records/val-*'" "${@:2}"
}
spinenet train_and_eval
spinenet predict --images="$output/images/val/*[0-9]0[0-9].jpg" --output="$output/pictures"
spinenet export --output="$output/saved_model"
python scripts/check_saved_model.py --saved_model="$output/saved_model" \
  --images="$output/images/val/*[0-9]0[0-9].jpg" --results="$output/pictures/results.json"
