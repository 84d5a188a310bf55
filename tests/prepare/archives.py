"""Small archives of the official structures."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

VOC = "VOCdevkit/VOC2012"
CATS = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 90, "name": "brush"}]


def jpeg(name: str, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(sum(name.encode())).integers(0, 256, (*size[::-1], 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


def png(values: np.ndarray) -> bytes:
    picture = Image.fromarray(values.astype(np.uint8))
    picture.putpalette(list(range(256)) * 3)
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def half(value: int, size: tuple[int, int] = (40, 30)) -> np.ndarray:
    """A mask whose upper half is `value`."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[: size[1] // 2] = value
    return mask


def pack_tar(path: Path, files: dict[str, bytes]) -> Path:
    """`.tar` or `.tgz`, with folders as real archives have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for folder in sorted({str(Path(name).parent) for name in files}):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pack_zip(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        for name, data in files.items():
            package.writestr(name, data)
    return path


def annotation(*objects: str) -> bytes:
    things = "".join(f"<object><name>{name}</name></object>" for name in objects)
    return f"<annotation>{things}</annotation>".encode()


VOC_IMAGES = {
    "2007_000001": ("train", "dog", 12),
    "2007_000002": ("train", "cat", 8),
    "2007_000003": ("val", "cow", 10),
    "2008_000004": (None, "dog", None),
    "2008_000005": (None, "sheep", None),
}
"""Image -> list, label and mask value; those without a list are SBD's."""


def voc_files() -> dict[str, bytes]:
    files, lists = {}, {"train": [], "val": []}
    for name, (split, label, value) in VOC_IMAGES.items():
        files[f"{VOC}/JPEGImages/{name}.jpg"] = jpeg(name)
        files[f"{VOC}/Annotations/{name}.xml"] = annotation(label)
        if split is not None:
            lists[split].append(name)
            files[f"{VOC}/SegmentationClass/{name}.png"] = png(half(value))
            files[f"{VOC}/SegmentationObject/{name}.png"] = png(half(1))
    lists["trainval"] = sorted(lists["train"] + lists["val"])
    for split, names in lists.items():
        files[f"{VOC}/ImageSets/Segmentation/{split}.txt"] = ("\n".join(names) + "\n").encode()
    files[f"{VOC}/ImageSets/Main/dog_train.txt"] = b"2007_000001  1\n"
    return files


def voc_archives(folder: Path, *, test: bool = True) -> Path:
    pack_tar(folder / "VOCtrainval_11-May-2012.tar", voc_files())
    if test:
        names = ["2012_000010", "2012_000011"]
        files = {f"{VOC}/JPEGImages/{name}.jpg": jpeg(name) for name in names}
        files[f"{VOC}/ImageSets/Segmentation/test.txt"] = "\n".join(names).encode()
        pack_tar(folder / "VOC2012test.tar", files)
    return folder


def mat(mask: np.ndarray) -> bytes:
    """A file of SBD's `cls`: the struct GTcls, compressed as SBD's are."""
    from scipy.io import savemat

    content = {"Boundaries": np.zeros((20, 1)), "Segmentation": mask, "CategoriesPresent": [1]}
    data = io.BytesIO()
    savemat(data, {"GTcls": content}, do_compression=True)
    return data.getvalue()


SBD_MASKS = {"2007_000001": 1, "2007_000003": 1, "2008_000004": 12, "2008_000005": 17}


def sbd_files() -> dict[str, bytes]:
    base, names = "benchmark_RELEASE/dataset", sorted(SBD_MASKS)
    files = {f"{base}/cls/{name}.mat": mat(half(value)) for name, value in SBD_MASKS.items()}
    files |= {f"{base}/img/{name}.jpg": jpeg(name) for name in names}
    files[f"{base}/train.txt"] = "\n".join(names[:3]).encode()
    files[f"{base}/val.txt"] = "\n".join(names[3:]).encode()
    return files


def polygon(x0: int, y0: int, x1: int, y1: int) -> list[list[float]]:
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def coco_instances(split: str, count: int) -> dict:
    """`count` images of 40 x 30; the last has no annotation, the first also a crowd."""
    images, annotations = [], []
    for n in range(count):
        file = f"COCO_{split}2014_{n:012d}.jpg"
        images.append({"id": n, "file_name": file, "width": 40, "height": 30})
        if n < count - 1:
            kind = CATS[n % len(CATS)]["id"]
            annotations.append(
                {"id": n, "image_id": n, "category_id": kind, "iscrowd": 0, "area": 100.0,
                 "segmentation": polygon(5, 5, 15, 15)}
            )  # fmt: skip
    crowd = {"size": [30, 40], "counts": [600, 600]}
    annotations.append(
        {"id": 99, "image_id": 0, "category_id": 3, "iscrowd": 1, "area": 600,
         "segmentation": crowd}
    )  # fmt: skip
    return {"info": {}, "images": images, "annotations": annotations, "categories": CATS[::-1]}


def coco_archives(folder: Path) -> Path:
    files = {}
    for split, count in (("train", 5), ("val", 4)):
        content = coco_instances(split, count)
        files[f"annotations/instances_{split}2014.json"] = json.dumps(content).encode()
        files[f"annotations/captions_{split}2014.json"] = b"{}"
        pack_zip(
            folder / f"{split}2014.zip",
            {f"{split}2014/{i['file_name']}": jpeg(i["file_name"]) for i in content["images"]},
        )
    pack_zip(folder / "annotations_trainval2014.zip", files)
    return folder


CUB_ROWS = [
    ("001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg", 1, 0, (60, 27, 325, 304)),
    ("001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg", 1, 1, (139, 30, 153, 264)),
    ("002.Laysan_Albatross/Laysan_Albatross_0002_1027.jpg", 2, 0, (20, 10, 30.5, 40)),
    ("002.Laysan_Albatross/Laysan_Albatross_0003_1033.jpg", 2, 1, (202, 28, 164, 340)),
]


def cub_archive(folder: Path) -> Path:
    base = "CUB_200_2011"
    numbered = list(enumerate(CUB_ROWS, 1))

    def table(rows) -> bytes:
        return "".join(f"{' '.join(map(str, row))}\n" for row in rows).encode()

    files = {
        "attributes.txt": b"1 has_bill_shape::curved\n",
        f"{base}/images.txt": table((n, row[0]) for n, row in numbered),
        f"{base}/image_class_labels.txt": table((n, row[1]) for n, row in numbered),
        f"{base}/train_test_split.txt": table((n, row[2]) for n, row in numbered),
        f"{base}/bounding_boxes.txt": table((n, *map(float, row[3])) for n, row in numbered),
        f"{base}/classes.txt": b"1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n",
        f"{base}/parts/parts.txt": b"1 back\n",
    }
    for n, row in numbered:
        files[f"{base}/images/{row[0]}"] = jpeg(row[0], (50 + n, 40))
    pack_tar(folder / "CUB_200_2011.tgz", files)
    return folder
