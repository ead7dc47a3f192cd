"""Who makes this extension and where it lives: TO BE FILLED IN BY ITS OWNER, here and nowhere else first.

A test compares these lines with CMakeLists.txt, Resources/SymRegistration.json and the module's texts, and says
which of them has to follow; a catalog of extensions reads those files as plain text, so they cannot take the
values from here.
"""

#: Names and institutions, as the module's help shows them and EXTENSION_CONTRIBUTORS lists them.
CONTRIBUTORS = ("SymRegistration contributors",)
#: Web address of the repository, without a slash at the end.
REPOSITORY = "https://github.com/SymRegistration/SlicerSymRegistration"
#: Branch that pictures and documentation are read from.
BRANCH = "main"
#: What to cite, as the README says it.
CITATION = (
    f"SymRegistration: symmetric deformable registration for 3D Slicer. {REPOSITORY}; and the publication of the "
    "method, which the panel names under Method."
)


def documentation():
    """Web address of the module's documentation."""
    return f"{REPOSITORY}/blob/{BRANCH}/SymRegistration/README.md"
