"""The protocols of this field by name: `--protocol NAME` of the commands.

A protocol fixes the list of images, the ground truth, the passes and how they become one, the CRF,
the background, whether image labels are given, and the mean IoU convention. What a repository does
that is not done here is said in `Named.differs`; nothing stands in for it. None gives image labels
to a network at test time (1-stage-wseg also reports masks made with them).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from wsis.config import PredictConfig
from wsis.errors import InputError
from wsis.evaluate.protocols import Protocol

LIST_LENGTHS = {
    ("voc", "train"): 1464,
    ("voc", "val"): 1449,
    ("coco", "val"): 40137,
    ("coco", "val_part"): 5000,
}
"""Images of the lists that everybody uses; of COCO those that have a label. ToCo's `val_part.txt`,
the first 5,000 of val by id, has 4,999 line ends: its last line has none."""

SWEPT = "0 to 0.59 in steps of 0.01"
"""The background scores of `wsis.evaluate.segmentation.THRESHOLDS`, in words."""


@dataclass(frozen=True)
class Named:
    """A protocol, where it comes from, and what is missing.

    Attributes:
        protocol: dataset, split, ground truth, inference and convention; the number of images is
            that of the official list.
        source: whose it is.
        differs: what the source does otherwise.
    """

    protocol: Protocol
    source: str
    differs: str = ""


def _voc(split: str = "val", **fixed: Any) -> Protocol:
    return _on("voc", split, "SegmentationClass", **fixed)


def _coco(split: str = "val", **fixed: Any) -> Protocol:
    return _on("coco", split, "instances_val2014.json", **fixed)


def _on(dataset: str, split: str, ground_truth: str, **fixed: Any) -> Protocol:
    placed = Protocol(
        dataset=dataset,
        split=split,
        images=LIST_LENGTHS[dataset, split],
        ground_truth=ground_truth,
    )
    return replace(placed, **fixed)


_LOGITS: dict[str, Any] = {"gate": False, "background_power": 1.0, "convention": "toco"}
_TOCO: dict[str, Any] = {"scales": (1.0, 1.5, 1.25), "fuse": "flip-sum-max", **_LOGITS}
_TOCO_COCO: dict[str, Any] = {"scales": (1.0, 1.25, 1.5), "fuse": "flip-max-sum", **_LOGITS}
_AFA: dict[str, Any] = {
    "scales": (1.0, 0.5, 0.75),
    "fuse": "flip-mean-max",
    "base_long": 512,
    **_LOGITS,
}
_ONE_STAGE: dict[str, Any] = {
    "scales": (1.0, 0.5, 1.5, 2.0),
    "fuse": "softmax-mean",
    "gate": False,
    "class_cut": 0.1,
    "background_power": 3.0,
    "convention": "pamr",
}
_SECOND_STAGE: dict[str, Any] = {
    "scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
    "fuse": "logits",
    **_LOGITS,
    "convention": "rtc",
}
_BILINEAR = "images are resized bilinearly there, bicubically here"
_COCO_MASKS = (
    "masks are painted from the annotations, crowds 255; theirs are coco2voc's, crowds as classes"
)


def _with_crf(named: dict[str, tuple[Named, str]]) -> dict[str, Named]:
    """Each protocol as it is, and with its CRF under the name plus ``-crf``."""
    pairs: dict[str, Named] = {}
    for name, (entry, crf) in named.items():
        pairs[name] = entry
        pairs[f"{name}-crf"] = replace(entry, protocol=replace(entry.protocol, crf=crf))
    return {
        name: replace(entry, protocol=replace(entry.protocol, name=name))
        for name, entry in pairs.items()
    }


NAMED = _with_crf(
    {
        "voc-rtc": (
            Named(_voc(convention="rtc"), "ChunyanWang1/RTC contrast_infer.py, eval.py"),
            "irn-label",
        ),
        "voc-1stage": (
            Named(
                _voc(**_ONE_STAGE),
                "visinf/1-stage-wseg infer_val.py, eval_seg.py",
                "pads every pass with zeros to 1024 x 1024 and rounds its size; its network's "
                "background logit is the constant 1; the epoch is the best on val",
            ),
            "psa",
        ),
        "voc-toco": (
            Named(_voc(**_TOCO), "rulixiang/ToCo tools/infer_seg_voc.py", _BILINEAR),
            "toco",
        ),
        "voc-afa": (
            Named(
                _voc(**_AFA),
                "rulixiang/afa scripts/test_msc_flip.py",
                f"sides of the resized image are truncated there, rounded here; {_BILINEAR}",
            ),
            "afa",
        ),
        "voc-deeplab": (
            Named(
                _voc(**_SECOND_STAGE),
                "the second stage of ChunyanWang1/RTC segmentation/",
                "its CRF makes one iteration, ours ten",
            ),
            "wseg-seg",
        ),
        "coco-rtc": (
            Named(
                _coco(convention="rtc"),
                "VOC's inference of ChunyanWang1/RTC; no code for COCO was released",
                "the paper's own COCO protocol is not known",
            ),
            "irn-label",
        ),
        "coco-toco": (
            Named(
                _coco(**_TOCO_COCO),
                "rulixiang/ToCo tools/infer_seg_coco_ddp.py",
                f"one version first resizes to 448 x 448; {_BILINEAR}; {_COCO_MASKS}",
            ),
            "toco",
        ),
        "coco-toco-part": (
            Named(
                _coco("val_part", **_TOCO_COCO),
                "rulixiang/ToCo tools/infer_seg_coco_ddp.py, the list of its training",
                f"the script stops after 1000 images of a process; {_BILINEAR}; {_COCO_MASKS}",
            ),
            "toco",
        ),
    }
)
"""Protocols of predicted masks by name."""

_CAM: dict[str, Any] = {
    "scales": (),
    "background": None,
    "image_labels": True,
    "subject": "CAM seeds",
}

CAM_NAMED = {
    "voc-seam": Named(
        _voc("train", **_CAM, background_choice=SWEPT, convention="rtc"),
        "YudeWang/SEAM, jiwoon-ahn/psa evaluation.py --curve True",
    ),
    "voc-irn": Named(
        _voc("train", **_CAM | {"background": 0.15}, convention="irn"),
        "jiwoon-ahn/irn step/eval_cam.py",
    ),
    "voc-toco-cam": Named(
        _voc("val", **_CAM | {"background": 0.5}, convention="toco"),
        "rulixiang/ToCo tools/infer_cam.py",
    ),
}
"""Protocols of stored CAMs (`wsis evaluate cam`) by name: the list, the background score or the
sweep over it, the convention. How the CAMs were made is their maker's."""

