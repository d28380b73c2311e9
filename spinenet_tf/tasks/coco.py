"""COCO average precision: collects detections and lets pycocotools judge."""

import contextlib
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spinenet_tf.ops.masks import paste_mask
from spinenet_tf.ops.nms import Detections

# The order in which COCO (and the paper's Table 2) reports.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(ground_truth: dict, results: list[dict], kind: str = "bbox") -> dict[str, float]:
    """The 12 COCO figures.

    Args:
      ground_truth: a COCO instances data set.
      results: COCO results, [{'image_id', 'category_id', 'bbox' (xywh pixels), 'score'}].
      kind: 'bbox' or 'segm'.

    Returns:
      {name: value} over `NAMES`, in 0..1; -1 where there is nothing to measure.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        found = _load(truth, results)
        judge = COCOeval(truth, found, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return dict(zip(NAMES, map(float, judge.stats), strict=True))


def _load(truth: COCO, results: list[dict]) -> COCO:
    if results:
        return truth.loadRes([dict(r) for r in results])  # it adds keys to them
    found = COCO()  # pycocotools cannot load an empty list
    found.dataset = {k: truth.dataset[k] for k in ("images", "categories")} | {"annotations": []}
    found.createIndex()
    return found


def coco_boxes(found: Detections, image_id: int, category_ids: dict[int, int]) -> list[dict]:
    """COCO results of one image's detections (arrays without the batch axis).

    Args:
      category_ids: {label: category id}; a label that is not there is its own category id.
    """
    boxes = np.asarray(found.boxes)[: found.count].astype(float)
    xywh = np.concatenate([boxes[:, 1::-1], (boxes[:, 2:] - boxes[:, :2])[:, ::-1]], 1)
    return [
        {
            "image_id": image_id,
            "category_id": category_ids.get(int(label), int(label)),
            "bbox": [round(v, 3) for v in box.tolist()],
            "score": float(score),
        }
        for box, score, label in zip(xywh, found.scores, found.classes, strict=False)
    ]


class CocoMetric:
    """Collects batches and their detections; `result` gives the 12 figures.

    The ground truth is the batches' own labels, or a COCO instances file.
    """

    def __init__(self, categories: list[dict] = (), annotations: str = ""):
        """
        Args:
          categories: [{'id', 'label', 'name'}]; where empty, a label is its category id.
          annotations: path of a COCO instances JSON; '' for the batches' labels.
        """
        self._category_ids = {c["label"]: c["id"] for c in categories}
        if annotations and not tf.io.gfile.exists(annotations):
            raise FileNotFoundError(f"Data.annotations={annotations!r}: no such file")
        self._annotations = annotations
        self._images: dict[int, dict] = {}
        self._truth: list[dict] = []
        self.results: list[dict] = []

    def update(self, batch: dict, detections: Any) -> None:
        """Adds a batch (arrays; see `data.pipeline`) and its `Detections`; skips rows of id -1."""
        batch = {k: np.asarray(v) for k, v in batch.items() if k not in ("image", "draws")}
        found = [np.asarray(part) for part in detections]
        for i in np.flatnonzero(batch["id"] >= 0):
            image_id = int(batch["id"][i])
            if image_id in self._images:
                raise ValueError(f"image id {image_id} comes twice in the evaluation data")
            height, width = map(int, batch["source_size"][i])
            self._images[image_id] = {"id": image_id, "height": height, "width": width}
            self._add_truth(image_id, {k: v[i] for k, v in batch.items()})
            self._add_found(image_id, [part[i] for part in found])

    def result(self) -> dict[str, float]:
        """The figures over all batches seen.

        Raises:
          ValueError: the annotations file lacks an image that was evaluated.
        """
        return evaluate(self._ground_truth(), self.results)

    def write(self, path: str) -> None:
        """Writes the results as COCO's test-dev server takes them."""
        with tf.io.gfile.GFile(path, "w") as file:
            json.dump(self.results, file)

    def _add_found(self, image_id: int, found: list) -> None:
        self.results += coco_boxes(Detections(*found), image_id, self._category_ids)

    def _add_truth(self, image_id: int, row: dict) -> None:
        scale = np.tile(row["source_size"] / row["image_size"], 2)
        for k in np.flatnonzero(row["classes"] > 0):
            ymin, xmin, ymax, xmax = (row["boxes"][k].astype(float) * scale).tolist()
            self._truth.append(
                {
                    "id": len(self._truth) + 1,
                    "image_id": image_id,
                    "category_id": self._category(int(row["classes"][k])),
                    "bbox": [xmin, ymin, xmax - xmin, ymax - ymin],
                    "area": float(row["area"][k]),
                    "iscrowd": int(row["crowd"][k]),
                }
            )

    def _category(self, label: int) -> int:
        return self._category_ids.get(label, label)

    def _ground_truth(self) -> dict:
        if self._annotations:
            with tf.io.gfile.GFile(self._annotations) as file:
                truth = json.load(file)
            missing = set(self._images) - {image["id"] for image in truth["images"]}
            if missing:
                raise ValueError(f"{self._annotations} has no image {sorted(missing)[:5]}")
            if len(self._images) < len(truth["images"]):
                print(
                    f"{len(self._images)} of the {len(truth['images'])} images of "
                    f"{self._annotations} were evaluated: all objects of the others count as missed"
                )
            return truth
        ids = {a["category_id"] for a in self._truth} | set(self._category_ids.values())
        return {
            "images": list(self._images.values()),
            "annotations": self._truth,
            "categories": [{"id": i, "name": str(i)} for i in sorted(ids)],
        }


class MaskMetric(CocoMetric):
    """As `CocoMetric`, and the 12 figures of masks, whose names start with `mask_`."""

    def __init__(
        self, categories: list[dict] = (), annotations: str = "", truth: Callable[[], dict] = dict
    ):
        """
        Args:
          categories, annotations: see `CocoMetric`.
          truth: returns a COCO instances data set with masks; asked where `annotations` is ''.
        """
        super().__init__(categories, annotations)
        self._masks_truth = truth
        self.mask_results: list[dict] = []

    def result(self) -> dict[str, float]:
        """Box and mask figures over all batches seen."""
        truth = self._ground_truth() if self._annotations else self._masks_truth()
        masks = evaluate(truth, self.mask_results, "segm")
        return evaluate(truth, self.results) | {f"mask_{k}": v for k, v in masks.items()}

    def write(self, path: str) -> None:
        """Writes the box results, and the mask results beside them as `*_segm.json`."""
        super().write(path)
        with tf.io.gfile.GFile(f"{path.removesuffix('.json')}_segm.json", "w") as file:
            json.dump(self.mask_results, file)

    def _add_found(self, image_id: int, found: list) -> None:
        *found, masks = found
        super()._add_found(image_id, found)
        size = (self._images[image_id][side] for side in ("height", "width"))
        self.mask_results += coco_masks(
            Detections(*found), masks, *size, image_id, self._category_ids
        )


def coco_masks(
    found: Detections, masks, height: int, width: int, image_id: int, category_ids: dict[int, int]
) -> list[dict]:
    """COCO results with run lengths instead of boxes; see `coco_boxes`.

    Args:
      masks: [k, m, m] probabilities in the frames of the found boxes.
    """
    results = coco_boxes(found, image_id, category_ids)
    for result, mask, box in zip(results, masks, found.boxes, strict=False):
        del result["bbox"]
        pasted = np.asfortranarray(paste_mask(mask, box, height, width))
        rle = coco_mask.encode(pasted)
        result["segmentation"] = {"size": [height, width], "counts": rle["counts"].decode()}
    return results
