"""Each gate of the static report stops its planted flaw; an exception needs a reason and is needed."""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
from fastvit.benchmarks.static import allowed, read
from fastvit.benchmarks.static.gates import GATES, Allowed, findings, judge, unused
from fastvit.kernels.launch.hardware import ARCHS
from static_records import FLAWED, GOOD, ROOT


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_alone(gate):
    assert list(findings(FLAWED[gate])) == [gate] and not findings(GOOD)
    candidate = replace(FLAWED[gate], shipped=False)
    assert bool(judge([candidate], "3.6.0", ()).failures) == (gate in ("compile", "shared memory"))


@pytest.mark.parametrize(
    "record",
    [
        replace(GOOD, shared_bytes=232448),
        replace(GOOD, loop_loads_by_bits={128: 8, 32: 8}),
        replace(GOOD, loop_loads_by_bits={32: 7}),
        replace(GOOD, loop_loads_by_bits={32: 64}, dot=""),
        replace(GOOD, loop_loads_by_bits={32: 8}, loop={"UTMALDG": 8}),
        replace(GOOD, missed_fusions=7),
        replace(GOOD, tensor_core={}, dot="wide"),
        replace(GOOD, tensor_core={"HMMA": 4}, arch="sm_80"),
    ],
)
def test_what_is_still_good(record):
    assert not findings(record)


def test_an_exception_needs_a_reason_and_a_gate():
    for reason in ("", "   ", "known"):
        with pytest.raises(ValueError, match="expected a sentence"):
            Allowed("spill", reason)
    with pytest.raises(ValueError, match="gate is 'spills', expected one of compile, spill"):
        Allowed("spills", "for a good reason")


@pytest.mark.parametrize("field, other", [("arch", "sm_80"), ("triton", "3.9.*"), ("kernel", "gemm*"), ("case", "x")])
def test_an_exception_is_for_what_it_names_only(field, other):
    record = FLAWED["spill"]
    entry = Allowed("spill", "for a good reason", "sm_9?", "3.6.*", "kern*", "*se")
    assert not judge([record], "3.6.0", [entry]).failures and not unused([record], ["sm_90"], "3.6.0", [entry])
    elsewhere = replace(entry, **{field: other})
    assert judge([record], "3.6.0", [elsewhere]).failures
    assert judge([replace(record, spill_bytes=0, serialized=True)], "3.6.0", [entry]).failures


def test_an_exception_that_nothing_needs_is_found_by_a_run_that_covers_it():
    entry = Allowed("spill", "for a good reason", arch="sm_9?", triton="3.6.*")
    assert unused([GOOD], ["sm_90"], "3.6.0", [entry]) == [entry]
    assert unused([GOOD], ["sm_80"], "3.6.0", [entry]) == unused([GOOD], ["sm_90"], "3.9.0", [entry]) == []
    wider = replace(entry, arch="sm_*")
    assert unused([GOOD], ["sm_90"], "3.6.0", [wider]) == [] and unused([GOOD], ARCHS, "3.6.0", [wider]) == [wider]
    candidate = replace(FLAWED["spill"], shipped=False)
    assert unused([candidate], ["sm_90"], "3.6.0", [entry]) == [entry], "candidates need no exception"


def test_every_exception_is_judged_by_some_run():
    makefile = (ROOT / "Makefile").read_text()
    versions = re.search(r"^TRITONS := (.*)$", makefile, re.MULTILINE)[1].split()
    for entry in allowed.ALLOWED:
        assert any(fnmatchcase(version, entry.triton) for version in versions), entry
        assert any(fnmatchcase(arch, entry.arch) for arch in ARCHS), entry


@pytest.mark.parametrize(
    "lines, count",
    [
        (["mul.f32 %a, %x, %y", "add.f32 %b, %a, %z"], 0),  # ptxas fuses these
        (["mul.rn.f32 %a, %x, %y", "add.rn.f32 %b, %a, %z"], 1),
        (["mul.f32 %a, %x, %y", "selp.f32 %s, %a, 0f00000000, %p", "sub.f32 %b, %z, %s"], 1),
        (["mul.f32 %a, %x, %y", "selp.f32 %s, %a, 0f00000000, %p", "sub.f32 %b, %z, %s", "max.f32 %m, %s, %n"], 0),
        (["mul.f32 %a, %x, %y", "selp.f32 %s, %a, 0f00000000, %p", "st.shared.b32 [%r], %s"], 0),
        (["mul.f32 %a, %x, %y"], 0),
        (["ex2.approx.f32 %a, %x", "selp.f32 %s, %a, 0f00000000, %p", "add.f32 %b, %s, %z"], 0),
    ],
)
def test_missed_fusions_in_ptx(lines, count):
    assert read.missed_fusions("\n".join(f"\t{line};" for line in lines)) == count
