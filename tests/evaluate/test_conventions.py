from __future__ import annotations

import numpy as np
import pytest

from tests.reference import miou as described
from wsis.errors import InputError
from wsis.evaluate.conventions import CONVENTIONS, SegmentationScores, Tally, scores
from wsis.evaluate.segmentation import Curve


def nan_for_none(values) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])


def run(convention: str, predictions, truths, size: int, **options) -> SegmentationScores:
    tally = Tally(size, convention, **options)
    for p, t in zip(predictions, truths, strict=True):
        tally.add(p, t)
    return tally.scores()


def test_equals_rtc_and_afa(golden, golden_spec, assert_golden):
    data, spec = golden("seg_scores_n12_40x56"), golden_spec("seg_scores_n12_40x56")
    params = spec["params"]

    tally = Tally(21, "rtc")
    for p, t in zip(data["pred"], data["gt"], strict=True):
        tally.add(p, t)
    assert_golden(spec, "hist", tally.confusion[:, :21], data["hist"])
    assert_golden(spec, "rtc_iou", np.array(tally.scores().iou), data["rtc_iou"])
    assert tally.scores().miou == pytest.approx(params["rtc_mIoU"], rel=1e-12)

    cases = {"afa": ("pred", "toco"), "afa_pseudo": ("pred_255", "toco-pseudo")}
    for name, (array, convention) in cases.items():
        result = run(convention, data[array], data["gt"], 21)
        iou = nan_for_none(result.iou) / 100
        expected = data[f"{name}_iou"]
        np.testing.assert_array_equal(np.isnan(iou), np.isnan(expected))
        assert_golden(spec, f"{name}_iou", np.nan_to_num(iou), np.nan_to_num(expected))
        assert result.miou == pytest.approx(100 * params[name]["miou"], rel=1e-12)
        assert result.pixel_accuracy == pytest.approx(100 * params[name]["pAcc"], rel=1e-12)
        assert result.mean_accuracy == pytest.approx(100 * params[name]["mAcc"], rel=1e-12)


def test_curve_equals_rtcs(golden, golden_spec, assert_golden):
    data, spec = golden("seg_scores_n12_40x56"), golden_spec("seg_scores_n12_40x56")
    curve = Curve(21, spec["params"]["curve_thresholds"])
    for four, truth in zip(data["scores"], data["gt"], strict=True):
        maps = np.zeros((20, *truth.shape), np.float32)
        maps[[0, 1, 4, 6]] = four
        curve.add(maps, truth)
    result = curve.as_dict("rtc")
    assert_golden(spec, "curve", np.array(result["miou"]), data["curve"])
    assert result["best_threshold"] == 0.3
    assert "not a result" in result["note"]


def equals_its_description(convention: str, cases: int) -> tuple[int, int]:
    """Random cases against tests/reference/miou.py; how many were scored, how many refused."""
    rng, scored = np.random.default_rng(list(convention.encode())), 0
    tolerance = {"mmseg": {"atol": 1e-6, "rtol": 1e-7}, "torchmetrics": {"rtol": 3e-7}}
    for case in range(cases):
        predictions, truths, size = described.random_case(rng)
        try:
            iou, mean = described.ROWS[convention](predictions, truths, size)
        except described.Refused:
            with pytest.raises(InputError, match=r"predicted id|different ids"):
                run(convention, predictions, truths, size)
            continue
        result = run(convention, predictions, truths, size)
        scored += 1
        np.testing.assert_allclose(
            nan_for_none([*result.iou, result.miou]),
            100 * np.array([*iou, mean], np.float64),
            **{"atol": 0, "rtol": 1e-13} | tolerance.get(convention, {}),
            err_msg=f"case {case}",
        )
    return scored, cases - scored


def test_every_row_has_a_description():
    assert described.ROWS.keys() == CONVENTIONS.keys()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_equals_its_description(convention):
    scored, refused = equals_its_description(convention, 150)
    assert scored > 50
    assert (refused > 15) == (convention not in ("rtc", "mmseg"))


@pytest.mark.long
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_equals_its_description_2000_times(convention):
    scored, _ = equals_its_description(convention, 2000)
    assert scored > 800


def test_conventions_disagree_as_documented():
    # Class 1 is predicted but not in the truth, class 2 is in neither, class 3 is perfect.
    truth = np.array([[0, 0, 0, 3]], np.uint8)
    prediction = np.array([[0, 0, 1, 3]], np.uint8)
    two_thirds, mean = 200 / 3, {}
    for name in CONVENTIONS:
        mean[name] = run(name, [prediction], [truth], 4).miou
    assert mean["voc"] == mean["irn"] == pytest.approx((two_thirds + 0 + 100) / 3)
    assert mean["toco"] == pytest.approx((two_thirds + 100) / 2)
    assert mean["rtc"] == pytest.approx((two_thirds + 0 + 0 + 100) / 4)
    assert mean["pamr"] == pytest.approx((two_thirds + 0 + 0 + 100) / 4)
    assert mean["mmseg"] == 55.56
    assert mean["voc-devkit"] is None  # class 2 is nowhere
    assert mean["toco-pseudo"] == mean["toco"]
    assert mean["torchmetrics"] == pytest.approx(mean["voc"], rel=1e-7)


