"""Initial alignment: where the two scans lie to each other before anything bends.

The result is two 4x4 matrices from a **mid-space** to each scan, ``exp(-X/2)`` and ``exp(+X/2)`` of one generator X, so
that exchanging the scans exchanges the matrices (mathematics.md, 5.1). Scores are computed at points of the mid-space,
which favours neither scan.

The search itself is :mod:`pose_search`. Whether the scans show one contrast or two is judged by how their brightness
correlates locally, never by the correlation over the volume: the silhouettes of two heads correlate at 0.9 whatever is
inside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from ..geometry.file_checks import quiet
from ..geometry.grid import transform_points
from ..job import InputError, existing_file
from . import pose_search
from .mirror import mirrored_gain
from .pose_reasons import Candidate, candidates, reasons
from .working_grid import Scan

#: Below this the best pose is hardly better than the next one found elsewhere, by measure. Correlation: the 0.2 of the
#: first version, which right poses of one contrast pass at 0.44 to 0.78. Mutual information ranks closer: right poses
#: of two contrasts end at 0.17 to 0.60, pairs of different organs at 0.00 to 0.02.
UNSURE = {"ncc": 0.2, "mi": 0.1}
#: Aligned scans with a lower mean signed local correlation show two contrasts. Measured at the aligned pose: one
#: contrast 0.73 to 0.82 (brains and heads of two people, visits of one), 0.72 liver, 0.48 lung; two contrasts
#: -0.47 to 0.31 (T1, T2, FLAIR of one person) and up to 0.39 (T1 and FLAIR of two).
ONE_CONTRAST = 0.43
#: Below the first at the rough pose of the search by correlation, mutual information searches. Below the second it
#: searches too, and its pose is taken when it knows one that tells more: brightness can stretch one contrast until it
#: looks like the other (kirby113 FLAIR <- T1 at 3 mm: 0.46 at a pose 6 mm off).
ROUGHLY_ONE_CONTRAST, SURELY_ONE_CONTRAST = 0.3, 0.6


@dataclass(frozen=True, eq=False)
class Alignment:
    """Result of the initial alignment.

    Attributes:
        mid_to_fixed, mid_to_moving: (4, 4), LPS mm, mid-space point -> scan point.
        kind: ``none``, ``centre``, ``rigid``, ``affine``, ``landmarks`` or ``file``.
        similarity: correlation (or mutual information) at the optimum.
        confidence: 0..1, how much better this pose is than the best one found elsewhere; 1 when nothing was searched.
        measure: ``ncc``, or ``mi`` where the scans were taken for two contrasts.
        likeness: mean signed local correlation of the aligned scans, -1..1; nan when nothing was compared.
        mirrored_gain: by what share the mutual information grows when the moving scan is mirrored left to right and
            refined; nan when nothing was searched.
        candidates: poses that were looked at, the one that was taken last; () when nothing was compared.
        reasons: each decision on the way in a sentence.
    """

    mid_to_fixed: np.ndarray
    mid_to_moving: np.ndarray
    kind: str
    similarity: float = float("nan")
    confidence: float = 1.0
    measure: str = "ncc"
    likeness: float = float("nan")
    mirrored_gain: float = float("nan")
    candidates: tuple[Candidate, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def matrix(self) -> np.ndarray:
        """(4, 4) LPS mm, fixed point -> moving point."""
        return self.mid_to_moving @ np.linalg.inv(self.mid_to_fixed)

    @property
    def one_patient(self) -> bool:
        """True when no stretch was found between the scans, so they are taken for one patient's."""
        return self.kind != "affine"

    @property
    def unsure(self) -> bool:
        """True when another pose explains the scans nearly as well."""
        return self.confidence < UNSURE[self.measure]


