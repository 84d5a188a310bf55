"""Image files of many kinds, each with the outcome it must have in every loader."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from wsis.data import open_dataset


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with edges and grain."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 5, 3), np.uint8)
    large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    bright = large.astype(np.int16) + rng.integers(-9, 10, large.shape)
    bright[height // 3 : height // 2, width // 4 : width // 2] = 255
    bright[height // 2 :, : width // 5] = 0
    return Image.fromarray(bright.clip(0, 255).astype(np.uint8))


def write_folder(root: Path, files: dict[str, Image.Image | bytes], **options):
    """A data set of images by file name, all labelled alike; its masks are noise."""
    (root / "masks").mkdir(parents=True)
    for k, (name, image) in enumerate(files.items()):
        if isinstance(image, bytes):
            (root / name).write_bytes(image)
            continue
        image.save(root / name, **options)
        noise = np.random.default_rng(k).integers(0, 2, image.size[::-1]).astype(np.uint8)
        Image.fromarray(noise).save(root / "masks" / f"{name.rsplit('.', 1)[0]}.png")
    rows = "".join(f"{name},cat\n" for name in files)
    (root / "train.csv").write_text(f"image,labels\n{rows}")
    return open_dataset("folder", root)


def as_bytes(image: Image.Image, kind: str, **options) -> bytes:
    """The file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_files() -> dict[str, bytes]:
    """Images that Pillow reads, some of which DALI would not, or in another way."""
    image = photo(70, 50, seed=9)
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = image.copy()
    alpha.putalpha(Image.new("L", image.size, 90))
    jpg, png = as_bytes(image, "JPEG"), as_bytes(image, "PNG")
    return {
        "cmyk.jpg": as_bytes(image.convert("CMYK"), "JPEG"),
        "exif.jpg": as_bytes(image, "JPEG", exif=turned),
        "progressive.jpg": as_bytes(image, "JPEG", progressive=True),
        "full.jpg": as_bytes(image, "JPEG", subsampling=0, quality=95),
        "wide_chroma.jpg": as_bytes(image, "JPEG", subsampling=1),
        "coarse.jpg": as_bytes(image, "JPEG", quality=1),
        "restarts.jpg": as_bytes(image, "JPEG", restart_marker_blocks=2),
        "trailing.jpg": jpg + b"and more" * 100,
        "comment.jpg": as_bytes(image, "JPEG", comment=b"c" * 60_000),
        "profile.jpg": as_bytes(image, "JPEG", icc_profile=bytes(range(256)) * 20),
        "gif.jpg": as_bytes(image, "GIF"),
        "gif2.gif": as_bytes(image, "GIF"),
        "moving.gif": as_bytes(image, "GIF", save_all=True, append_images=[photo(70, 50, seed=2)]),
        "palette.png": as_bytes(image.quantize(20), "PNG"),
        "clear.png": as_bytes(image.quantize(20), "PNG", transparency=3),
        "keyed.png": as_bytes(image, "PNG", transparency=(255, 255, 255)),
        "rgba.png": as_bytes(alpha, "PNG"),
        "la.png": as_bytes(alpha.convert("LA"), "PNG"),
        "one.png": as_bytes(image.convert("1"), "PNG"),
        "few.png": as_bytes(image.convert("L").quantize(3), "PNG", bits=2),
        "followed.png": png + bytes(5000),
        "png.jpg": png,
        "jpg.png": jpg,
        "bmp.bmp": as_bytes(image, "BMP"),
        "bmp2.jpg": as_bytes(image, "BMP"),
        "webp.jpg": as_bytes(image, "WEBP", lossless=True),
        "tiff.jpg": as_bytes(image, "TIFF"),
        "packed.tiff": as_bytes(image, "TIFF", compression="tiff_lzw"),
        "ppm.ppm": as_bytes(image, "PPM"),
        "thin.jpg": as_bytes(image.resize((1, 900)), "JPEG"),
        "dot.jpg": as_bytes(image.resize((1, 1)), "JPEG"),
    }


def bad_files() -> dict[str, bytes]:
    """Files that no loader can use."""
    image = photo(90, 70)
    jpg, png, gif, bmp, webp, tiff = (
        as_bytes(image, kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
    )
    progressive = as_bytes(image, "JPEG", progressive=True)
    data, scan = png.index(b"IDAT") + 4, jpg.index(b"\xff\xda")
    numbers = np.arange(600).reshape(20, 30)
    return {
        "truncated.jpg": jpg[: len(jpg) // 2],
        "header.jpg": jpg[:20],
        "no_scan.jpg": jpg[:scan],
        "no_tables.jpg": jpg[:2] + jpg[jpg.index(b"\xff\xc0") :],
        "no_size.jpg": _sized(jpg, 0, 0),
        "truncated_progressive.jpg": progressive[: len(progressive) // 3],
        "shifted.jpg": b"\0" + jpg,
        "empty.jpg": b"",
        "one_byte.jpg": b"\xff",
        "html.jpg": b"<!doctype html><title>404</title>",
        "svg.jpg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "json.jpg": b'{"error": "not found"}',
        "zip.jpg": b"PK\x03\x04" + bytes(200),
        "video.jpg": b"\0\0\0\x18ftypmp42" + bytes(300),
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "text_mode.png": png.replace(b"\r\n", b"\n"),
        "zeros.jpg": bytes(5000),
        "truncated_png.png": png[: len(png) // 2],
        "filter.png": png[:data] + bytes(20) + png[data + 20 :],
        "no_data.png": png[: data - 8] + png[-12:],
        "checksum.png": png[:29] + b"\0\0\0\0" + png[33:],
        "no_pixels.png": _chunked(png, 0, 0),
        "bomb.png": _chunked(png, 50_000, 50_000),
        "deep.png": as_bytes(Image.fromarray(numbers.astype(np.uint16)), "PNG"),
        "float.tiff": as_bytes(Image.fromarray(numbers.astype(np.float32)), "TIFF"),
        "whole.tiff": as_bytes(Image.fromarray(numbers.astype(np.int32)), "TIFF"),
        "truncated_gif.gif": gif[: len(gif) // 2],
        "truncated_bmp.bmp": bmp[: len(bmp) // 2],
        "truncated_webp.webp": webp[: len(webp) // 2],
        "truncated_tiff.tiff": tiff[: len(tiff) // 2],
    }


def _sized(jpg: bytes, width: int, height: int) -> bytes:
    place = jpg.index(b"\xff\xc0") + 5
    return jpg[:place] + struct.pack(">HH", height, width) + jpg[place + 4 :]


def _chunked(png: bytes, width: int, height: int) -> bytes:
    """The PNG with another size in its header, whose checksum is right."""
    place = png.index(b"IHDR")
    header = b"IHDR" + struct.pack(">II", width, height) + png[place + 12 : place + 17]
    return png[:place] + header + struct.pack(">I", zlib.crc32(header)) + png[place + 21 :]
