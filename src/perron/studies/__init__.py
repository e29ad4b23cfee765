"""Studies: trainings or kernels beside each other, one file a study. Needs perron[train]."""

__all__ = ["STUDIES"]

# Where the study of a name is, so that it is imported only where it is asked for.
STUDIES = {
    "images": "perron.studies.images:Images",
    "graphs": "perron.studies.graphs:Graphs",
    "kernels": "perron.studies.kernels:Kernels",
    "depth": "perron.studies.depth:Depth",
}
