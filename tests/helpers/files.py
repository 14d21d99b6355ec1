"""Saved files with another content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, safe_open, save_file

from rvae_fast import serialization


def rewrite(path: Path, change: Any) -> None:
    """Change a saved file's document and tensors in place and sign it anew: an intact file with other content."""
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["rvae_fast"])
    tensors = load_file(path)
    change(document, tensors)
    text = json.dumps(document)
    save_file(tensors, path, {"rvae_fast": text, "sha256": serialization._digest(text, tensors)})
