"""The rows of the paper's result tables: which recipe builds each, and what the paper prints.

Pure Python. `scripts/paper_tables.py` builds every row and sets its counts beside these.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One row of a table of arXiv 1912.05027.

    Attributes:
      table: '2', '3', ... or '5.6' for the figures in the text of that section.
      model: as printed; a dagger is an asterisk here.
      recipe: file below gin_configs, without '.gin'; '' where we do not build the model.
      parameters: millions, as printed; None where the table has none.
      multiply_adds: billions, as printed; None where the table has none.
      result: what the paper measured, as printed.
      note: why our counts differ, where they do.
    """

    table: str
    model: str
    recipe: str
    parameters: float | None
    multiply_adds: float | None
    result: str
    note: str = ""


OURS = "only the blocks per level are published; the connections are ours"
TEST = "test-dev AP {}"
VAL = "val2017 AP {}"
FIGURE = "connections read off Figure 4(b), no second source"

WIDTHS = "Model Garden's truncated widths; no one rounding gives the printed counts of both"
STYLE = "other papers' model, in its style: RetinaNet's subnets, our endpoint widths"

_TABLE_2 = [
    ("SpineNet-49S", "49S_640_b", 11.9, 33.8, "39.5"),
    ("SpineNet-49", "49_640_b", 28.5, 85.4, "42.8"),
    ("R50-FPN", "R50-FPN_640_b", 34.0, 96.8, "40.4"),
    ("R50-NAS-FPN", "R50-NAS-FPN_640_b", 60.3, 140.0, "42.4", "equals Model Garden's build"),
    ("SpineNet-49 @896", "49_896_b", 28.5, 167.4, "45.3"),
    ("SpineNet-96", "96_1024_b", 43.0, 265.4, "47.1"),
    ("R101-FPN", "R101-FPN_1024_b", 53.1, 325.9, "43.9"),
    ("SpineNet-143", "143_1280_b", 66.9, 524.4, "48.1"),
    ("R152-FPN", "R152-FPN_1280_b", 68.7, 630.5, "45.1"),
    ("R50-FPN*", "R50-FPN_640_c", 34.0, 96.8, "42.3"),
    ("SpineNet-49S*", "49S_640_c", 12.0, 33.8, "41.5", "12.0 counts the moving statistics too"),
    ("SpineNet-49*", "49_640_c", 28.5, 85.4, "44.3"),
    ("SpineNet-49* @896", "49_896_c", 28.5, 167.4, "46.7"),
    ("SpineNet-96*", "96_1024_c", 43.0, 265.4, "48.6"),
    ("SpineNet-143*", "143_1280_c", 66.9, 524.4, "50.7"),
    ("SpineNet-190*", "190_1280_c", 163.6, 1885.0, "52.1"),
]

_TABLE_3 = [
    ("R50-FPN", "R50-FPN_640_a", 96.8, "37.8"),
    ("R35-SP18", "R35-SP18_640_a", 91.7, "38.7", OURS),
    ("R23-SP30", "R23-SP30_640_a", 96.5, "39.7", FIGURE),
    ("R14-SP39", "R14-SP39_640_a", 99.7, "39.6", OURS),
    ("R0-SP53", "R0-SP53_640_a", 95.2, "40.7", "not explained; the graph is confirmed twice"),
    ("SpineNet-49", "49_640_a", 85.4, "40.8"),
]

_TABLE_5 = [
    ("SpineNet-49S", "49S_640_b", 13.9, 60.2, "39.3, mask 34.8", "0.4B of the regions not found"),
    ("SpineNet-49", "49_640_b", 40.8, 216.1, "42.9, mask 38.1"),
    ("R50-FPN", "R50-FPN_640_b", 46.3, 227.7, "42.7, mask 37.8"),
    ("SpineNet-96", "96_1024_b", 55.2, 315.0, "47.2, mask 41.5"),
    ("R101-FPN", "R101-FPN_1024_b", 65.3, 375.5, "46.6, mask 41.2"),
    ("SpineNet-143", "143_1280_b", 79.2, 498.8, "48.8, mask 42.7"),
    ("R152-FPN", "R152-FPN_1280_b", 80.9, 605.3, "48.1, mask 42.4"),
    ("SpineNet-190*", "190_1536_c", 176.2, 2076.8, "52.2, mask 46.1"),
]