def align(
    fixed: Scan,
    moving: Scan,
    kind: str = "affine",
    measure: str = "auto",
    seed: int = 0,
    landmarks: tuple[np.ndarray, np.ndarray] | None = None,
    near: np.ndarray | None = None,
) -> Alignment:
    """Find the pose of two prepared scans.

    Args:
        kind: ``none`` (headers are right), ``centre`` (content middles onto each other), ``rigid``, ``similarity`` (one
            scale; across contrasts rigid), ``affine``, or the path of a linear ITK transform file, fixed -> moving.
        measure: ``ncc`` (one contrast), ``mi`` (any), or ``auto``: ncc, then mi where the scans look like two
            contrasts. With ``mi`` the pose is rigid unless the images insist on a stretch; the result's ``kind`` says.
        seed: of the rotations tried; the search is deterministic given it.
        landmarks: ((n, 3), (n, 3)) LPS mm of fixed and moving: start there instead of searching; with ``none`` or
            ``centre`` the pose is theirs (rigid, least squares) and is not refined.
        near: (4, 4) LPS mm, fixed -> moving: refine from this pose instead of searching.

    Raises:
        InputError: unreadable or non-linear transform file, or one beside landmarks; fewer than 3 landmarks.
    """
    if landmarks is not None and kind not in ("rigid", "similarity", "affine"):
        if kind not in ("none", "centre"):
            raise InputError(
                f"both landmarks and the file '{kind}' shall start the alignment.",
                "Leave out --guide-with-points, or choose --initial none, rigid or affine.",
            )
        return split_midway(from_landmarks(*landmarks, affine=False), fixed.centroid, "landmarks")
    if kind == "none":
        return Alignment(np.eye(4), np.eye(4), "none")
    if kind not in ("centre", "rigid", "similarity", "affine"):
        return split_midway(read_linear(kind), fixed.centroid, "file")
    if kind == "centre":
        half = (moving.centroid - fixed.centroid) / 2
        return Alignment(pose_search.shift(-half), pose_search.shift(half), "centre")
    search = pose_search.Search(fixed, moving, seed)
    if near is not None:
        return _from_guides(search, near, kind, measure)
    if landmarks is not None:
        return _from_guides(search, from_landmarks(*landmarks, affine=False), kind, measure)
    one = None if measure == "mi" else search.one_contrast(kind)
    likeness = float("nan")
    if one is not None and (measure == "ncc" or search.likeness(one.x) >= ROUGHLY_ONE_CONTRAST):
        one = search.polish(one, kind, "ncc")
        likeness = search.likeness(one.x)
        if measure == "ncc" or likeness >= SURELY_ONE_CONTRAST:
            return _alignment(search, one, kind, (kind, measure), likeness)
    two = search.two_contrasts([] if one is None else [one.x])
    if one is not None and likeness >= ONE_CONTRAST and search.information(one.x) >= search.information(two.x):
        return _alignment(search, one, kind, (kind, measure), likeness)
    likeness = search.likeness(two.x)
    if measure == "auto" and likeness >= ONE_CONTRAST:  # one contrast after all; brightness had led astray
        again = search.polish(two, kind, "ncc")
        return _alignment(search, again, kind, (kind, measure), search.likeness(again.x))
    if kind == "affine":
        two = search.stretched(two)
    return _alignment(search, two, _freedom(two), (kind, measure), likeness)


def shows_one_contrast(fixed: Scan, moving: Scan, pose: Alignment) -> bool:
    """Whether two scans show one contrast at a pose; a pose that nobody compared is refined for the question alone."""
    likeness = pose.likeness
    if np.isnan(likeness):
        likeness = pose_search.Search(fixed, moving, 0).likeness_near(pose.matrix)
    return likeness >= ONE_CONTRAST


def _from_guides(search: pose_search.Search, start: np.ndarray, kind: str, measure: str) -> Alignment:
    """Refined from where landmarks put it; ``auto`` looks there whether the contrasts are one or two."""
    x = search.generator(start)
    likeness = search.likeness(x)
    given = pose_search.Found(x, float("nan"), 1.0, "ncc")
    if measure == "ncc" or (measure == "auto" and likeness >= ONE_CONTRAST):
        return _alignment(search, search.polish(given, kind, "ncc"), kind, (kind, measure), likeness)
    found = search.polish(given, "rigid", "mi")
    found = search.stretched(found) if kind == "affine" else found
    return _alignment(search, found, _freedom(found), (kind, measure), search.likeness(found.x))


