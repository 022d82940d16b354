"""The files of a new workspace, as `moa init` writes them. No code.

pipeline.yaml becomes dvc.yaml: DVC would take a file of that name here for a pipeline of this repository.
"""
