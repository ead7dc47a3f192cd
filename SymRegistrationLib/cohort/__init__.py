"""Many scans: tables of pairs, workers, clusters, templates, atlases."""
