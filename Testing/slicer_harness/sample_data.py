"""``SampleData`` for the imitation: what modules register, checked as Slicer checks it."""

from __future__ import annotations

import slicer


class SampleDataSource:
    """One entry: as many file names, node names and so on as addresses, or it is refused."""

    def __init__(
        self,
        sampleName=None,
        uris=None,
        fileNames=None,
        nodeNames=None,
        checksums=None,
        loadFiles=None,
        customDownloader=None,
        thumbnailFileName=None,
        loadFileTypes=None,
    ):
        given = {
            "fileNames": fileNames,
            "nodeNames": nodeNames,
            "checksums": checksums,
            "loadFiles": loadFiles,
            "loadFileTypes": loadFileTypes,
        }
        if isinstance(uris, str):
            uris, given = [uris], {name: [value] for name, value in given.items()}
        optional = ("checksums", "loadFiles", "loadFileTypes", "nodeNames")
        given = {
            name: [None] * len(uris) if value is None and name in optional else value for name, value in given.items()
        }
        if any(len(value) != len(uris) for value in given.values()):
            raise ValueError(f"all fields of a sample data source need the same length: {uris}, {given}")
        self.sampleName, self.sampleDescription, self.uris = sampleName, sampleName, uris
        self.customDownloader, self.thumbnailFileName = customDownloader, thumbnailFileName
        vars(self).update(given)

    def __eq__(self, other):
        return isinstance(other, SampleDataSource) and str(vars(self)) == str(vars(other))


class SampleDataLogic:
    def __init__(self):
        for name in ("MRBrainTumor1", "MRBrainTumor2"):
            self.registerCustomSampleDataSource(
                "General", name, f"https://data.invalid/{name}", f"{name}.nrrd", name, checksums=f"SHA256:{name}"
            )

    @staticmethod
    def registerCustomSampleDataSource(
        category="Custom",
        sampleName=None,
        uris=None,
        fileNames=None,
        nodeNames=None,
        customDownloader=None,
        thumbnailFileName=None,
        loadFileTypes=None,
        loadFiles=None,
        checksums=None,
    ):
        entries = _sources().setdefault(category, [])
        source = SampleDataSource(
            sampleName,
            uris,
            fileNames,
            nodeNames,
            checksums,
            loadFiles,
            customDownloader,
            thumbnailFileName,
            loadFileTypes,
        )
        if source not in entries:
            entries.append(source)

    @staticmethod
    def sampleDataSourcesByCategory(category=None):
        return _sources() if category is None else _sources().get(category, [])

    def sourceForSampleName(self, sampleName):
        return next((s for entries in _sources().values() for s in entries if s.sampleName == sampleName), None)

    def downloadFileIntoCache(self, uri, name, checksum=None, forceDownload=False):
        raise OSError("tests download nothing")

    def loadNode(self, uri, name, fileType=None, fileProperties=None):
        raise OSError("tests download nothing")

    def downloadFromSource(self, source):
        """Loads every file; a custom downloader is not asked."""
        return [
            self.loadNode(self.downloadFileIntoCache(uri, file, checksum), name)
            for uri, file, name, checksum in zip(source.uris, source.fileNames, source.nodeNames, source.checksums)
        ]


def _sources():
    if not hasattr(slicer.modules, "sampleDataSources"):
        slicer.modules.sampleDataSources = {}
    return slicer.modules.sampleDataSources


NAMES = {cls.__name__: cls for cls in (SampleDataSource, SampleDataLogic)}
