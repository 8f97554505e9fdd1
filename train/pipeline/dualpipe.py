"""DualPipe and DualPipeV: the order of one rank, in the eight steps of the published algorithm (V3 §3.2.1, figure 5).

DualPipe feeds micro-batches from both ends; rank r holds stage r and stage PP-1-r, so each stage stands twice. In the
eyes of a rank phase 0 is the direction that enters at its nearer end, phase 1 the other. DualPipeV is one half of
DualPipe, folded: rank r holds stages r and 2R-1-r, phase 0 goes down, phase 1 comes back up, and nothing stands twice.

DeepSeek-AI, DualPipe, https://github.com/deepseek-ai/DualPipe, 2025.
Sea AI Lab, DualPipe could be better without the Dual, https://sail.sea.com/blog/articles/63, 2025.
"""
from __future__ import annotations

from collections import Counter, deque

from train.pipeline.op import Entry, Op, Pair


def eight_steps(distance: int, half: int, n: int, phases: tuple[tuple[int, int], tuple[int, int]]) -> list[Entry]:
    """The list of a rank `distance` steps from the near end of a pipe that is folded at `half`.

    n: micro-batches of a phase, at least `half`; phases: (chunk, direction) of phase 0 and of phase 1.
    """
    order: list[Entry] = []
    weights: deque[Op] = deque()
    count = Counter()

    def new(kind: str, phase: int) -> Op:
        chunk, direction = phases[phase]
        count[kind[0], phase] += 1
        return Op(kind, chunk, count[kind[0], phase] - 1, direction)

    def F(*in_phases):
        order.extend(new("F", phase) for phase in in_phases)

    def B(phase, zero_bubble=False):
        order.append(new("Bi" if zero_bubble else "B", phase))
        if zero_bubble:
            weights.append(order[-1]._replace(kind="W"))

    def W():
        order.append(weights.popleft())

    def FB(forward, backward):
        order.append(Pair(new("F", forward), new("B", backward)))

    ramp, depth = half - 1 - distance, distance + 1
    for _ in range(2 * ramp):  # 1: fill
        F(0)
    for _ in range(depth):  # 2: both phases
        F(0, 1)
    for _ in range(ramp):  # 3: phase 1 turns round; W fills the wait for its next forward
        B(1, zero_bubble=True)
        W()
        F(1)
    for i in range(n - 2 * half + depth):  # 4: the steady state, all overlapped
        if i == 0 and ramp == 0:  # in the middle the first pair is not overlapped: its neighbour waits for F0 alone
            F(0)
            B(1)
        else:
            FB(0, 1)
        FB(1, 0)
    for _ in range(ramp):  # 5: phase 0 has no forward left
        B(1)
        FB(1, 0)
    for i in range(2 * depth):  # 6: backwards alone; from the middle of the step on W is put off
        B((i + 1) % 2, zero_bubble=i >= depth)
    for _ in range(ramp):  # 7: the W put off fill the wait for dx
        W()
        B(0, zero_bubble=True)
    while weights:  # 8: depth of them
        W()
    return order
