"""Studies: several trainings or kernels beside each other. Needs perron[train]."""
