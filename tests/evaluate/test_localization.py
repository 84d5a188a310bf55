from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from wsis.data.dataset import open_dataset
from wsis.data.localization import read_metadata, read_voc_boxes
from wsis.errors import InputError
from wsis.evaluate.localization import (
    BoxTally,
    PixelTally,
    mask_truth,
    normalize_scores,
    resize_scores,
    scale_boxes,
)
from wsis.evaluate.localize import evaluate_scoremaps
from wsis.evaluate.localize_report import format_localization


def score_map(levels):
    return np.minimum(1, (levels + 0.25) / 255)


# ---- golden ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "suffix"), [(0.01, ""), (0.001, "_fine")])
def test_golden_box_accuracies(golden, golden_spec, step, suffix):
    z, params = golden("wsol_box_n24"), golden_spec("wsol_box_n24")["params"]
    tally = BoxTally(step)
    for n, levels in enumerate(z["map_u8"]):  # image by image, as they come
        boxes = z["gt_boxes_224"][z["gt_owner"] == n]
        tally.add(score_map(levels)[None], boxes, np.zeros(len(boxes), int))
    result = tally.scores()
    assert result["MaxBoxAccV2"] == params[f"MaxBoxAccV2_multi{suffix}"]
    for rule, name in (("single", "MaxBoxAcc"), ("multi", "MaxBoxAccV2")):
        rows = result[f"{name} by overlap"].values()
        assert [row["accuracy"] for row in rows] == params[f"MaxBoxAcc_{rule}{suffix}"]


def test_golden_scaling(golden, golden_spec, assert_golden):
    z, spec = golden("wsol_box_n24"), golden_spec("wsol_box_n24")
    scaled = scale_boxes(z["gt_boxes"].astype(float), z["image_size"][z["gt_owner"]])
    assert_golden(spec, "gt_boxes_224", scaled.astype(np.int32), z["gt_boxes_224"])
    maps = [normalize_scores(resize_scores(cam))[::9, ::9] for cam in z["cam_14"]]
    assert_golden(spec, "cam_224_sub", np.stack(maps).astype(np.float32), z["cam_224_sub"])


@pytest.mark.parametrize("step", [0.01, 0.001])
def test_golden_pixels(golden, golden_spec, assert_golden, step):
    z, spec = golden("wsol_pxap_n6"), golden_spec("wsol_pxap_n6")
    owners, tally = np.array(spec["params"]["mask_owner"]), PixelTally(step)
    for n in range(6):
        masks = [z[f"mask_{k}"] for k in np.nonzero(owners == n)[0]]
        truth = mask_truth(masks, z[f"ignore_{n}"])
        assert_golden(spec, "gt_224", truth, z["gt_224"][n])
        tally.add(score_map(z["map_u8"][n]), truth)
    assert tally.pxap() == pytest.approx(spec["params"][f"PxAP_step{step}"], rel=1e-9)
    if step == 0.01:
        assert_golden(spec, "hist_true", tally.positive.astype(np.int32), z["hist_true"])
        assert_golden(spec, "hist_false", tally.negative.astype(np.int32), z["hist_false"])


def test_scores_of_extremes():
    assert not normalize_scores(np.full((3, 3), 2.0)).any()
    assert not normalize_scores(np.array([[0, np.nan]])).any()
    assert PixelTally().pxap() is None
    with pytest.raises(InputError, match="no image"):
        BoxTally().scores()
    with pytest.raises(InputError, match="step"):
        BoxTally(step=0)
    with pytest.raises(InputError, match="one shape"):
        PixelTally().add(np.zeros((2, 2)), np.zeros((2, 3)))


# ---- stored score maps -------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """Two images, one with two boxes; maps that show exactly one box each."""
    metadata, maps = tmp_path / "metadata", tmp_path / "maps" / "val"
    metadata.mkdir()
    maps.mkdir(parents=True)
    (metadata / "image_ids.txt").write_text("val/a.jpg\nval/b.jpg\n")
    (metadata / "image_sizes.txt").write_text("val/a.jpg,448,224\nval/b.jpg,224,224\n")
    (metadata / "localization.txt").write_text(
        "val/a.jpg,20,10,200,100\nval/b.jpg,0,0,20,20\nval/b.jpg,100,100,150,180\n"
    )
    for name, (x0, y0, x1, y1) in {"a": (10, 10, 99, 99), "b": (100, 100, 149, 179)}.items():
        scores = np.zeros((224, 224))
        scores[y0 : y1 + 1, x0 : x1 + 1] = 0.8
        np.save(maps / f"{name}.jpg.npy", scores)
    return tmp_path


def test_stored_maps(stored):
    truth = read_metadata(stored / "metadata")
    result = evaluate_scoremaps(stored / "maps", truth, step=0.01)
    assert result["MaxBoxAccV2"] == result["MaxBoxAcc"] == result["GT-known"] == 100
    assert "2 images" in result["protocol"]["line"]
    assert "100.00" in format_localization({"score maps": result})
    moved = np.zeros((224, 224))
    moved[0, 0] = 1
    np.save(stored / "maps" / "val" / "b.jpg.npy", moved)
    assert evaluate_scoremaps(stored / "maps", truth, step=0.01)["MaxBoxAccV2"] == 50


