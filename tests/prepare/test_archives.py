"""Hostile and damaged archives: refused by name, nothing written outside, in little memory."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import pytest

from tests.prepare.archives import VOC, coco_archives, jpeg, pack_tar, voc_archives, voc_files
from wsis.errors import InputError
from wsis.prepare.archives import extract, members
from wsis.prepare.coco import prepare_coco
from wsis.prepare.voc import TRAINVAL, prepare_voc

GOOD = f"{VOC}/JPEGImages/2007_000001.jpg"


def tar_with(path: Path, name: str, data: bytes = b"canary", **fields) -> Path:
    """A VOC archive with one more member at its start."""
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(data))
        for other, content in voc_files().items():
            info = tarfile.TarInfo(other)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def outside(root: Path) -> set[str]:
    """Everything beside the folder the archive lies in."""
    return {str(path) for path in root.parent.rglob("*") if root not in (path, *path.parents)}


NAMES = [
    "../canary.jpg",
    f"{VOC}/JPEGImages/../../../../canary.jpg",
    "/tmp/canary.jpg",
    f"/{GOOD}",
    f"{VOC}/JPEGImages/..\\..\\canary.jpg",
    "C:/canary.jpg",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_are_refused(tmp_path, name):
    root = tmp_path / "set"
    root.mkdir()
    before = outside(root)
    tar_with(root / TRAINVAL, name)
    with pytest.raises(InputError, match=r"VOCtrainval.*refused.*leads out"):
        prepare_voc(root, partial=True)
    with zipfile.ZipFile(root / "x.zip", "w") as package:
        package.writestr(name.replace("\0", ""), b"canary")
    with pytest.raises(InputError, match=r"x\.zip: refused.*leads out"):
        extract(root / "x.zip", lambda name: root / "anything")
    assert outside(root) == before and not (root / "anything").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_no_files(tmp_path, kind):
    fields = {"type": kind, "linkname": "/etc/hostname"}
    tar_with(tmp_path / TRAINVAL, GOOD.replace("01.jpg", "09.jpg"), b"", **fields)
    with pytest.raises(InputError, match=r"refused.*a link or no regular file"):
        prepare_voc(tmp_path, partial=True)
    # a link to a folder, through which the next member would be written elsewhere
    tar_with(tmp_path / TRAINVAL, f"{VOC}/JPEGImages", b"", **fields | {"linkname": ".."})
    base = prepare_voc(tmp_path, partial=True).root
    assert (base / "JPEGImages").is_dir() and not (base / "JPEGImages").is_symlink()


def test_a_link_in_a_zip_is_refused(tmp_path):
    coco_archives(tmp_path)
    info = zipfile.ZipInfo("train2014/COCO_train2014_1.jpg")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "train2014.zip", "w") as package:
        package.writestr(info, "/etc/hostname")
    with pytest.raises(InputError, match="is a link"):
        prepare_coco(tmp_path, partial=True)


def test_a_file_given_twice_is_refused(tmp_path):
    tar_with(tmp_path / TRAINVAL, GOOD)
    with pytest.raises(InputError, match="twice"):
        prepare_voc(tmp_path, partial=True)
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.zip", "w") as package:
        warnings.simplefilter("ignore")
        package.writestr("a", b"1")
        package.writestr("a", b"22")
    with pytest.raises(InputError, match="twice"):
        extract(tmp_path / "x.zip", lambda name: tmp_path / name)


BOMBS = {
    "tar.size": "one member says it has 10 GB",
    "tgz.zeros": "80 MB of zeros in 0.4 MB, as members that are not wanted",
    "tgz.name": "a name of 1 GB",
    "zip.file": "one file of 70 MB of zeros",
    "zip.many": "files of 30 MB of zeros",
}


def bomb(kind: str, path: Path) -> Path:
    path = path.with_suffix("." + kind.split(".")[0])
    if kind == "tar.size":
        info = tarfile.TarInfo(GOOD)
        info.size = 10_000_000_000
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    elif kind == "tgz.zeros":
        import zlib

        block = tarfile.TarInfo("zeros")
        block.size = 10_000_000 // 512 * 512
        header, packer = block.tobuf(), zlib.compressobj(1, zlib.DEFLATED, 31)
        with open(path, "wb") as file:
            for _ in range(8):
                file.write(packer.compress(header + bytes(block.size)))
            file.write(packer.flush())
    elif kind == "tgz.name":
        import gzip

        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1_000_000_000
        with gzip.open(path, "wb", 1) as file:
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.write(bytes(1 << 20))
    else:
        size, count = (70_000_000, 1) if kind == "zip.file" else (30_000_000, 3)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as package:
            for n in range(count):
                with package.open(f"file{n}.jpg", "w") as stream:
                    for _ in range(size // 1_000_000):
                        stream.write(bytes(1_000_000))
    return path


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_in_little_memory(tmp_path, kind):
    """In a process of its own, with its peak of memory as the judge."""
    path = bomb(kind, tmp_path / "bomb")
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from wsis.errors import InputError\n"
        "from wsis.prepare.archives import extract\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    extract(Path(sys.argv[1]), lambda name: Path(sys.argv[2]) / 'x.jpg'\n"
        "            if name.startswith(('VOC', 'file0')) else None)\n"
        "except InputError as error:\n"
        "    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    message, grown = done.stdout.splitlines()
    assert "refused" in message and path.name in message
    assert int(grown) < 64 * 1024  # KiB
    assert not any(file.stat().st_size for file in out.rglob("*"))


def sparse(kind: str, path: Path) -> Path:
    """A sparse file: in GNU's old form, or announced by an extended header of a version."""
    info = tarfile.TarInfo("file0.jpg")
    if kind == "old":
        info.type = tarfile.GNUTYPE_SPARSE
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[482] = 1  # its map goes on in the next block, and the archive ends here
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(bytes(header))
        return path
    said = {
        "0.0": {"GNU.sparse.size": "9", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "9"},
        "0.1": {"GNU.sparse.map": "0,9", "GNU.sparse.size": "9"},
        "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    }
    content = b"100000000000\n" + b"0\n" * 10_000_000
    info.pax_headers, info.size = said[kind], len(content)
    import gzip

    path.write_bytes(gzip.compress(info.tobuf(tarfile.PAX_FORMAT) + content, 1))
    return path


@pytest.mark.parametrize("kind", ["old", "0.0", "0.1", "1.0"])
def test_maps_of_sparse_files_are_not_read(tmp_path, kind):
    path = sparse(kind, tmp_path / "x.tgz")
    begun = time.process_time()
    with pytest.raises(InputError, match=r"x\.tgz: refused, it has a sparse file"):
        extract(path, lambda name: tmp_path / name)
    assert time.process_time() - begun < 5  # to read the map of 1.0 takes hours


@pytest.mark.parametrize("cut", [100, 700, 1024, 5000, 20000])
def test_incomplete_downloads_say_so(tmp_path, cut):
    voc_archives(tmp_path, test=False)
    path = tmp_path / TRAINVAL
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"VOCtrainval.*download it again"):
        prepare_voc(tmp_path, partial=True)
    packed = pack_tar(tmp_path / "x.tgz", {"a.jpg": jpeg("a"), "b.jpg": jpeg("b")})
    packed.write_bytes(packed.read_bytes()[: -min(cut, 900)])
    with pytest.raises(InputError, match=r"x\.tgz.*download it again"):
        extract(packed, lambda name: tmp_path / "out" / name if name != "." else None)
    assert not list((tmp_path / "out").glob(".*"))