def test_out_of_range_predictions():
    truth = np.array([[0, 1, 1, 255]], np.uint8)
    undecided = np.array([[0, 1, 255, 0]], np.uint8)
    for name in ("voc", "voc-devkit", "pamr", "toco", "torchmetrics"):
        with pytest.raises(InputError, match="predicted id 255"):
            run(name, [undecided], [truth], 2)
    assert run("rtc", [undecided], [truth], 2).iou == pytest.approx((100, 50))
    assert run("mmseg", [undecided], [truth], 2).iou == (100, 50)
    assert run("irn", [undecided], [truth], 2).iou == (50, 50)
    with pytest.raises(InputError, match="predicted id 7"):
        run("irn", [np.array([[7, 1, 1, 0]])], [truth], 2)
    # VOC's kit looks at the whole file; the others only where there is ground truth.
    void = np.array([[0, 1, 1, 255]], np.uint8)
    assert run("pamr", [void], [truth], 2).miou == 100
    with pytest.raises(InputError, match="predicted id 255"):
        run("voc", [void], [truth], 2)


def test_undecided_pixels_of_pseudo_masks():
    truth = np.array([[0, 1, 1, 255]], np.uint8)
    pseudo = np.array([[0, 1, 255, 255]], np.uint8)
    for name in CONVENTIONS:
        wrong = run(name, [pseudo], [truth], 2, unsure="wrong")
        ignored = run(name, [pseudo], [truth], 2, unsure="ignored")
        assert wrong.iou == pytest.approx((100, 50)), name
        assert wrong.pixels == 3
        assert ignored.iou == pytest.approx((100, 100)), name
        assert ignored.pixels == 2


def test_bad_input():
    with pytest.raises(InputError, match="one size"):
        Tally(2).add(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"val7: ground truth must hold 0\.\.1 or 255, got 9"):
        Tally(2).add(np.zeros((1, 1)), np.full((1, 1), 9), "val7")
    with pytest.raises(InputError, match="unknown convention 'coco'; known: voc"):
        Tally(2, "coco")
    with pytest.raises(InputError, match="unsure"):
        Tally(2, unsure="maybe")
    with pytest.raises(InputError, match="confusion must be"):
        scores(np.zeros((2, 4)))


def test_nothing_labelled():
    result = run("voc", [np.zeros((2, 2), np.uint8)], [np.full((2, 2), 255, np.uint8)], 2)
    assert result.miou is None
    assert result.iou == (None, None)
    assert result.pixels == 0


def test_counts_past_32_bits():
    big = np.array([[2**33, 1], [1, 2**33]], np.int64)
    assert scores(big).iou[0] == pytest.approx(100 * 2**33 / (2**33 + 2), rel=1e-15)


def test_pseudo_scores_may_be_told_that_255_is_wrong():
    truth, mask = np.array([[0, 1]]), np.array([[0, 255]])
    assert run("toco-pseudo", [mask], [truth], 2).miou == 100
    assert run("toco-pseudo", [mask], [truth], 2, unsure="wrong").miou == 50
    assert run("toco", [mask], [truth], 2, unsure="ignored").miou == 100


def test_too_many_ids_for_torchmetrics():
    truth = np.array([[0, 255, 255, 255]], np.uint8)
    with pytest.raises(InputError, match="at most 3 different ids in an image, got 4"):
        run("torchmetrics", [np.array([[0, 1, 2, 3]])], [truth], 2)
    assert run("torchmetrics", [np.array([[0, 1, 2, 2]])], [truth], 2).pixels == 1


def test_torchmetrics_sums_in_single_precision():
    # 2^24 + 1 is no float32, so two counts that differ by one pixel give one ratio.
    one, other = (np.array([[2**24 + k, 2**24], [0, 1]], np.int64) for k in (0, 1))
    assert scores(one, "torchmetrics").iou[0] == scores(other, "torchmetrics").iou[0]
    assert scores(one).iou[0] != scores(other).iou[0]


def test_mmseg_sums_in_single_precision():
    # 2^24 + 1 is no float32: the pixel added last is lost, as it is there.
    tally = Tally(1, "mmseg")
    tally._total = np.full((3, 1), 2**24, np.float32)
    tally.add(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8))
    assert tally.scores().pixels == 2**24


def test_scores_survive_a_dictionary():
    result = scores(np.array([[3, 1], [0, 4]]), "toco")
    again = result.as_dict()
    assert SegmentationScores(**{**again, "iou": tuple(again["iou"])}) == result
