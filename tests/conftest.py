"""What every test runs under: no network but the base, no telemetry, toy models on one thread."""

import os

os.environ.update(HF_HUB_OFFLINE="1", DO_NOT_TRACK="1", DVC_NO_ANALYTICS="1", MLFLOW_DISABLE_TELEMETRY="true",
                  PREFECT_SERVER_ANALYTICS_ENABLED="false")

import torch

torch.set_num_threads(1)   # toy tensors: a second thread only waits
