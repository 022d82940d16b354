"""The files of a new workspace, as `moa init` writes them. No code."""