def test_damaged_zips_say_so(tmp_path):
    coco_archives(tmp_path)
    path = tmp_path / "train2014.zip"
    content = bytearray(path.read_bytes())
    content[200:220] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train2014\.zip: damaged"):
        prepare_coco(tmp_path, partial=True)
    path.write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"train2014\.zip: damaged"):
        prepare_coco(tmp_path, partial=True)
    assert not list(tmp_path.rglob("*.part"))


def test_a_full_disk_leaves_no_half_file(tmp_path):
    """A limit on the size of files stands in for the disk."""
    voc_archives(tmp_path, test=False)
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (800, 800))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from wsis.cli import main\n"
        "sys.exit(main(['data', 'prepare', 'voc', sys.argv[1], '--partial', 'true']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "cannot write" in done.stderr and "bytes free" in done.stderr
    assert not [p for p in tmp_path.rglob("*.jpg") if p.stat().st_size <= 800]
    assert not list(tmp_path.rglob("*.part"))
    assert prepare_voc(tmp_path, partial=True).counts["VOC list train"] == 2


def test_members_stream(tmp_path):
    path = pack_tar(tmp_path / "x.tgz", {"a.jpg": b"1" * 3000, "b.jpg": b"2", "c.txt": b"3"})
    found = [(m.name, m.read()) for m in members(path, lambda name, _: name.endswith(".jpg"))]
    assert found == [("a.jpg", b"1" * 3000), ("b.jpg", b"2")]
