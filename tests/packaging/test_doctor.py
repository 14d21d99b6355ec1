"""`rvae_fast.doctor`: facts as data, and the reasons of what is missing."""

from __future__ import annotations

import importlib.metadata
import io
import json

import pytest
import torch

from rvae_fast import _backend, _native, doctor


def test_facts_are_plain_json_and_true():
    report = doctor.collect().to_dict()
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["torch"]["value"].startswith(torch.__version__)
    for name, reason in _backend.available_backends().items():
        assert report["backends"][name]["value"] == (reason or "available")
        assert (report["backends"][name]["status"] == "ok") == (reason is None)
    assert (report["native module"]["loaded"]["value"] == "yes") == _native.is_available()


def test_the_instruction_set_in_use_is_named(native: object):
    facts = doctor.collect().to_dict()["native module"]
    assert facts["CPU kernels use"]["value"].split()[0] in ("portable", "avx2", "avx512", "avx512bf16")
    bf16 = torch.ops.rvae_fast.cpu_has_bf16_products()
    assert facts["bf16 products"]["value"].startswith("yes" if bf16 else "no")
    amx = all("amx" in facts[name]["value"].split() for name in ("compiled for", "this CPU has"))
    assert ("on AMX" in facts["bf16 products"]["value"]) == (bf16 and amx)


def test_a_missing_extra_names_its_remedy_and_a_missing_requirement_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("pyarrow", "safetensors"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    report = doctor.collect()
    facts = {fact.name: fact for fact in report.facts}
    assert facts["pyarrow"].status == "off"
    assert "rvae-fast[data]" in facts["pyarrow"].value
    assert facts["safetensors"] in report.problems


def test_a_native_module_that_exists_and_cannot_be_used_is_a_problem(tmp_path, monkeypatch: pytest.MonkeyPatch):
    facts = {"built": False, "failed": True, "reason": "error: no member"}
    (tmp_path / _native._RECORD).write_text(json.dumps(facts))
    monkeypatch.setenv("RVAE_FAST_NATIVE_DIR", str(tmp_path))
    monkeypatch.setattr(_native, "_state", _native._state.__wrapped__)
    with pytest.warns(RuntimeWarning):
        report = doctor.collect()
    (fact,) = [f for f in report.problems if f.name == "native"]
    assert "error: no member" in fact.value


def test_both_renderings_show_every_fact():
    from rich.console import Console

    report = doctor.collect()
    plain = doctor.plain(report)
    out = io.StringIO()
    doctor.render(report, Console(file=out, width=400))
    for fact in report.facts:
        first = fact.value.splitlines()[0]
        assert first in plain
        assert first in out.getvalue()
