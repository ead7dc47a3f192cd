# Packaging itself is Slicer's.
