"""Federated tuning: what a federation agrees on, its rounds, and its transport."""

import os

# Flower reads these when it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
