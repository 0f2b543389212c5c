"""Estimates, before a run starts, of how long it will take, and which rows fit a time limit.

A row's time is estimated from its roofline bound at the peaks just measured and from the steps that a row consists of.
A probe then measures how busy the machine is: on a busy one a call's threads wait for each other after every kernel,
whatever its size. The constants were measured on two cores.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

import fastvit
from fastvit import images
from fastvit.verify import SHORT

from . import roofline, timing
from .cases import Case
from .peers import PEERS, Peer, absent
from .schema import OURS, Peaks
from .suites import Settings

# A call is taken to run at this fraction of its roofline bound, and to spend CALL_SECONDS between kernels in a forward
# pass of BLOCKS blocks of KERNELS kernels each; an op counts as one kernel, a training step as TRAINING passes.
SHARE, CALL_SECONDS = 0.7, 0.005
BLOCKS, KERNELS, TRAINING = 12, 5, 3
PROBED = "vit_tiny_patch16_224"
CREATE_SECONDS = 0.06  # to create the probed model, in one thread
SUBJECT_SECONDS, ENTRY_SECONDS = 2e-8, 1e-8  # for each parameter: to create a model; to build a peer from it
CASE_SECONDS = 0.5  # for each row, whatever its model
COMPILE_SECONDS = 5.0  # for each peer that compiles or converts
DOUBLE = 2.0  # how many times as long as float32 a call in float64 takes
INTERPRETED_FLOPS_PER_S = 2.6e8  # in one thread
REPORT_SECONDS = 4.0  # pictures and a page
# The machine may get busy after the start: the rows must fit the time limit even if they take this many times as long.
MARGIN = 1.25


@dataclass(frozen=True)
class Pace:
    """How much slower than the constants say this machine is now. wait: seconds a forward pass takes beyond
    CALL_SECONDS; python: by what factor everything that is not a call takes longer."""

    wait: float = 0.0
    python: float = 1.0


@dataclass
class Plan:
    """rows, left_out: estimated seconds by the id of each case that will be measured, and of each that is left out.
    after: seconds of what follows the rows. entries: the most that any row has. compiling: whether the time to compile
    for a GPU comes on top of the estimate."""

    rows: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)
    after: float = 0.0
    entries: int = 0
    compiling: bool = False

    @property
    def seconds(self) -> float:
        return sum(self.rows.values()) + self.after


def concerns(peer: Peer, case: Case) -> bool:
    """Whether the peer has the model or op of this case at all; if not, the row has no entry for it, not even
    "absent"."""
    return case.op in peer.ops and peer.kind != "model" if case.op else peer.kind != "op"


def make(settings: Settings, cases: Iterable[Case], peaks: Peaks, spent: float, pace: Pace) -> Plan:
    """The plan for these cases, the most important first, when `spent` seconds of the time limit are used up.

    On a CPU with a time limit, every row is left out that does not fit after the rows before it. The first row is
    always measured, so that every run makes progress. On a GPU no row is left out: how long compiling takes there is
    not known, and it is the last rows that the limit cuts off in any case.
    """
    on_cpu = not settings.device.startswith("cuda")
    plan = Plan(after=REPORT_SECONDS * pace.python, compiling=not on_cpu)
    photos = _photographs(settings)
    if settings.interpreted:
        one = Case(settings.interpreted, torch.bfloat16, photos)
        plan.after += pace.python * roofline.case_cost(one).flops / INTERPRETED_FLOPS_PER_S
    limit = math.inf if settings.time_limit is None else settings.time_limit
    left = (limit - spent - plan.after) / MARGIN
    model = truths = None
    for case in cases:
        same_model = (case.model, case.img_size) == model and not case.op
        known = truths if same_model else set()
        entries = [OURS, *(n for n in settings.peers if _takes_part(PEERS[n], case, settings.device))]
        truth = (case.dtype, case.mode)
        seconds = _row_seconds(case, entries, settings, peaks, pace, photos, not same_model, truth in known)
        if on_cpu and seconds > left and plan.rows:
            plan.left_out[case.id] = round(seconds, 1)
            continue
        left -= seconds
        plan.rows[case.id] = seconds
        plan.entries = max(plan.entries, len(entries))
        model, truths = (None if case.op else (case.model, case.img_size)), known | {truth}
    return plan


def _takes_part(peer: Peer, case: Case, device: str) -> bool:
    return concerns(peer, case) and not absent(peer, case, device)


def _photographs(settings: Settings) -> int:
    return 6 if settings.images.startswith("random") else max(1, len(images.find_images(settings.photos)))


def _call_seconds(case: Case, peaks: Peaks, wait: float = 0.0) -> float:
    passes = (1 / KERNELS if case.op else case.config.depth) / BLOCKS * (TRAINING if case.mode == "training" else 1)
    rates = roofline.rates(peaks, SHORT[case.dtype])
    return roofline.bound(case, rates) / SHARE + passes * (CALL_SECONDS + wait)


def _row_seconds(
    case: Case,
    entries: list[str],
    settings: Settings,
    peaks: Peaks,
    pace: Pace,
    photos: int,
    new_model: bool,
    truth_known: bool,
) -> float:
    call, n = _call_seconds(case, peaks, pace.wait), len(entries)
    chunks = 1 if case.op else math.ceil(photos / case.batch)
    # Each entry runs once, is checked, and runs twice for its memory; ours also classifies the photographs.
    seconds = call * (n * (chunks + 3) + chunks)
    if not truth_known:  # one pass in float64, one in the case's dtype
        double = DOUBLE * 4 / case.dtype.itemsize
        seconds += call * (1 + double) * (1 if case.op else photos / case.batch)
    config = case.config
    parameters = 0 if case.op else config.depth * config.embed_dim**2 * (4 + 2 * config.mlp_ratio)
    set_up = CASE_SECONDS + parameters * (n * ENTRY_SECONDS + new_model * SUBJECT_SECONDS)
    timed = timing.interleave_seconds(call, n, settings.seconds, settings.device)
    if settings.device.startswith("cuda"):  # timed again as a CUDA graph, and on the host
        timed += timed + max(timing.HOST_SHARE * settings.seconds, timing.HOST_CALLS * n * call)
    else:
        set_up += COMPILE_SECONDS * sum(PEERS[name].compiles for name in entries if name != OURS)
    return seconds + pace.python * set_up + timed


def probe(settings: Settings, peaks: Peaks) -> Pace:
    """Create a small model and call it a few times, in the dtype of the first case, to see how busy the machine is. On
    a GPU a run waits for neither, and nothing is measured."""
    if settings.device.startswith("cuda"):
        return Pace()
    case = replace(settings.cases[0], model=PROBED, batch=1, mode="inference", op="", img_size=None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that it measures Python, not threads waiting for each other
    fastvit.create_model(PROBED)  # the first call also imports
    created = min(_seconds(lambda: fastvit.create_model(PROBED)) for _ in range(3))
    torch.set_num_threads(threads)
    model = fastvit.create_model(PROBED).to(case.dtype).eval()
    image = torch.zeros(1, 3, *case.config.img_size, dtype=case.dtype)
    with torch.inference_mode():
        model(image)
        call = statistics.median(_seconds(lambda: model(image)) for _ in range(5))
    return Pace(max(0.0, call - _call_seconds(case, peaks)), max(1.0, created / CREATE_SECONDS))


def _seconds(call: Callable[[], object]) -> float:
    time.sleep(timing.PAUSE_SECONDS)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
