"""Weights files: what is written comes back, and nothing damaged or foreign gets in."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from SymRegistrationLib import networks
from SymRegistrationLib.job import InputError
from SymRegistrationLib.registration import weights

SEED = 20261121


@pytest.fixture
def network():
    torch.manual_seed(3)
    return networks.create("hsyn", "small", mag="mc", smooth=0.5)


@pytest.fixture
def file(network, tmp_path):
    return weights.save(tmp_path / "w.safetensors", network, {"training_data": "phantoms", "limits": "tests only"})


def test_round_trip_in_half_precision(network, file):
    found = weights.load(file, "hsyn")
    assert (found.method, found.size, found.options["smooth"], found.options["mag"]) == ("hsyn", "small", 0.5, "mc")
    other = networks.create(found.method, found.size, **found.options)
    weights.fill(other, found)
    for mine, theirs in zip(network.parameters(), other.parameters()):
        assert theirs.dtype == torch.float32
        assert torch.allclose(mine, theirs, rtol=2**-11, atol=1e-7)
    assert file.stat().st_size < 8e6


def test_model_card_tells_what_is_in_the_file(file):
    card = json.loads(weights.card_path(file).read_text())
    assert card["method"] == "hsyn" and card["limits"] == "tests only" and len(card["sha256"]) == 64
    assert weights.load(file).card == card and weights.load(file).sha256 == card["sha256"]
    assert sorted(path.name for path in file.parent.iterdir()) == ["w.safetensors", "w.safetensors.json"]


def test_a_file_without_its_card_is_taken_but_not_called_checked(file):
    weights.card_path(file).unlink()
    assert weights.load(file, "hsyn").card == {}


def prealigned(seed: int):
    torch.manual_seed(seed)
    return networks.create("hsyn", "small", prealign=True)


def test_pose_and_matching_lie_once_beside_several_weights(tmp_path):
    """Loaded, nothing shows it; the shared file exchanged or lost is told."""
    first = prealigned(SEED)
    whole, shared = (
        weights.load(weights.save(tmp_path / folder / "hsyn-small.safetensors", first, share=share), "hsyn")
        for folder, share in (("whole", False), ("shared", True))
    )
    beside = tmp_path / "shared" / weights.SHARED
    assert shared.tensors.keys() == whole.tensors.keys() and beside.stat().st_size > 1.9e6
    assert all(torch.equal(shared.tensors[name], value) for name, value in whole.tensors.items())
    assert shared.path.stat().st_size < whole.path.stat().st_size - 1.9e6
    second = prealigned(SEED)
    with torch.no_grad():
        next(second.inner.parameters()).add_(1.0)
    weights.save(tmp_path / "shared/other.safetensors", second, share=True)  # the same front, another method behind it
    with pytest.raises(InputError, match="another pose and matching"):
        weights.save(tmp_path / "shared/third.safetensors", prealigned(SEED + 1), share=True)
    assert not (tmp_path / "shared/third.safetensors").exists()
    beside.unlink()
    with pytest.raises(InputError, match="needs 'prealign.safetensors' beside it"):
        weights.load(shared.path)
    weights.save(tmp_path / "shared/third.safetensors", prealigned(SEED + 1), share=True)
    with pytest.raises(InputError, match="was trained behind"):
        weights.load(shared.path)


def test_another_method(file):
    with pytest.raises(InputError, match="of hsyn, not of sm-gicnet") as caught:
        weights.load(file, "sm-gicnet")
    assert caught.value.exit_code == 2 and "--method hsyn" in caught.value.hint


@pytest.mark.parametrize(
    "size, switches", [("published", {}), ("small", {"sn_mode": "two_head"}), ("small", {"levels": 2})]
)
def test_another_size_or_shape(file, size, switches):
    with pytest.raises(InputError, match="does not fit hsyn"):
        weights.fill(networks.create("hsyn", size, **switches), weights.load(file))


def test_truncated(file):
    weights.card_path(file).unlink()
    whole = file.read_bytes()
    for keep in (0, 5, 200, len(whole) - 10):
        file.write_bytes(whole[:keep])
        with pytest.raises(InputError, match="not a complete safetensors file"):
            weights.load(file)


def test_one_flipped_bit_is_seen_by_the_hash(file):
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="SHA-256"):
        weights.load(file)


def test_nan_is_neither_read_nor_written(network, file, tmp_path):
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad, metadata={"method": "hsyn", "size": "small"})
    with pytest.raises(InputError, match="NaN"):
        weights.load(bad)
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = 1e6  # infinite in half precision
    with pytest.raises(InputError, match="half precision"):
        weights.save(tmp_path / "new.safetensors", network)
    assert not (tmp_path / "new.safetensors").exists()


def test_pickles_and_foreign_files_are_never_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(InputError, match="safetensors"):
            weights.load(tmp_path / name)
    assert not (tmp_path / "owned").exists()
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="does not say of which method"):
        weights.load(tmp_path / "other.safetensors")


def test_damaged_card(file):
    weights.card_path(file).write_text("{")
    with pytest.raises(InputError, match="model card"):
        weights.load(file)


def test_missing(tmp_path):
    with pytest.raises(InputError, match="there is no weights file"):
        weights.load(tmp_path / "none.safetensors")


def test_shipped_weights_are_found_by_size(network, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    with pytest.raises(InputError, match="no weights for hsyn") as caught:
        weights.find("hsyn")
    assert "--weights" in caught.value.hint and "--method syn needs none" in caught.value.hint
    path = weights.save(tmp_path / "hsyn-small.safetensors", network)
    assert (
        weights.shipped("hsyn") == {"small": path}
        and weights.find("hsyn") == weights.find("hsyn", size="small") == path
    )
    assert str(weights.find("hsyn", "my.safetensors")) == "my.safetensors"
    with pytest.raises(InputError, match=r"hsyn \(published\)"):
        weights.find("hsyn", size="published")


def test_what_the_package_ships_is_whole():
    for name in networks.names():
        for size, path in weights.shipped(name).items():
            found = weights.load(path, name)
            assert found.size == size and found.card["sha256"] == found.sha256 and path.stat().st_size <= 10e6
            weights.fill(networks.create(name, size, **found.options), found)


def test_folder_that_cannot_be_written(network, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        weights.save(tmp_path / "file" / "w.safetensors", network)
    with pytest.raises(InputError, match="stored as"):
        weights.save(tmp_path / "w.pt", network)