CAM_NAMED = {
    name: replace(entry, protocol=replace(entry.protocol, name=name))
    for name, entry in CAM_NAMED.items()
}


def get_protocol(name: str, *, cams: bool = False) -> Protocol:
    """The protocol of a name, of predicted masks or of CAMs; InputError suggests a near one."""
    known = CAM_NAMED if cams else NAMED
    if name in known:
        return known[name].protocol
    other = NAMED if cams else CAM_NAMED
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    if name in other:
        hint = f" for {'CAMs' if cams else 'masks'}; it goes with wsis evaluate" + (
            "" if cams else " cam"
        )
    raise InputError(f"unknown protocol '{name}'{hint}; wsis evaluate --list_protocols shows all")


def configure(predict: PredictConfig, name: str) -> Protocol:
    """Set the inference and the convention of a configuration to those of a protocol.

    Returns:
        The protocol, for what a configuration does not say: its data set and list.

    Raises:
        InputError: unknown protocol.
    """
    protocol = get_protocol(name)
    for field in fields(PredictConfig):
        setattr(predict, field.name, getattr(protocol, field.name))
    return protocol


def departures(protocol: Protocol) -> tuple[str, ...]:
    """In what a protocol differs from the one whose name it bears, in words.

    Of stored masks (no scales) only the data and the convention are known.

    Raises:
        InputError: there is no protocol of that name.
    """
    cams = protocol.name in CAM_NAMED
    official = get_protocol(protocol.name, cams=cams)
    words = {} if cams or not protocol.scales else _inference_words(protocol)
    changes = [
        text
        for field, text in words.items()
        if getattr(protocol, field) != getattr(official, field)
    ]
    changes = list(dict.fromkeys(changes))  # a constant background departs in two fields
    background = (protocol.background, protocol.background_choice)
    if cams and background != (official.background, official.background_choice):
        value = "" if protocol.background is None else f"{protocol.background:g}"
        changes.append(" ".join(f"background {value} {protocol.background_choice}".split()))
    if protocol.convention != official.convention:
        changes.append(f"convention {protocol.convention}")
    if (protocol.dataset, protocol.split) != (official.dataset, official.split):
        changes.append(f"list {protocol.dataset} {protocol.split}")
    elif protocol.images != official.images:
        changes.append(f"{protocol.images} images (its list has {official.images})")
    if protocol.ground_truth and not protocol.ground_truth.startswith(official.ground_truth):
        changes.append(f"ground truth {protocol.ground_truth}")
    return tuple(changes)


def _inference_words(protocol: Protocol) -> dict[str, str]:
    """Field -> what to say of its value where it departs."""
    cut = protocol.class_cut
    own = protocol.background_power
    background = f"background {protocol.background:g}"
    return {
        "scales": f"scales {' '.join(f'{scale:g}' for scale in protocol.scales)}",
        "flip": "flip" if protocol.flip else "no flip",
        "base_long": f"long side {protocol.base_long or 'as it is'}",
        "fuse": f"fuse {protocol.fuse}",
        "gate": f"class gate {'on' if protocol.gate else 'off'}",
        "class_cut": "all classes" if cut is None else f"classes above {cut:g}",
        "background": background,
        "background_power": background
        if own is None
        else f"the decoder's background to the {own:g}",
        "crf": f"CRF {protocol.crf}",
        "checkpoint": f"checkpoint {protocol.checkpoint}",
        "image_labels": f"image labels {'given' if protocol.image_labels else 'not given'}",
    }


def _background(protocol: Protocol) -> str:
    """The background in a word or two."""
    if protocol.background is None:
        return protocol.background_choice
    if protocol.background_power is not None:
        power = protocol.background_power
        return "own" if power == 1 else f"own^{power:g}"
    return f"{protocol.background:g}"


def table() -> str:
    """The protocols as aligned plain text, with what they fix and what is missing."""
    rows = [("name", "list", "scales", "fuse", "background", "CRF", "mIoU")]
    for name, entry in (NAMED | CAM_NAMED).items():
        p = entry.protocol
        side = f" of {p.base_long}" if p.base_long else ""
        scales = " ".join(f"{s:g}" for s in p.scales) + side + (" +flip" if p.flip else "")
        rows.append(
            (
                name,
                f"{p.dataset} {p.split} {p.images}",
                scales if p.scales else "stored CAMs",
                p.fuse + (", gate" if p.gate else "") if p.scales else "-",
                _background(p),
                p.crf if p.scales else "-",
                p.convention,
            )
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    notes = [
        f"{name}: {entry.source}" + (f"; not reproduced: {entry.differs}" if entry.differs else "")
        for name, entry in (NAMED | CAM_NAMED).items()
        if not name.endswith("-crf")
    ]
    rule = "All: last checkpoint, no image labels at test time (CAMs: labels given)."
    return "\n".join([*lines, "", rule, *notes])
