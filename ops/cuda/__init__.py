"""GPU kernels, one file per family as in `ops`: cost model, kernel factory, launch configuration."""
