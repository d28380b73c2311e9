#!/usr/bin/env bash
# The real-data checks of gin_configs/checks/overfit_*.gin: learns 16 COCO images by heart.
#   bash scripts/overfit_coco.sh boxes|masks COCO_FOLDER [OUTPUT]
# COCO_FOLDER holds train2017/ and annotations/instances_train2017.json.
set -euo pipefail
case "${1:-}" in
  boxes) task=Detection ;;
  masks) task=InstanceSegmentation ;;
  *) sed -n 2,4p "$0" >&2; exit 2 ;;
esac
[ $# -ge 2 ] || { sed -n 2,4p "$0" >&2; exit 2; }
recipe="gin_configs/checks/overfit_$1.gin"
coco="$(realpath "$2")"
output="$(realpath -m "${3:-$(dirname "${BASH_SOURCE[0]}")/../runs/overfit_$1}")"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt
[ -f "$coco/annotations/instances_train2017.json" ] \
  || fail "$coco/annotations/instances_train2017.json is missing"

mkdir -p "$output"
python scripts/coco_subset.py --annotations="$coco/annotations/instances_train2017.json" --images=16 \
  --output="$output/instances.json"
python scripts/make_coco_records.py --images="$coco/train2017" --annotations="$output/instances.json" \
  --output="$output/records/train" --num_shards=1 --contiguous_labels
classes="$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['num_classes'])" \
  "$output/records/train.json")"
python -m spinenet_tf.main --mode=train_and_eval --gin_file="$recipe" \
  --model_dir="$output/model" --gin_param="$task.num_classes=$classes" \
  --gin_param="Data.pattern='$output/records/train-*'" \
  --gin_param="eval/Data.annotations='$output/instances.json'"