# model, size, multiply-adds, then ImageNet and iNaturalist-2017: parameters, top-1 / top-5.
_TABLE_6 = [
    ("SpineNet-49", "49", 3.5, (22.1, "77.0 / 93.3"), (23.1, "59.3 / 81.9")),
    ("ResNet-34", "R34", 3.7, (21.8, "74.4 / 92.0"), (23.9, "54.1 / 76.7")),
    ("ResNet-50", "R50", 4.1, (25.6, "77.1 / 93.6"), (33.9, "54.6 / 77.2")),
    ("SpineNet-96", "96", 5.7, (36.5, "78.2 / 94.0"), (37.6, "61.7 / 83.4")),
    ("ResNet-101", "R101", 7.8, (44.6, "78.2 / 94.2"), (52.9, "57.0 / 79.3")),
    ("SpineNet-143", "143", 9.1, (60.5, "79.0 / 94.4"), (61.6, "63.6 / 84.8")),
    ("ResNet-152", "R152", 11.5, (60.2, "78.7 / 94.2"), (68.6, "58.4 / 80.2")),
]

_TABLE_7 = [("Hourglass", "hourglass_640_a", "38.3"), ("Fish", "fish_640_a", "37.5")]

_TABLE_8 = [
    ("Graph damage (1)", "damage_short_640_a", "35.8"),
    ("Graph damage (2)", "damage_long_640_a", "28.6"),
    ("Graph damage (3)", "damage_both_640_a", "28.2"),
]

_TABLE_9 = [
    ("SpineNet-49XS (MBConv)", "mobile-49XS_256", 0.82, 0.17, "17.5", WIDTHS),
    ("MobileNetV3-Small-SSDLite", "MobileNetV3-Small-SSDLite_320", 1.77, 0.16, "16.1", STYLE),
    ("SpineNet-49S (MBConv)", "mobile-49S_384", 0.97, 0.52, "24.3", WIDTHS),
    ("MobileNetV3-SSDLite", "MobileNetV3-SSDLite_320", 3.22, 0.51, "22.0", STYLE),
    ("MobileNetV2-SSDLite", "MobileNetV2-SSDLite_320", 4.30, 0.80, "22.1", STYLE),
    ("MnasNet-A1-SSDLite", "", 4.90, 0.80, "23.0", "not built: keras.applications has no MnasNet"),
    ("SpineNet-49 (MBConv)", "mobile-49_384", 2.32, 1.00, "28.6", "the official zoo says 2.34M"),
    ("MobileNetV2-NAS-FPNLite", "MobileNetV2-NAS-FPNLite_320", 2.62, 0.98, "25.7", STYLE),
    ("MobileNetV2-FPNLite", "MobileNetV2-FPNLite_320", 2.20, 1.01, "24.3", STYLE),
]

_TABLE_10 = [
    ("SpineNet-49", "49", 3.5, (22.1, "78.1 / 94.0"), (23.1, "63.3 / 85.1")),
    ("SpineNet-96", "96", 5.7, (36.5, "79.4 / 94.6"), (37.6, "64.7 / 85.9")),
    ("SpineNet-143", "143", 9.1, (60.5, "80.1 / 95.0"), (61.6, "66.7 / 87.1")),
    ("SpineNet-190", "190", 19.1, (127.1, "80.8 / 95.3"), (129.2, "67.6 / 87.4")),
]

_SECTION_5_6 = [
    ("SpineNet-49 (iNaturalist-bbox)", "49_inat_bbox", "63.9 / 86.9"),
    ("ResNet-50 (iNaturalist-bbox)", "R50_inat_bbox", "59.6 / 83.3"),
]


def _classification(table: str, rows: list, mark: str):
    for model, size, multiply_adds, *columns in rows:
        for data, (parameters, accuracy) in zip(("imagenet", "inat"), columns, strict=True):
            name = f"table{table}/{size}_{data}"
            result = f"top-1 / top-5 {accuracy}"
            yield Row(table, f"{model}{mark} {data}", name, parameters, multiply_adds, result)


def _detection(table: str, rows: list, result: str, counts: int):
    """Rows (model, recipe, `counts` figures, AP[, note]); with one count, multiply-adds."""
    for model, recipe, *rest in rows:
        figures, (ap, *note) = rest[:counts], rest[counts:]
        figures = [None] * (2 - counts) + figures
        path = recipe and f"table{table}/{recipe}"
        yield Row(table, model, path, *figures, result.format(ap), *note)


ROWS = [
    *_detection("2", _TABLE_2, TEST, 2),
    *_detection("3", _TABLE_3, VAL, 1),
    *_detection("5", _TABLE_5, VAL, 2),
    *_classification("6", _TABLE_6, ""),
    *_detection("7", _TABLE_7, VAL, 0),
    *_detection("8", _TABLE_8, VAL, 0),
    *_detection("9", _TABLE_9, TEST, 2),
    *_classification("10", _TABLE_10, "*"),
    *(
        Row("5.6", model, f"section5_6/{recipe}", None, None, f"top-1 / top-5 {accuracy}")
        for model, recipe, accuracy in _SECTION_5_6
    ),
]
