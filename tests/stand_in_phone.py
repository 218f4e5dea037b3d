"""A folder that plays a phone: an `adb` and runners that really run, on this machine."""

import sys
from pathlib import Path

_ADB = """\
#!/bin/sh
# what is /data/local/tmp there is $PHONE/tmp here
there() { printf '%s' "$1" | sed "s#/data/local/tmp#$PHONE/tmp#g"; }
gone() { echo "adb: device '$1' not found" >&2; exit 1; }
echo "$*" >> "$PHONE/log"
if [ "$1" = devices ]; then
    echo "List of devices attached"
    [ -f "$PHONE/unplugged" ] || cat "$PHONE/devices"
    echo
    exit 0
fi
serial=$2; shift 2
[ -f "$PHONE/unplugged" ] && gone "$serial"
case "$1" in
push)
    if [ -f "$PHONE/full" ]; then
        cat "$2" > /dev/full || { echo "adb: error: failed to copy '$2'" >&2; exit 1; }
    fi
    cp "$2" "$(there "$3")" || exit 1
    [ -f "$PHONE/damaging" ] && printf x >> "$(there "$3")"
    exit 0 ;;
shell)
    shift
    sh -c "$(there "$*")"
    code=$?
    [ -f "$PHONE/unplugged" ] && gone "$serial"
    exit $code ;;
esac
"""

_RUNNER = """\
import re, sys, time
flags = dict(re.fullmatch("--([a-z_]+)=(.*)", word).groups() for word in sys.argv[1:])
model, inputs = open(flags["model_path"], "rb"), flags["inputs"].split(",")
contents = [open(name, "rb").read() for name in inputs]
{make_run}
log = lambda text: print("I 00:00:00.000000 executorch:executor_runner.cpp:1] " + text,
                         file=sys.stderr)
log("Model loaded in %f ms." % 1.25)
count = int(flags["num_executions"])
for number in range(count):
    start = time.perf_counter()
    run()
    log("Iteration %d of %d: %f ms" % (number + 1, count, (time.perf_counter() - start) * 1e3))
print("OutputX 0: tensor(...)")
"""

_SLEEPS = "run = lambda: time.sleep({} / 1e3)"

_EXECUTORCH = """\
import torch
from executorch.extension.pybindings import _portable_lib
program = _portable_lib._load_program(flags["model_path"])
method = program.load_method(flags["method_name"])
meta = method.method_meta()
kinds = {4: torch.int64, 6: torch.float32}
tensors = []
for index, content in enumerate(contents):
    info = meta.input_tensor_meta(index)
    kind = kinds[info.dtype()]
    tensor = torch.frombuffer(bytearray(content), dtype=kind).reshape(info.sizes())
    tensors.append(tensor)
run = lambda: method(tensors)
"""


class StandInPhone:
    """A phone with nothing on it, attached as "P1"; `bin` must be first in PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "phone", folder / "bin"
        (self.folder / "tmp").mkdir(parents=True)
        self.bin.mkdir()
        self.attached("P1\tdevice")
        _write_program(self.bin / "adb", _ADB)

    def attached(self, *rows: str) -> None:
        """Says what `adb devices` lists."""
        (self.folder / "devices").write_text("".join(f"{row}\n" for row in rows))

    def become(self, state: str) -> None:
        """Makes it "unplugged", "full" or "damaging"."""
        (self.folder / state).touch()

    @property
    def files(self) -> list[str]:
        """What lies on it."""
        return sorted(str(path) for path in (self.folder / "tmp").rglob("*"))

    @property
    def log(self) -> str:
        """Every call of adb."""
        return (self.folder / "log").read_text()


def sleeping_runner(path: Path, ms: float = 2.0) -> Path:
    """Writes a runner that keeps the contract; its graphs take `ms`."""
    make_run = _SLEEPS.format(ms)
    return _write_program(path, f"#!{sys.executable}\n" + _RUNNER.format(make_run=make_run))


def executorch_runner(path: Path) -> Path:
    """Writes a runner that keeps the contract and runs the graphs with ExecuTorch."""
    return _write_program(path, f"#!{sys.executable}\n" + _RUNNER.format(make_run=_EXECUTORCH))


def shell_runner(path: Path, script: str) -> Path:
    """Writes a runner that does what a shell script says."""
    return _write_program(path, f"#!/bin/sh\n{script}\n")


def _write_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path
