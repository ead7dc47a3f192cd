"""Every command with every damaged file, and the words of its refusal. Long because it is a table: a line a case."""

from __future__ import annotations

#: What may be awaited of every scan, in every role. ``file => words of the refusal``; the file's name must be in
#: it too.
SCANS = """
sizeof.nii => no NIfTI file
magic.nii => no NIfTI file
nine_axes.nii => 9 axes
no_axes.nii => 0 axes
negative_size.nii => could not be read
huge.nii => cut off
huge.nii.gz => cut off
datatype.nii => could not be read
offset.nii => cut off
offset_nan.nii => voxels begin at byte nan
zero_spacing.nii => voxel size of 0 x 4 x 4 mm
nan_spacing.nii => voxel size of nan x 4 x 4 mm
huge_spacing.nii => singular
tiny_spacing.nii => singular orientation
flat_sform.nii => singular
nan_sform.nii => singular orientation
five_axes.nii => 5-D
complex.nii => complex numbers
rgb.nii => 3 values a voxel
cut.nii.gz => damaged
tail.nii.gz => damaged
flipped.nii.gz => damaged
checksum.nii.gz => checksum
cut.nii => cut off
header_only.nii => cut off
empty.nii => damaged
empty.nii.gz => damaged
text.nii.gz => damaged
plain.nii.gz => damaged
constant.nii => constant (7)
all_nan.nii => no finite voxel
all_inf.nii => no finite voxel
one_voxel.nii => constant
speck.nii => almost no content
flat.nii => 2-D
series.nii => 4-D
empty.nrrd => no known format
text.nrrd => no known format
cut.nrrd => could not be read
zero_spacing.nrrd => spacing
singular.nrrd => singular
nan_origin.nrrd => could not be read
huge.nrrd => declares 7.29e+14 voxels
negative.nrrd => could not be read
two_sizes.nrrd => parsed 2 values
type.nrrd => porridge
encoding.nrrd => encoding
checksum.nrrd => checksum
nan_scan.nrrd => no finite voxel
detached.nhdr => gone.raw
empty.mha => no known format
text.mha => no known format
cut.mha => could not be read
huge.mha => declares 7.29e+14 voxels
zero_spacing.mha => spacing
nan_spacing.mha => spacing
singular.mha => singular
no_size.mha => could not be read
type.mha => unknown
checksum.mha => checksum
vector.mha => 3 values a voxel
detached.mhd => could not be read
short.mhd => could not be read
huge.mhd => declares 7.29e+14 voxels
empty.mgz => could not be read
text.mgz => could not be read
cut.mgh => could not be read
cut.mgz => could not be read
huge.mgh => declares 2.7e+13 voxels
huge.mgz => declares 2.7e+13 voxels
singular.mgh => singular orientation
zero_spacing.mgh => singular orientation
frames.mgh => 4-D
negative.mgh => no voxels
all_nan.mgh => could not be read
type.mgh => could not be read
scan.txt => no known format
scan => no known format
scan.xyz => no known format
scan.nii.gz.part => no known format
scan.npy => no known format
page.html => no known format
picture.png => 2-D
folder => no DICOM series
folder.nii.gz => no DICOM series
broken_dicom => no DICOM series
pipe.nii => neither a file nor a folder
socket => neither a file nor a folder
dangling.nii => does not exist
loop.nii => cannot be opened
none.nii.gz => does not exist
"""
REGISTER = "register {fixed} {moving} -o {out} --preset fast --no-report "
PAIR_OF_POINTS = REGISTER + "--fixed-points {good}/fixed.csv --moving-points {bad}/"
NETWORK = REGISTER + "--method hsyn --weights {bad}/"
JOB = "register --job {bad}/job_"
IMAGE = "apply {moving} --reference {fixed} -o {tmp}/x.nii.gz --transform {bad}/"
POINTS = "apply {good}/moving.csv --points -o {tmp}/x.csv --transform {bad}/"
SCORE = "evaluate --fixed {fixed} -o {tmp}/x.json --transform {bad}/"
TRAIN = "train --method hsyn -o {out} --shape 32,32,32 --spacing 8 --iterations 3 "
DEMO = "demo -o {out} "


def _lines(prefix: str, text: str):
    for line in text.strip().splitlines():
        words, said = line.split(" => ")
        yield prefix + words.strip(), said.strip()


