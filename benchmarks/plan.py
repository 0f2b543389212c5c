"""How long a run will take, reckoned before it starts, and what of it fits a time limit.

Every row is estimated from its floor at the ceilings just measured and from what a row does. What they do not tell of
this machine now, a probe does: on a busy one a call's threads wait for each other after every kernel, whatever its
size. The constants were measured on two cores.
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
from .schema import OURS, Ceilings
from .suites import Settings

# A call takes its floor over this share, and beside it, for a forward pass of 12 blocks, what lies between kernels.
SHARE, CALL_SECONDS = 0.7, 0.005
BLOCKS, KERNELS, TRAINING = 12, 5, 3  # of that pass; an op is one kernel; a training step is three passes
PROBED = "vit_tiny_patch16_224"
CREATE_SECONDS = 0.06  # of the probed model, in one thread
SUBJECT_SECONDS, SIDE_SECONDS = 2e-8, 1e-8  # a parameter: a model drawn at random and moved; a peer built of it
CASE_SECONDS = 0.5
COMPILE_SECONDS = 5.0  # of a peer that compiles or converts
DOUBLE = 2.0  # float64 over float32
INTERPRETED_FLOPS_PER_S = 2.6e8  # in one thread
REPORT_SECONDS = 4.0  # pictures and a page
# A limit is for a machine that gets busy after the start: the rows must fit when they take this much longer.
MARGIN = 1.25


@dataclass(frozen=True)
class Pace:
    """What is to be added to the constants here and now. wait: seconds a forward pass beyond CALL_SECONDS; python: how
    many times as long everything takes that is not a call."""

    wait: float = 0.0
    python: float = 1.0


@dataclass
class Plan:
    """Seconds by a case's id, of the rows that will be measured and of those left out; after: seconds of what follows
    the rows; sides: the most that a row has; compiling: what is compiled for a GPU is not in the estimate."""

    rows: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)
    after: float = 0.0
    sides: int = 0
    compiling: bool = False

    @property
    def seconds(self) -> float:
        return sum(self.rows.values()) + self.after


def concerns(peer: Peer, case: Case) -> bool:
    """Whether the peer has anything like the case: who has not is not even absent."""
    return case.op in peer.ops and peer.kind != "model" if case.op else peer.kind != "op"


def make(settings: Settings, cases: Iterable[Case], ceilings: Ceilings, spent: float, pace: Pace) -> Plan:
    """The plan for these of the settings' cases, in order of worth, when `spent` seconds of the time limit are gone.

    Left out is, on a CPU with a time limit, every row that would not fit beside those before it and what follows the
    rows; the first row is always measured, so that running again makes headway. On a GPU nothing is: what compiling
    takes there nobody knows, and the rows that a limit cuts off are the last ones in any case.
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
        sides = [OURS, *(n for n in settings.peers if _takes_part(PEERS[n], case, settings.device))]
        truth = (case.dtype, case.mode)
        seconds = _row_seconds(case, sides, settings, ceilings, pace, photos, not same_model, truth in known)
        if on_cpu and seconds > left and plan.rows:
            plan.left_out[case.id] = round(seconds, 1)
            continue
        left -= seconds
        plan.rows[case.id] = seconds
        plan.sides = max(plan.sides, len(sides))
        model, truths = (None if case.op else (case.model, case.img_size)), known | {truth}
    return plan


def _takes_part(peer: Peer, case: Case, device: str) -> bool:
    return concerns(peer, case) and not absent(peer, case, device)


def _photographs(settings: Settings) -> int:
    return 6 if settings.images.startswith("random") else max(1, len(images.find_images(settings.photos)))


def _call_seconds(case: Case, ceilings: Ceilings, wait: float = 0.0) -> float:
    passes = (1 / KERNELS if case.op else case.config.depth) / BLOCKS * (TRAINING if case.mode == "training" else 1)
    rates = roofline.rates(ceilings, SHORT[case.dtype])
    return roofline.floor(case, rates) / SHARE + passes * (CALL_SECONDS + wait)


def _row_seconds(
    case: Case,
    sides: list[str],
    settings: Settings,
    ceilings: Ceilings,
    pace: Pace,
    photos: int,
    new_model: bool,
    truth_known: bool,
) -> float:
    call, n = _call_seconds(case, ceilings, pace.wait), len(sides)
    chunks = 1 if case.op else math.ceil(photos / case.batch)
    # Each runs once, is checked, and twice for its memory; ours also tells the classes of the photographs.
    seconds = call * (n * (chunks + 3) + chunks)
    if not truth_known:  # in float64, and in the case's dtype
        double = DOUBLE * 4 / case.dtype.itemsize
        seconds += call * (1 + double) * (1 if case.op else photos / case.batch)
    config = case.config
    parameters = 0 if case.op else config.depth * config.embed_dim**2 * (4 + 2 * config.mlp_ratio)
    set_up = CASE_SECONDS + parameters * (n * SIDE_SECONDS + new_model * SUBJECT_SECONDS)
    timed = timing.interleave_seconds(call, n, settings.seconds, settings.device)
    if settings.device.startswith("cuda"):  # eager, by a CUDA graph, and the host
        timed += timed + max(timing.HOST_SHARE * settings.seconds, timing.HOST_CALLS * n * call)
    else:
        set_up += COMPILE_SECONDS * sum(PEERS[name].compiles for name in sides if name != OURS)
    return seconds + pace.python * set_up + timed


def probe(settings: Settings, ceilings: Ceilings) -> Pace:
    """Create a small model and call it a few times, in the dtype of the first case. On a GPU, where neither is what a
    run waits for, nothing is measured."""
    if settings.device.startswith("cuda"):
        return Pace()
    case = replace(settings.cases[0], model=PROBED, batch=1, mode="inference", op="", img_size=None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # how fast Python is, not how long threads wait for each other
    fastvit.create_model(PROBED)  # what is imported at first
    created = min(_seconds(lambda: fastvit.create_model(PROBED)) for _ in range(3))
    torch.set_num_threads(threads)
    model = fastvit.create_model(PROBED).to(case.dtype).eval()
    image = torch.zeros(1, 3, *case.config.img_size, dtype=case.dtype)
    with torch.inference_mode():
        model(image)
        call = statistics.median(_seconds(lambda: model(image)) for _ in range(5))
    return Pace(max(0.0, call - _call_seconds(case, ceilings)), max(1.0, created / CREATE_SECONDS))


def _seconds(call: Callable[[], object]) -> float:
    time.sleep(timing.PAUSE_SECONDS)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
