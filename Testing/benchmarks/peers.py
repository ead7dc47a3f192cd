"""Run one registration tool on one pair, in its own process, and leave dense transforms behind.

    python peers.py TOOL FIXED MOVING OUTDIR

TOOL is one of ``ants-syn``, ``ants-quick`` (antsRegistrationSyNQuick[s]), ``ants-syncc``, ``greedy``, ``greedy-half``
(without its full-resolution level), ``elastix``. Written to OUTDIR:

* ``forward.nii.gz``: displacement in mm (LPS) on the fixed grid, fixed point -> moving point, the
  tool's own affine stage included;
* ``inverse.nii.gz``: the same on the moving grid, moving point -> fixed point (not for elastix, which has none);
* ``run.json``: ``seconds`` = reading the images, every registration stage, and writing the tool's
  own transforms. Making the two dense files above for the scorer is *not* counted, importing the tool neither.

Every tool runs with its documented defaults; nothing is tuned for or against it. ``compare.py`` calls this file.
"""

import json
import os
import sys
import time
from pathlib import Path

THREADS = os.environ.get("SYMREG_BENCH_THREADS", "2")
for _name in ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = THREADS


def run_ants(fixed, moving, out, kind):
    import ants

    start = time.perf_counter()
    f, m = ants.image_read(str(fixed)), ants.image_read(str(moving))
    result = ants.registration(f, m, type_of_transform=kind, outprefix=str(out / "ants_"), random_seed=1)
    seconds = time.perf_counter() - start
    ants.apply_transforms(f, m, result["fwdtransforms"], compose=str(out / "forward_"))
    ants.apply_transforms(m, f, result["invtransforms"], compose=str(out / "inverse_"))
    for name in ("forward", "inverse"):
        os.replace(out / f"{name}_comptx.nii.gz", out / f"{name}.nii.gz")
    return seconds


def run_greedy(fixed, moving, out, steps="100x50x10"):
    from picsl_greedy import Greedy3D

    start = time.perf_counter()
    greedy = Greedy3D()
    common = f"-i {fixed} {moving} -m NCC 2x2x2 -n {steps} -threads {THREADS}"
    greedy.execute(f"{common} -a -ia-image-centers -o {out}/affine.mat")
    greedy.execute(f"{common} -it {out}/affine.mat -o {out}/warp.nii.gz -oinv {out}/warp_inv.nii.gz")
    seconds = time.perf_counter() - start
    greedy.execute(f"-rf {fixed} -rc {out}/forward.nii.gz -r {out}/warp.nii.gz {out}/affine.mat")
    greedy.execute(f"-rf {moving} -rc {out}/inverse.nii.gz -r {out}/affine.mat,-1 {out}/warp_inv.nii.gz")
    return seconds


def run_elastix(fixed, moving, out):
    import itk

    itk.MultiThreaderBase.SetGlobalMaximumNumberOfThreads(int(THREADS))
    start = time.perf_counter()
    f = itk.imread(str(fixed), itk.F)
    m = itk.imread(str(moving), itk.F)
    parameters = itk.ParameterObject.New()
    for stage in ("rigid", "affine", "bspline"):
        stage_map = parameters.GetDefaultParameterMap(stage)
        if stage == "rigid":
            stage_map["AutomaticTransformInitialization"] = ["true"]
        parameters.AddParameterMap(stage_map)
    _, result = itk.elastix_registration_method(f, m, parameter_object=parameters, log_to_console=False)
    seconds = time.perf_counter() - start
    itk.imwrite(itk.transformix_deformation_field(m, result), str(out / "forward.nii.gz"))
    return seconds


TOOLS = {
    "ants-syn": lambda *a: run_ants(*a, kind="SyN"),
    "ants-quick": lambda *a: run_ants(*a, kind="antsRegistrationSyNQuick[s]"),
    "greedy-half": lambda *a: run_greedy(*a, steps="100x50x0"),
    "ants-syncc": lambda *a: run_ants(*a, kind="SyNCC"),
    "greedy": run_greedy,
    "elastix": run_elastix,
}


def main(tool, fixed, moving, out):
    fixed, moving, out = (Path(path).resolve() for path in (fixed, moving, out))
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)  # transformix leaves files where it is started
    seconds = TOOLS[tool](fixed, moving, out)
    (out / "run.json").write_text(json.dumps({"tool": tool, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
