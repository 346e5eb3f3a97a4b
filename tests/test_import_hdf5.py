"""Features that others have extracted: HDF5, one dataset [frames, width] a video id."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from evc_fast.data.features import FeatureError, FeatureStore, UnknownVideo, import_hdf5
from evc_fast.data.video import frame_indices

FINGERPRINT = "ab" * 32


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


@pytest.fixture
def write(h5py, tmp_path):
    def write(datasets, name="features.h5", **options):
        with h5py.File(tmp_path / name, "w") as file:
            for key, values in datasets.items():
                file.create_dataset(key, data=values, **options)
        return tmp_path / name

    return write


def rows(frames, width=6, seed=0, dtype="float32"):
    return np.random.default_rng([seed, frames]).standard_normal((frames, width)).astype(dtype)


@pytest.mark.parametrize("options", [{}, {"chunks": (1, 3), "compression": "gzip"}])
def test_any_number_of_frames_becomes_n(write, tmp_path, options):
    counts = {"vid7": 30, "vid3": 7, "vid12": 1, "vid1": 45, "vid2": 16, "vid100": 29}
    datasets = {video_id: rows(count) for video_id, count in counts.items()}
    progress = []
    store = import_hdf5(
        write(datasets, **options),
        tmp_path / "store",
        16,
        fingerprint=FINGERPRINT,
        progress=lambda *c: progress.append(c),
    )
    assert set(store.video_ids) == set(counts) and store.num_frames == 16 and store.width == 6
    assert store.fingerprint == FINGERPRINT and store.encoder == "imported"
    for video_id, count in counts.items():
        expected = torch.from_numpy(datasets[video_id])[frame_indices(count, 16)]
        assert torch.equal(store[video_id], expected)
    assert progress[-1] == (6, 6) and len(progress) == 6
    FeatureStore.open(tmp_path / "store").verify()


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_other_number_types(write, tmp_path, dtype):
    values = (10 * rows(30)).astype(dtype)
    store = import_hdf5(write({"a": values}), tmp_path / "store", 4, fingerprint=FINGERPRINT)
    assert store["a"].dtype == torch.float32
    assert torch.equal(store["a"], torch.from_numpy(values.astype("float32"))[frame_indices(30, 4)])


def test_ids_by_a_mapping(write, tmp_path):
    path = write({"video10": rows(30), "video11": rows(31), "spare": rows(5, width=9)})
    keys = {"vid10": "video10", "vid11": "video11"}
    store = import_hdf5(path, tmp_path / "store", fingerprint=FINGERPRINT, keys=keys, encoder="CLIP")
    assert store.video_ids == ("vid10", "vid11") and store.encoder == "CLIP"
    with pytest.raises(UnknownVideo, match="no features of video10"):
        store["video10"]
    with pytest.raises(FeatureError, match=r"has no dataset x, y \(2 of 3 are missing\)"):
        import_hdf5(path, tmp_path / "store", fingerprint=FINGERPRINT, keys={"a": "video10", "b": "x", "c": "y"})
    with pytest.raises(FeatureError, match="a video id must be a string that is not empty"):
        import_hdf5(path, tmp_path / "store", fingerprint=FINGERPRINT, keys={"": "video10"})


def test_an_import_replaces_what_was_there(write, tmp_path):
    first = import_hdf5(write({"a": rows(3), "b": rows(4)}), tmp_path / "store", fingerprint=FINGERPRINT)
    second = import_hdf5(write({"c": rows(5, width=8)}), tmp_path / "store", fingerprint="cd" * 32)
    assert FeatureStore.open(tmp_path / "store").video_ids == second.video_ids == ("c",)
    assert first["a"].shape == (16, 6)


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        ({"a": rows(3), "b": rows(3, width=7)}, r"several widths: 6 \(a\), 7 \(b\)"),
        ({"a": np.zeros((0, 6), "float32")}, r"float32 \[0, 6\] at a, where numbers \[frames, width\] are expected"),
        ({"a": np.zeros(6, "float32")}, r"float32 \[6\] at a"),
        ({"a": np.zeros((1, 3, 6), "float32")}, r"float32 \[1, 3, 6\] at a"),
        ({"a": np.array([[b"one", b"two"]])}, r"\[1, 2\] at a"),
        ({"group/a": rows(3)}, "has a group at group"),
        ({}, "holds no datasets"),
        ({"a": rows(3), "b": rows(3) * np.nan}, "the features of b are not finite"),
        ({"a": np.full((3, 6), 1e300)}, "the features of a are not finite"),  # beyond float32
    ],
)
def test_what_does_not_fit_is_refused(write, tmp_path, datasets, words):
    with np.errstate(over="ignore"), pytest.raises(FeatureError, match=words):
        import_hdf5(write(datasets), tmp_path / "store", fingerprint=FINGERPRINT)
    with pytest.raises((FileNotFoundError, FeatureError)):
        FeatureStore.open(tmp_path / "store")


def test_files_that_are_not_hdf5(h5py, tmp_path):
    (tmp_path / "features.h5").write_bytes(b"none" * 100)
    with pytest.raises(FeatureError, match=r"features\.h5 is not an HDF5 file that can be read"):
        import_hdf5(tmp_path / "features.h5", tmp_path / "store", fingerprint=FINGERPRINT)
    with pytest.raises(FileNotFoundError, match=r"there is no HDF5 file .*nothing\.h5"):
        import_hdf5(tmp_path / "nothing.h5", tmp_path / "store", fingerprint=FINGERPRINT)
    with pytest.raises(FileNotFoundError, match="there is no HDF5 file"):
        import_hdf5(tmp_path, tmp_path / "store", fingerprint=FINGERPRINT)


def test_a_damaged_dataset(write, tmp_path):
    path = write({"a": rows(64, width=512)}, chunks=(8, 512), compression="gzip")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    with pytest.raises(FeatureError, match=r"features\.h5 is (damaged at a|not an HDF5 file)"):
        import_hdf5(path, tmp_path / "store", fingerprint=FINGERPRINT)


def test_without_h5py_a_sentence_says_what_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"needs h5py .*: pip install 'evc-fast\[hdf5\]'"):
        import_hdf5(tmp_path / "features.h5", tmp_path / "store", fingerprint=FINGERPRINT)
