"""This folder on sys.path, for the helpers that lie beside the tests (simulated)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