def test_stored_masks(stored):
    metadata, masks = stored / "metadata", stored / "masks"
    masks.mkdir()
    (metadata / "localization.txt").write_text("val/a.jpg,a.png,\nval/b.jpg,b.png,ignore.png\n")
    for name in ("a", "b"):
        scores = np.load(stored / "maps" / "val" / f"{name}.jpg.npy")
        Image.fromarray((scores > 0).astype(np.uint8) * 255).save(masks / f"{name}.png")
    ignore = np.full((224, 224), 255, np.uint8)
    Image.fromarray(ignore).save(masks / "ignore.png")
    truth = read_metadata(metadata, masks)
    assert evaluate_scoremaps(stored / "maps", truth)["PxAP"] == 100
    with pytest.raises(InputError, match="mask_root"):
        read_metadata(metadata)
    (masks / "b.png").unlink()
    with pytest.raises(InputError, match=r"b\.png"):
        evaluate_scoremaps(stored / "maps", truth)


BAD_MAPS = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "size": (lambda path: np.save(path, np.zeros((14, 14))), r"\[14, 14\]"),
    "range": (lambda path: np.save(path, np.full((224, 224), 1.5)), "1.5"),
    "nan": (lambda path: np.save(path, np.full((224, 224), np.nan)), "nan"),
    "integers": (lambda path: np.save(path, np.zeros((224, 224), int)), "int64"),
    "pickle": (lambda path: np.save(path, np.array([{}], object)), "numpy.save"),
    "text": (lambda path: path.write_text("x"), "numpy.save"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_maps_are_named(stored, name):
    change, message = BAD_MAPS[name]
    change(stored / "maps" / "val" / "b.jpg.npy")
    with pytest.raises(InputError, match=message) as caught:
        evaluate_scoremaps(stored / "maps", read_metadata(stored / "metadata"))
    assert "b.jpg.npy" in str(caught.value)


BAD_METADATA = {
    "id": ("image_ids.txt", "../../x.jpg\n", "no path below"),
    "absolute": ("image_ids.txt", "/x.jpg\n", "no path below"),
    "twice": ("image_ids.txt", "val/a.jpg\nval/a.jpg\n", "twice"),
    "size": ("image_sizes.txt", "val/a.jpg,448,224\n", r"val/b\.jpg"),
    "size text": ("image_sizes.txt", "val/a.jpg,448,x\n", "numbers"),
    "box": ("localization.txt", "val/a.jpg,20,10,200,100\nval/a.jpg,20\n", "line 2"),
    "stranger": ("localization.txt", "val/z.jpg,20,10,200,100\n", "line 1"),
    "empty": ("localization.txt", "", "empty"),
}


@pytest.mark.parametrize("name", BAD_METADATA)
def test_bad_metadata_is_named(stored, name):
    file, text, message = BAD_METADATA[name]
    (stored / "metadata" / file).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_metadata(stored / "metadata")
    assert file in str(caught.value)


# ---- VOC's boxes -------------------------------------------------------------------------------


@pytest.fixture
def devkit(tmp_path):
    """Three images: one cow twice, a cow and a dog, a dog."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    things = {"a": ["cow", "cow"], "b": ["cow", "dog"], "c": ["dog"]}
    for name, kinds in things.items():
        Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        box = "<bndbox><xmin>3</xmin><ymin>2</ymin><xmax>20</xmax><ymax>10</ymax></bndbox>"
        objects = "".join(f"<object><name>{kind}</name>{box}</object>" for kind in kinds)
        xml = f"<annotation>{objects}</annotation>"
        (tmp_path / "Annotations" / f"{name}.xml").write_text(xml)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\nb\nc\n")
    return tmp_path


def test_voc_boxes_of_images_with_one_class(devkit):
    dataset = open_dataset("voc", devkit, "val")
    truth, classes = read_voc_boxes(dataset)
    assert truth.ids == ("a", "c")
    assert truth.sizes.tolist() == [[40, 30]] * 2
    assert truth.boxes.tolist() == [[2, 1, 19, 9]] * 3
    assert truth.owner.tolist() == [0, 0, 1]
    assert [dataset.classes[i] for i in classes] == ["cow", "dog"]


def test_flat_boxes_and_their_list(devkit):
    labels = {"classes": {"3": "cow", "7": "dog"}, "labels": {"a": [3], "b": [3, 7], "c": [7]}}
    (devkit / "labels.json").write_text(json.dumps(labels))
    boxes = {"a": [[1.5, 2, 20.25, 9, 3]], "b": [[0, 0, 4, 4, 7]], "c": [[0, 0, 4, 4, 7]]}
    (devkit / "boxes.json").write_text(json.dumps({"boxes": boxes}))
    (devkit / "ImageSets" / "WSOL").mkdir()
    (devkit / "ImageSets/WSOL/val.txt").write_text("a\nb\n")
    truth, classes = read_voc_boxes(open_dataset("voc", devkit, "val"))
    assert truth.ids == ("a", "b")
    assert truth.boxes.tolist() == [[1.5, 2, 20.25, 9], [0, 0, 4, 4]]
    assert classes.tolist() == [0, 1]
    (devkit / "boxes.json").write_text(json.dumps({"boxes": {"a": [[1, 2, 3]]}}))
    with pytest.raises(InputError, match="'a'"):
        read_voc_boxes(open_dataset("voc", devkit, "val"))
    (devkit / "ImageSets/WSOL/val.txt").write_text("z\n")
    with pytest.raises(InputError, match="'z'"):
        read_voc_boxes(open_dataset("voc", devkit, "val"))


def test_data_without_boxes_is_refused(devkit):
    with pytest.raises(InputError, match="VOC's layout"):
        read_voc_boxes(open_dataset("scenes", split="val", n_val=2))
    (devkit / "Annotations" / "c.xml").write_text("<annotation><object></object></annotation>")
    with pytest.raises(InputError, match=r"c\.xml"):
        read_voc_boxes(open_dataset("voc", devkit, "val", difficult=False))
