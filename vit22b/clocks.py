"""Clock and power of the GPUs while something runs, as nvidia-smi tells them.

A GPU at its power limit lowers its clock, and with it the rate of its matmuls: without the clock, two measurements of
the same code cannot be compared.
"""

import os
import statistics
import subprocess
import threading
from types import TracebackType

COMMAND = (
    *("nvidia-smi", "--query-gpu=clocks.sm,power.draw,clocks_throttle_reasons.active"),
    *("--format=csv,noheader,nounits", "-lms", "100"),
)
START_SECONDS = 10.0  # nvidia-smi's first line takes about one


class ClockSampler:
    """`with ClockSampler() as clocks:` samples every 100 ms while the block runs; `clocks.figures()` is for afterwards.

    Without nvidia-smi, or without a command, the block runs all the same and the figures are None. Where several GPUs
    are visible, the figures are of all of them together.
    """

    def __init__(self, command: tuple[str, ...] | None = COMMAND) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._command = [*(command or ()), *(("-i", visible) if visible else ())]
        self._runs = command is not None
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._first = threading.Event()
        self._samples: list[tuple[float, float, int]] = []

    def __enter__(self) -> "ClockSampler":
        if not self._runs:
            return self
        try:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            return self
        self._thread.start()
        self._first.wait(START_SECONDS)
        return self

    def restart(self) -> None:
        """Forgets what was sampled so far."""
        self._samples.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                clock, power, reasons = line.split(",")
                self._samples.append((float(clock), float(power), int(reasons, 16)))
            except ValueError:  # '[N/A]', or a message
                continue
            self._first.set()
        self._first.set()  # ended, perhaps without a line

    def figures(self) -> dict[str, float | str | None]:
        """Medians 'sm_clock_mhz' and 'power_w'; 'throttle_reasons': all of NVML's bits that were set, as hex."""
        samples = list(self._samples)
        if not samples:
            return {"sm_clock_mhz": None, "power_w": None, "throttle_reasons": None}
        clocks, powers, reasons = zip(*samples, strict=True)
        every = 0
        for bits in reasons:
            every |= bits
        return {
            "sm_clock_mhz": statistics.median(clocks),
            "power_w": statistics.median(powers),
            "throttle_reasons": hex(every),
        }