def _cases():
    for k, (name, said) in enumerate(_lines("", SCANS)):
        pair = ("{bad}/" + name, "{moving}") if k % 2 else ("{fixed}", "{bad}/" + name)
        yield f"register {pair[0]} {pair[1]} -o {{out}} --preset fast", said
    for prefix, text in (
        (
            "apply {bad}/",
            """
            {none} --reference {fixed} --transform {good}/forward.h5 -o {tmp}/x.nii.gz => does not exist
            {cut} --reference {fixed} --transform {good}/forward.h5 -o {tmp}/x.nii.gz => damaged
            {huge} --reference {fixed} --transform {good}/forward.h5 -o {tmp}/x.nii.gz => declares
            {complex} --labels --reference {fixed} --transform {good}/forward.h5 -o {tmp}/x.nii.gz => complex
            {halves} --labels --reference {fixed} --transform {good}/forward.h5 -o {tmp}/x.nii.gz => not whole numbers
            {biglabels} --labels --reference {fixed} --transform {good}/forward.h5 -o {tmp}/x.nii.gz => too large
            """.replace("{none}", "none.nii")
            .replace("{cut}", "cut.nii.gz")
            .replace("{huge}", "huge.mha")
            .replace("{complex}", "complex.nii")
            .replace("{halves}", "halves.nii.gz")
            .replace("{biglabels}", "big_labels.nii.gz"),
        ),
        (
            "apply {moving} --transform {good}/forward.h5 -o {tmp}/x.nii.gz --reference {bad}/",
            """
            none.nii => does not exist
            zero_spacing.nii => voxel size
            flat.nii => 2-D
            pipe.nii => neither a file nor a folder
            """,
        ),
        (
            "apply {good}/moving.csv --transform {good}/forward.h5 --points -o {tmp}/",
            """
            x.txt => no known ending
            x => no known ending
            nofolder/x.csv => does not exist
            x.csv --inverse {good}/other.h5 => is not the inverse
            x.csv --inverse {bad}/cut.h5 => could not be read
            x.csv --from sideways => invalid choice
            x.csv --interpolation linear => not for points
            """,
        ),
        (
            "apply {moving} --transform {good}/forward.h5 ",
            """
            -o {tmp}/x.nii.gz => no reference image
            --reference {fixed} => required: -o
            --reference {fixed} -o {tmp}/x.jpg => no known ending
            --reference {fixed} -o {tmp} => no known ending
            --reference {fixed} -o {bad}/folder.nii.gz => cannot be written
            --reference {fixed} -o {tmp}/x.nii.gz --interpolation cubic => not for image
            --reference {fixed} -o {tmp}/x.nii.gz --labels --interpolation linear => not for labels
            --reference {fixed} -o {tmp}/x.nii.gz --labels --points => not allowed with
            """,
        ),
        (IMAGE, TRANSFORMS),
        (SCORE, TRANSFORMS),
        (POINTS, TRANSFORMS + "zero.tfm => has no inverse\n"),
        (
            "evaluate ",
            """
            --fixed {bad}/cut.nii --transform {good}/forward.h5 => cut off
            --transform {good}/affine.tfm => Add --fixed
            --fixed {fixed} => nothing to evaluate
            --inverse {good}/inverse.h5 => without its transform
            --fixed-labels {good}/fixed_labels.nii.gz --transform {good}/forward.h5 => Add --moving-labels
            --moving-points {good}/moving.csv => Add --fixed-points
            --fixed-labels {bad}/halves.nii.gz --moving-labels {good}/moving_labels.nii.gz => not whole numbers
            --fixed-labels {bad}/nan_labels.nrrd --moving-labels {good}/moving_labels.nii.gz => whole numbers
            --fixed-points {good}/fixed.csv --moving-points {bad}/short.csv => has 1
            --transform {good}/forward.h5 --fixed-mask {bad}/nomask.nii.gz => is empty
            --transform {good}/forward.h5 --fixed-mask {bad}/farmask.nii.gz => wholly outside
            --transform {good}/forward.h5 --inverse {bad}/text.h5 => could not be read
            --transform {good}/forward.h5 -o {tmp} => cannot be written
            --transform {good}/forward.h5 -o {tmp}/no/x.json => does not exist
            """,
        ),
        (
            PAIR_OF_POINTS,
            """
            empty.csv => holds no points
            header.csv => holds no points
            columns.csv => no coordinate columns
            words.csv => no three numbers
            two.csv => no coordinate columns
            ragged.csv => point 2
            nan.csv => not finite
            inf.csv => not finite
            bare.csv => no header
            short.csv => has 1
            mixed.csv => no coordinate columns
            twice.csv => landmark 1
            ijk.fcsv => coordinate system 'IJK'
            cut.mrk.json => not a Slicer markups file
            list.mrk.json => no coordinate columns
            other.mrk.json => missing 'markups'
            inch.mrk.json => inch
            world.mrk.json => coordinate system 'MNI'
            flat.mrk.json => a position of 2 numbers
            null.mrk.json => not a Slicer markups file
            none.mrk.json => holds no points
            deep.mrk.json => not a Slicer markups file
            nanpoint.mrk.json => not finite
            binary.csv => could not be read as text
            quote.csv => not a table
            folder => could not be read as text
            pipe.nii => neither a file nor a folder
            """,
        ),
        (
            REGISTER,
            """
            --initial {bad}/empty.h5 => could not be read
            --initial {bad}/cut.h5 => could not be read
            --initial {good}/forward.h5 => is not linear
            --initial {bad}/zero.tfm => singular
            --initial {bad}/huge.tfm => singular
            --initial {bad}/nan.tfm => could not be read
            --initial {bad}/plane.tfm => 2-D
            --initial {bad}/few.tfm => could not be read
            --initial sideways => does not exist
            --initial {bad}/folder => could not be read
            --fixed-mask {bad}/nomask.nii.gz => is empty
            --moving-mask {bad}/farmask.nii.gz => wholly outside
            --fixed-mask {bad}/cut.nii.gz => damaged
            --fixed-labels {good}/fixed_labels.nii.gz => Add --moving-labels
            --moving-points {good}/moving.csv => Add --fixed-points
            --fixed-labels {bad}/halves.nii.gz --moving-labels {good}/moving_labels.nii.gz => not whole numbers
            --fixed-labels {bad}/big_labels.nii.gz --moving-labels {good}/moving_labels.nii.gz => too large
            --guide-with-points => needs landmarks
            --method magic => no method 'magic'
            --method hsyn --option size=published => no weights
            --device toaster => device 'toaster'
            --device cuda:99 => cuda:99
            --spacing -2 => spacing is -2
            --spacing 0 => spacing is 0
            --spacing nan => spacing is nan
            --spacing inf => spacing is inf
            --spacing two => invalid float value
            --initial none --spacing 0.001 => --spacing 0.001 makes
            --threads 0 => threads is 0
            --threads 1000000000 => threads is 1000000000
            --threads 1.5 => invalid int value
            --memory 0 => memory_gb is 0
            --memory -1 => memory_gb is -1
            --memory nan => memory_gb is nan
            --seed -1 => seed is -1
            --seed 99999999999999999999 => seed is 99999999999999999999
            --seed x => invalid int value
            --refine -1 => refine is -1
            --refine 9999999 => refine is 9999999
            --uncertainty 1 => uncertainty is 1
            --uncertainty -3 => uncertainty is -3
            --uncertainty 1000000 => uncertainty is 1000000
            --preset slow => there is no preset
            --similarity taste => invalid choice
            --transform-format exe => invalid choice
            --composite --transform-format nrrd => composite
            --option speed => not NAME=VALUE
            --option =3 => not NAME=VALUE
            --porridge => unrecognized arguments
            extra => unrecognized arguments
            --job {bad}/job_cut.json => Give one of them
            """,
        ),
        (
            "",
            """
            register {fixed} => missing: MOVING
            register => missing: FIXED
            register {fixed} {moving} => missing: -o DIR
            register {fixed} {moving} -o {fixed} => is a file
            register {fixed} {moving} -o {fixed}/below => cannot be written
            register {fixed} {moving} -o {bad}/pipe.nii => is a file
            register {fixed} {moving} -o /proc/nothing => cannot be written
            register {bad}/far.nii.gz {moving} -o {out} --initial none --preset fast => do not overlap
            porridge => invalid choice
            apply => required
            methods extra => unrecognized arguments
            """,
        ),
        (
            JOB,
            """
            unknown.json => unknown field 'speed'
            missing.json => has no 'moving'
            type.json => 'fixed' in the job must be text
            options.json => must be an object
            option.json => unknown field 'colour'
            option_type.json => must be a whole number
            option_bool.json => must be a whole number
            option_nan.json => spacing is nan
            option_inf.json => spacing is inf
            preset.json => preset is 'slow'
            null.json => must be text
            list.json => must be a JSON object
            text.json => must be a JSON object
            nul.json => the path of fixed
            blank.json => the path of fixed is ''
            long.json => cannot be opened
            nul_output.json => the path of output
            blank_output.json => the path of output is ''
            surrogate.json => not written in UTF-8
            format.json => transform_format is 'exe'
            method_options.json => must be an object
            composite.json => must be true or false
            cut.json => is not JSON
            empty.json => is not JSON
            deep.json => is not JSON
            binary.json => is not JSON
            number.json => is not JSON
            gone.json => does not exist
            """,
        ),
        ("register --job ", "{bad}/folder => is a folder\n{bad}/pipe.nii => neither a file"),
        (
            NETWORK,
            """
            empty.safetensors => not a complete safetensors file
            text.safetensors => not a complete safetensors file
            trap.safetensors => not a complete safetensors file
            torch_zip.safetensors => not a complete safetensors file
            cut.safetensors => not a complete safetensors file
            flipped.safetensors => SHA-256 differs
            flipped_header.safetensors => flipped_header.safetensors
            other_hash.safetensors => SHA-256 differs
            no_hash.safetensors => SHA-256 differs
            card_text.safetensors => not readable JSON
            card_list.safetensors => not readable JSON
            card_deep.safetensors => not readable JSON
            long_header.safetensors => not a complete safetensors file
            nan.safetensors => NaN or infinite
            nameless.safetensors => does not say of which method
            another.safetensors => weights of caml
            stranger.safetensors => weights of porridge
            size.safetensors => no size 'gigantic'
            switch.safetensors => porridge
            switch_list.safetensors => damaged header
            switch_text.safetensors => is not JSON
            switch_huge.safetensors => is 'x'
            missing.safetensors => is missing
            extra.safetensors => is not part of it
            shape.safetensors => should be
            gone.safetensors => does not exist
            folder.safetensors => no weights file
            """,
        ),
        (
            REGISTER + "--method hsyn --weights {net} ",
            """
            --option porridge=3 => porridge
            --option size=[1] => size is [1]
            --option size=published => of size small, not published
            --option finest=7 => finest is 7
            """,
        ),
        (
            "train -o {out} ",
            """
            --iterations 3 => required: --method
            --method magic => no network 'magic'
            --method syn => no network 'syn'
            --method hsyn --size gigantic => no size 'gigantic'
            --method hsyn --option porridge=3 => porridge
            --method hsyn --shape 32,32 => shape is
            --method hsyn --shape 4,4,4 => shape is
            --method hsyn --shape a,b,c => not a list of numbers
            --method hsyn --shape 33,32,32 --spacing 8 => try --shape
            --method hsyn --spacing nan => spacing is nan
            --method hsyn --spacing inf => spacing is inf
            --method hsyn --batch 0 => batch is 0
            --method hsyn --iterations 0 => iterations is 0
            --method hsyn --iterations many => invalid int value
            --method hsyn --minutes -1 => minutes is -1
            --method hsyn --hours 1 --minutes 1 => Give one of them
            --method hsyn --learning-rate 0 => learning-rate is 0
            --method hsyn --learning-rate inf => learning-rate is inf
            --method hsyn --rate wild => invalid choice
            --method hsyn --ema 1 => ema is 1
            --method hsyn --stages 1,-1,1 => stages is
            --method hsyn --stages 0,0,0 => stages is
            --method hsyn --shapes 2 => shapes is 2
            --method hsyn --real nan => real is nan
            --method hsyn --dice-weight -1 => dice-weight is -1
            --method hsyn --dice-weight nan => dice-weight is nan
            --method hsyn --published-weight 0 --supervised 0 => nothing is left to train on
            --method hsyn --validation-pairs 0 => validation-pairs is 0
            --method hsyn --device toaster => device 'toaster'
            --method hsyn --threads 0 => threads is 0
            --method hsyn --threads 99999999 => threads is 99999999
            --method hsyn --memory 0 => memory-gb is 0
            --method hsyn --seed -1 => seed is -1
            --method hsyn --start {bad}/flipped.safetensors => SHA-256 differs
            --method caml --start {net} => weights of hsyn
            --method hsyn --start {bad}/gone.safetensors => does not exist
            --method hsyn --labels {bad}/gone => does not exist
            --method hsyn --labels {bad}/folder => holds no label map
            """,
        ),
        (
            TRAIN + "--data ",
            """
            {bad}/gone => does not exist
            {bad}/folder => holds no scan
            {bad}/pipe.nii => neither a file nor a folder
            {bad}/mixed => sub-2.nii.gz
            {bad}/t_empty.csv => neither a column 'image'
            {bad}/t_columns.csv => neither a column 'image'
            {bad}/t_unknown.csv => unknown columns: colour
            {bad}/t_gone.csv => gone.nii.gz' does not exist
            {bad}/t_split.csv => split is 'maybe'
            {bad}/t_header.csv => t_header.csv
            {bad}/t_one.csv => no pair
            {bad}/t_same.csv => no pair
            {bad}/t_half.csv => line 2: moving is empty
            {bad}/t_binary.csv => could not be read as text
            {bad}/t_wide.csv => is not a table
            {scans} --validation 2 => validation is 2
            {scans} --validation nobody => names 'nobody'
            """,
        ),
        ("train --method hsyn --iterations 3 -o ", "{fixed} => cannot be written\n{fixed}/below => cannot be written"),
        (
            "batch -o {out} {bad}/",
            """
            gone.csv => does not exist
            pipe.nii => neither a file nor a folder
            b_empty.csv => is empty
            b_head.csv => no rows
            b_columns.csv => unknown column 'one'
            b_no_moving.csv => no column 'moving'
            b_unknown.csv => unknown column 'colour'
            b_blank.csv => line 2
            b_gone.csv => gone.nii' does not exist
            b_twice.csv => line 3
            b_case.csv => line 3
            b_up.csv => line 2
            b_root.csv => line 2
            b_dots.csv => line 2
            b_hidden.csv => line 2
            b_nul.csv => b_nul.csv
            b_back.csv => line 2
            b_long.csv => line 2
            b_many.csv => line 2
            b_header_twice.csv => moving
            b_quote.csv => not CSV
            b_labels.csv => line 2
            b_method.csv => magic
            b_initial.csv => sideways
            b_cut.csv => cut off
            b_pipe.csv => neither a file nor a folder
            b_huge.csv => declares
            b_wide.csv => not CSV
            b_binary.csv => b_binary.csv
            folder => holds no scan
            """,
        ),
        (
            "batch {scans} -o {out} ",
            """
            --workers 0 => --workers is '0'
            --workers many => --workers is 'many'
            --timeout 0 => --timeout is 0
            --timeout nan => --timeout is nan
            --to {bad}/gone.nii => does not exist
            --to-mask {fixed} => without --to
            --suffix T9w => T9w
            --pairs some => invalid choice
            --seed -1 => seed is -1
            --spacing inf => spacing is inf
            """,
        ),
        (
            "batch {good}/pairs.csv -o {out} ",
            """
            --scheduler nowhere => nowhere
            --pairs all => is for folders
            --suffix T1w => is for folders
            --save-table {tmp}/x.csv => is for folders
            --device toaster => device 'toaster'
            --method hsyn --weights {bad}/cut.safetensors => not a complete safetensors file
            """,
        ),
        ("batch {good}/pairs.csv -o ", "{fixed} => fixed.nii.gz\n{fixed}/below => fixed.nii.gz"),
        (
            "group {scans} -o {out} ",
            """
            --method syn => required: --to
            --to {bad}/gone.nii => does not exist
            --to {bad}/cut.nii.gz => cut off
            --to {fixed} --intensities loud => invalid choice
            """,
        ),
        (
            "group --to {fixed} -o {out} ",
            """
            {bad}/gone => does not exist
            {bad}/folder => holds no scan
            {bad}/b_unknown.csv => unknown column
            """,
        ),
        (
            "propagate {fixed} -o {out} ",
            """
            --fusion magic => invalid choice
            --atlas {moving} => expected 2 arguments
            --atlas {moving} {bad}/gone.nii => does not exist
            --atlas {bad}/pipe.nii {good}/moving_labels.nii.gz => neither a file nor a folder
            --atlases {bad}/b_empty.csv => is empty
            --atlases {bad}/b_unknown.csv => column
            --seed 0 => atlas
            """,
        ),
        (
            DEMO,
            "extra => unrecognized arguments\n--preset slow => invalid choice\n--seed -1 => seed is -1\n--seed x => "
            "invalid int",
        ),
        ("demo -o ", "{fixed} => is a file\n{fixed}/below => cannot be written"),
    ):
        yield from _lines(prefix, text)


TRANSFORMS = """
empty.h5 => could not be read
text.h5 => could not be read
cut.h5 => could not be read
head.h5 => could not be read
text.tfm => could not be read
few.tfm => could not be read
words.tfm => could not be read
nan.tfm => could not be read
kind.tfm => could not be read
nan.h5 => not finite
nan_field.nrrd => not finite
plane.tfm => 2-D
two.nrrd => not a displacement grid
vector.mha => not a displacement grid
huge_field.nii => cut off
huge_field.nrrd => declares
cut_field.nii => cut off
checksum.nrrd => checksum
folder => is a folder
pipe.nii => neither a file nor a folder
gone.h5 => does not exist
"""
CASES = list(_cases())
