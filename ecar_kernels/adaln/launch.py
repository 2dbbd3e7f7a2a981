"""Launch settings of the adaLN family's Triton kernels.

The rules are arithmetic about registers, threads and the chip's size; none was measured.
"""

from dataclasses import dataclass, replace

# A100 108, H100 132, B200 148, RTX 5090 170: enough programs for one are about enough for all.
MULTIPROCESSORS = 128
MAX_WIDTH = 8192


@dataclass(frozen=True)
class ForwardSettings:
    """rows: held by a program at once. early: all is read before the first reduction."""

    rows: int
    num_warps: int
    early: bool

    @property
    def max_registers(self) -> int:
        """Of a thread: what there is. Left alone, ptxas spills a few to fit one more program."""
        return min(255, 65536 // (32 * self.num_warps))

    @property
    def loads(self) -> dict[str, int]:
        """The kernel's constants that say when it reads."""
        return {"EARLY": self.early}


@dataclass(frozen=True)
class BackwardSettings(ForwardSettings):
    """program_rows: done by a program one after the other, `rows` at once, where it sums them.

    prefetch: the next of them are copied to shared memory while a program does these; nothing is
    then early. fused: gated_residual_adaln's is one launch, not those of its two halves.
    """

    program_rows: int
    prefetch: bool
    fused: bool

    @property
    def max_registers(self) -> int:
        """Where shared memory holds what comes next: those of two programs of 8 warps. Of rows of
        at most 512 channels Triton 3.6 and 3.9 would spill a few on sm_100 and sm_120: those of
        three of 4 warps."""
        wide = self.rows == 1 and self.num_warps >= 4
        most = 255 if not self.prefetch else 128 if wide else 168
        return min(super().max_registers, most)

    @property
    def loads(self) -> dict[str, int]:
        return {"EARLY": self.early and not self.prefetch, "STAGES": 1 + self.prefetch}

    def unsummed(self) -> "BackwardSettings":
        """Where a program does `rows` rows and no others."""
        return replace(self, program_rows=self.rows, prefetch=False)


# A program sums up to 64 partial sums of 64 channels (256 contiguous bytes of each) at a time:
# few enough columns for a wide grid, and 16 loads in flight a thread.
SUM = ForwardSettings(rows=64, num_warps=8, early=True)
SUM_COLUMNS = 64


def padded(channels: int) -> int:
    """The columns that a program holds: a power of two, as Triton has it."""
    return max(16, 1 << (channels - 1).bit_length())


def _rows_at_once(channels: int, rows: int) -> int:
    # A narrow row has not enough bytes to fill 4 warps: 1024 values are 8 a thread, 16 bytes in
    # the 16-bit types. But first every multiprocessor gets a row.
    fit = max(1, 1024 // padded(channels))
    share = max(1, rows // MULTIPROCESSORS)
    return min(fit, 1 << (share.bit_length() - 1))


def _warps(values: int, per_thread: int) -> int:
    # 16 at most: with 32, a thread has 64 registers, and few programs share a multiprocessor.
    return min(16, max(1, values // (32 * per_thread)))


def default(
    op: str, channels: int, rows: int, arch: int, aligned: bool = True
) -> ForwardSettings | BackwardSettings:
    """For `rows` tokens of all images; op: a name of the family, or that + "_backward".

    aligned: all rows begin at multiples of 16 bytes, as far as their strides say (those of an odd
    width do not). One rule for every op and, but for the widest rows' backward, every `arch`.
    """
    at_once = _rows_at_once(channels, rows)
    # 8 values a thread: one load of 16 bytes from each 16-bit tensor, two from a float32 one.
    num_warps = _warps(at_once * padded(channels), 8)
    wide = padded(channels) > 4096
    if not op.endswith("_backward"):
        # Beyond 4096 columns there are 16 values a thread, too many to hold of all inputs.
        return ForwardSettings(at_once, num_warps, early=not wide)
    # Two programs a multiprocessor hide each other's loads. More rows each make the partial sums,
    # written and read in float32, fewer; past 32 they no longer matter, and a longer chain of
    # additions only loses digits.
    program_rows = min(32, max(4, rows // (2 * MULTIPROCESSORS)))
    # With 8 warps a thread has 255 registers, with 16 it has 128: then a row is read as it is
    # needed. Of 16 values a thread, three sums alone would take 48.
    early = num_warps <= 8
    aligned &= channels % 16 == 0  # else nothing can be copied to shared memory
    if not aligned or (wide and arch >= 120):
        # With 16 warps more registers in all go to addresses and the like: Triton 3.6 spills the
        # widest on sm_120, and both do where each value is loaded by itself, from 2049 columns on.
        num_warps = min(8, num_warps)
    # Six float32 rows of 2048 columns are 48 KiB, of which sm_120's 100 hold two programs', and of
    # 4096 columns one's. Two wide rows in turn would take too much.
    prefetch = aligned and not wide and program_rows > at_once
    return BackwardSettings(
        at_once,
        num_warps,
        early=early,
        program_rows=max(at_once, program_rows),
        prefetch=prefetch,
        fused=not wide,
    )


def candidates(
    op: str, channels: int, rows: int, arch: int
) -> list[ForwardSettings | BackwardSettings]:
    """What is worth measuring: half to twice the values a thread, sums of 4 to 32 rows, and when
    they are read."""
    usual = default(op, channels, rows, arch)
    values = usual.rows * padded(channels)
    warps = sorted({_warps(values, per_thread) for per_thread in (4, 8, 16)})
    if not isinstance(usual, BackwardSettings):
        return [replace(usual, num_warps=w) for w in warps]
    program_rows = sorted({max(usual.rows, n) for n in (4, 8, 16, 32)})
    when = [(False, False), (True, False), *([(usual.early, True)] if usual.prefetch else [])]
    return [
        replace(usual, num_warps=w, program_rows=n, early=early, prefetch=prefetch)
        for w in warps
        for n in program_rows
        for early, prefetch in when
    ]
