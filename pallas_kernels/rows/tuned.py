"""How rows are laid on the card. Not measured: what the latency and the L2 cache of an H100 ask for."""
import dataclasses

CHUNK = 512  # bytes: 16 of each lane of a warp
FLIGHT = 8  # loads of 16 bytes a thread has under way: 32 registers of 64
CACHED = 20 << 20  # bytes of the rows read again and again that stay in an L2 cache of 50 MB beside what streams through


@dataclasses.dataclass(frozen=True)
class Tuning:
    chunks: int  # of a row that a warp takes: its segment
    rows: int = 1  # that a warp takes


def pick(job) -> Tuning:
    """For a `kernel.Job`. A token's row is read once for each of its experts, far apart in time: all rows of one segment
    come before the next segment, and the segment is as narrow as keeps those of all tokens in L2."""
    needed = -(-job.row_bytes // CHUNK)
    if job.op == "gather_sum":
        return Tuning(min(needed, max(1, FLIGHT // job.choices)))
    fitting = next((n for n in (4, 2) if n * CHUNK * job.addressed <= CACHED), 1)
    chunks = min(fitting, 1 << (needed - 1).bit_length())
    loads = 2 if job.op == "weighted_backward" else 1
    return Tuning(chunks, FLIGHT // (chunks * loads))
