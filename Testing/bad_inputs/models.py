"""Damaged transforms and weights."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from SymRegistrationLib.geometry.transform_files import write_transform
from SymRegistrationLib.geometry.transforms import DenseTransform

from .formats import GRID, SHAPE, flipped, nifti, nrrd, scan


def transforms(bad: Path, good: Path) -> None:
    whole = (good / "forward.h5").read_bytes()
    affine = (good / "affine.tfm").read_text()
    field = np.zeros((*SHAPE, 3), np.float32)
    field[7, 8, 9] = np.nan
    write_transform(bad / "nan.h5", DenseTransform(GRID, field))
    write_transform(bad / "nan_field.nrrd", DenseTransform(GRID, field))
    for name, data in {
        "empty.h5": b"",
        "text.h5": b"this is no transform",
        "cut.h5": whole[: len(whole) // 2],
        "head.h5": whole[:8] + bytes(500),
        "empty.tfm": b"",
        "text.tfm": b"this is no transform",
        "few.tfm": affine.replace("Parameters: 1 0 0", "Parameters: 1").encode(),
        "words.tfm": affine.replace("Parameters: 1", "Parameters: one").encode(),
        "nan.tfm": affine.replace("Parameters: 1", "Parameters: nan").encode(),
        "zero.tfm": affine.replace("Parameters: 1", "Parameters: 0").encode(),
        "kind.tfm": affine.replace("AffineTransform", "PorridgeTransform").encode(),
        "huge.tfm": affine.replace("Parameters: 1", "Parameters: 1e300").encode(),
    }.items():
        (bad / name).write_bytes(data)
    sitk.WriteTransform(sitk.AffineTransform(2), str(bad / "plane.tfm"))
    image = sitk.GetImageFromArray(np.zeros((*SHAPE, 2), np.float32), isVector=True)
    sitk.WriteImage(image, str(bad / "two.nrrd"))
    (bad / "huge_field.nii").write_bytes(
        nifti(np.zeros(8, np.float32), dim=[5, 3000, 3000, 3000, 1, 3, 1, 1], intent_code=1006)
    )
    (bad / "huge_field.nrrd").write_bytes(
        nrrd(
            scan(),
            type="float",
            dimension="4",
            kinds="vector domain domain domain",
            sizes="3 9000 9000 9000",
            space_directions="none (4,0,0) (0,4,0) (0,0,4)",
        )
    )
    cut = nifti(np.zeros((3, 1, *SHAPE), np.float32), intent_code=1006)
    (bad / "cut_field.nii").write_bytes(cut[: len(cut) // 2])


class _Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def weights(bad: Path, good: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = (good / "net.safetensors").read_bytes()
    card = json.loads((good / "net.safetensors.json").read_text())
    tensors = load_file(good / "net.safetensors")
    about = {"method": "hsyn", "size": "small", "version": "0.1.0", "options": json.dumps(card["options"])}

    def put(name: str, data: bytes, with_card: dict | str | None = None) -> None:
        (bad / f"{name}.safetensors").write_bytes(data)
        if with_card is not None:
            text = with_card if isinstance(with_card, str) else json.dumps(with_card)
            (bad / f"{name}.safetensors.json").write_text(text)

    def save(name: str, values: dict, metadata: dict | None) -> None:
        save_file(
            {key: value.contiguous() for key, value in values.items()}, bad / f"{name}.safetensors", metadata=metadata
        )

    put("empty", b"")
    put("text", b"this is no network\n" * 40)
    put("trap", pickle.dumps(_Trap(bad / "executed")))
    with zipfile.ZipFile(bad / "torch_zip.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Trap(bad / "executed")))
    put("cut", whole[: len(whole) // 2])
    put("flipped", flipped(whole, 0.7), card)
    put("flipped_header", whole.replace(b'"dtype"', b'"dtyqe"', 1))
    put("other_hash", whole, {**card, "sha256": hashlib.sha256(b"").hexdigest()})
    put("no_hash", whole, {"method": "hsyn"})
    put("card_text", whole, "this is no card")
    put("card_list", whole, "[1, 2]")
    put("card_deep", whole, "[" * 100_000)
    put("long_header", struct.pack("<Q", 2**60) + whole[8:])
    first = next(iter(tensors))
    save("nan", {**tensors, first: tensors[first] * float("nan")}, about)
    save("nameless", tensors, None)
    save("another", tensors, {**about, "method": "caml"})
    save("stranger", tensors, {**about, "method": "porridge"})
    save("size", tensors, {**about, "size": "gigantic"})
    save("switch", tensors, {**about, "options": '{"porridge": 3}'})
    save("switch_list", tensors, {**about, "options": "[1, 2]"})
    save("switch_text", tensors, {**about, "options": "{oops"})
    save("switch_huge", tensors, {**about, "options": json.dumps(dict.fromkeys(card["options"], "x"))})
    save("missing", {key: value for key, value in tensors.items() if key != first}, about)
    save("extra", {**tensors, "porridge": tensors[first].clone()}, about)
    save("shape", {**tensors, first: tensors[first][:1]}, about)
    (bad / "folder.safetensors").mkdir()