def _freedom(found: pose_search.Found) -> str:
    """The kind of a pose between two contrasts."""
    return "affine" if found.stretched and found.stretched.insisted else "rigid"


def _alignment(
    search: pose_search.Search, found: pose_search.Found, kind: str, asked: tuple[str, str], likeness: float
) -> Alignment:
    return Alignment(
        *search.matrix(found.x),
        kind,
        found.score,
        found.confidence,
        found.measure,
        likeness,
        mirrored_gain(search, found.x),
        candidates(search, found),
        reasons(search, found, asked, likeness, ONE_CONTRAST),
    )


def from_landmarks(fixed: np.ndarray, moving: np.ndarray, affine: bool) -> np.ndarray:
    """(4, 4) LPS mm, fixed -> moving, least squares over corresponding points; rigid by Kabsch or full affine.

    Raises:
        InputError: fewer than 3 points (4 for affine), or counts differ.
    """
    fixed, moving = np.asarray(fixed, float), np.asarray(moving, float)
    need = 4 if affine else 3
    if len(fixed) != len(moving) or len(fixed) < need:
        raise InputError(
            f"{len(fixed)} fixed and {len(moving)} moving landmarks were given.",
            f"Give the same number on both sides, at least {need}.",
        )
    cf, cm = fixed.mean(0), moving.mean(0)
    if affine:
        linear = np.linalg.lstsq(fixed - cf, moving - cm, rcond=None)[0].T
    else:
        u, _, vt = np.linalg.svd((moving - cm).T @ (fixed - cf))
        linear = u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, cm - linear @ cf
    return matrix


def read_linear(path: str) -> np.ndarray:
    """(4, 4) LPS mm of a linear ITK transform file (.tfm, .txt, .mat, .h5), fixed -> moving.

    Raises:
        InputError: missing, unreadable, or not linear.
    """
    try:
        with quiet():
            transform = sitk.ReadTransform(str(existing_file(path, "initial transform")))
    except RuntimeError:
        raise InputError(
            f"initial transform '{path}' could not be read.",
            "Give none, centre, rigid, affine, or an ITK transform file (.h5, .tfm, .mat, .txt).",
        ) from None
    if transform.GetDimension() != 3:
        raise InputError(f"initial transform '{path}' is {transform.GetDimension()}-D.", "Give one for 3-D scans.")
    if not transform.IsLinear():
        raise InputError(
            f"initial transform '{path}' is not linear ({transform.GetName()}).",
            "Only rigid and affine transforms can start a registration.",
        )
    columns = np.array([transform.TransformPoint(p) for p in ((0.0, 0, 0), (1.0, 0, 0), (0.0, 1, 0), (0.0, 0, 1))])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = (columns[1:] - columns[0]).T, columns[0]
    if not 1e-6 < abs(np.linalg.det(matrix[:3, :3])) < 1e6 or not np.isfinite(matrix).all():
        raise InputError(f"initial transform '{path}' is singular.", "It flattens or explodes space; export it again.")
    return matrix


def split_midway(matrix: np.ndarray, centre: np.ndarray, kind: str) -> Alignment:
    """Split fixed -> moving into two equal halves about ``centre``."""
    target = transform_points(matrix, centre)
    local = pose_search.shift(-target) @ matrix @ pose_search.shift(centre)
    values, vectors = np.linalg.eig(local)
    root = (vectors @ np.diag(np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)).real
    if not np.allclose(root @ root, local, atol=1e-6):
        root, rest = np.eye(4), local
    else:
        rest = root
    return Alignment(pose_search.shift(centre) @ np.linalg.inv(root), pose_search.shift(target) @ rest, kind)
