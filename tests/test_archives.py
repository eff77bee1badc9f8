"""Archives: what is safe lands whole, what is not leaves nothing."""

import io
import tarfile
import zipfile

import pytest

from core.errors import InputError
from data.archives import unpack


def _tar(path, **entries):
    """Write a tar of names to bytes, or of names to prepared TarInfo objects."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data" / "set"


def test_tar_and_zip_land_in_the_folder(tmp_path, target):
    archive = _tar(tmp_path / "a.tgz", **{"birds/images/1.jpg": b"one", "birds/list.txt": b"1"})
    assert unpack(archive, target) == ["birds"]
    assert (target / "birds" / "images" / "1.jpg").read_bytes() == b"one"
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as content:
        content.writestr("more/2.jpg", b"two")
    assert unpack(tmp_path / "b.zip", target) == ["more"]
    assert sorted(entry.name for entry in target.iterdir()) == ["birds", "more"]


def test_archives_that_share_folders_are_merged(tmp_path, target):
    unpack(_tar(tmp_path / "a.tar.gz", **{"kit/VOC/1.jpg": b"one"}), target)
    unpack(_tar(tmp_path / "b.tar.gz", **{"kit/VOC/2.jpg": b"two"}), target)
    assert sorted(p.name for p in (target / "kit" / "VOC").iterdir()) == ["1.jpg", "2.jpg"]


def test_a_file_that_is_there_is_never_overwritten(tmp_path, target):
    archive = _tar(tmp_path / "a.tgz", **{"kit/0.jpg": b"new", "kit/1.jpg": b"other"})
    (target / "kit").mkdir(parents=True)
    (target / "kit" / "1.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"1\.jpg is there already"):
        unpack(archive, target)
    assert [p.name for p in (target / "kit").iterdir()] == ["1.jpg"]
    assert (target / "kit" / "1.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["../outside.txt", "a/../../outside.txt"])
def test_entries_that_lead_out_of_the_folder_are_refused(tmp_path, target, name):
    with pytest.raises(InputError, match="not safe"):
        unpack(_tar(tmp_path / "a.tgz", good=b"fine", **{name: b"bad"}), target)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as content:
        content.writestr("good", b"fine")
        content.writestr(name, b"bad")
    with pytest.raises(InputError, match="not safe"):
        unpack(tmp_path / "b.zip", target)
    assert list(target.iterdir()) == []
    assert not list(tmp_path.rglob("outside.txt"))


def test_an_absolute_name_stays_inside_or_is_refused(tmp_path, target):
    absolute = tmp_path / "absolute.txt"
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as content:
        content.writestr(str(absolute), b"bad")
    with pytest.raises(InputError, match="not safe"):
        unpack(tmp_path / "b.zip", target)
    unpack(_tar(tmp_path / "a.tgz", **{str(absolute): b"bad"}), target)  # tarfile strips the root
    assert not absolute.exists()


def test_links_out_of_the_folder_and_devices_are_refused(tmp_path, target):
    device = tarfile.TarInfo("null")
    device.type = tarfile.CHRTYPE
    for entry in (_link("way", "/etc"), _link("way", "../.."), device):
        with pytest.raises(InputError, match="not safe"):
            unpack(_tar(tmp_path / "a.tgz", entry=entry), target)
    link = zipfile.ZipInfo("way")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as content:
        content.writestr(link, "/etc")
    with pytest.raises(InputError, match="is a link"):
        unpack(tmp_path / "b.zip", target)
    assert list(target.iterdir()) == []


def test_damaged_and_foreign_files_leave_nothing(tmp_path, target):
    archive = _tar(tmp_path / "a.tgz", big=bytes(range(256)) * 4000)
    archive.write_bytes(archive.read_bytes()[:-2000])
    (tmp_path / "text.zip").write_text("no archive")
    for path, sentence in ((archive, "damaged"), (tmp_path / "text.zip", "no .zip")):
        with pytest.raises(InputError, match=sentence):
            unpack(path, target)
    assert list(target.iterdir()) == []
    with pytest.raises(InputError, match="does not exist"):
        unpack(tmp_path / "none.zip", target)


def test_tool_unpacks_and_refuses(tmp_path, run_tool):
    archive = _tar(tmp_path / "a.tgz", **{"birds/1.jpg": b"one"})
    done = run_tool("unpack_data.py", archive, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "birds" in done.stdout
    again = run_tool("unpack_data.py", archive, tmp_path / "out")
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1
