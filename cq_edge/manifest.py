"""The bundle format's only definition: `manifest.json`, written, read and checked.

A bundle is a folder. Its manifest is one JSON object, `format_version` first, that names every
file of the bundle by its relative path with its size and SHA-256. A reader refuses what it does
not know: a newer version, an unknown key, a file outside the folder.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Self, get_args, get_origin, get_type_hints

from cq_edge.errors import BundleError, CQEdgeError, OutputExistsError
from cq_edge.noise_scheduler import NAMES, NoiseScheduleConfig

FORMAT_VERSION = 8
MANIFEST_FILE = "manifest.json"
EXACT_PARITY_DB = 200.0
"""Stands for a graph that equals its float module bit for bit: JSON has no infinity."""

TOKEN_INPUTS = ("input_ids", "input_ids_2")
"""Of the encode graph, one for each tokenizer."""

GUIDANCES = ("two_calls", "embedded", "none")
_EMPTY_PROMPTS = ("encoded", "zeros")
_DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8")
_HASH_CHUNK_BYTES = 1 << 20
_LARGEST_FLOAT = 2**1023
_JSON_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph's input or output: its name, its static shape, its element type."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        """Refuses a tensor that no graph can have."""
        if not self.name:
            raise BundleError("a tensor needs a name: this one's is empty")
        if any(size < 1 for size in self.shape):
            shape = list(self.shape)
            raise BundleError(f"tensor {self.name} has shape {shape}: every size must be 1 or more")
        if self.dtype not in _DTYPES:
            allowed = ", ".join(_DTYPES)
            raise BundleError(
                f'tensor {self.name} has dtype "{self.dtype}": it must be one of {allowed}'
            )


@dataclass(frozen=True, slots=True)
class GraphEntry:
    """One exported program and what its check found.

    Attributes:
        file: Relative path of the file, or of the `.mlpackage` folder, that holds the program.
        method: The program's name in it.
        backend: Engine and delegate it was made for: "xnnpack" or "coreml".
        inputs: In call order.
        outputs: In return order.
        parity_db: Smallest signal-to-error ratio against the float module over the checked
            inputs and all outputs, dB; infinity becomes `EXACT_PARITY_DB`.
        parity_floor_db: The ratio below which the build would have failed, dB.
        delegated_macs_share: Share of the multiply-adds inside the delegate, 0 to 1; Core ML
            takes programs whole.
        delegated_ops_share: Share of the operators inside the delegate, 0 to 1.
    """

    file: str
    method: str
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity_db: float
    parity_floor_db: float
    delegated_macs_share: float
    delegated_ops_share: float

    def __post_init__(self) -> None:
        """Refuses shares and ratios that mean nothing."""
        if self.parity_db == math.inf:
            object.__setattr__(self, "parity_db", EXACT_PARITY_DB)
        for name in ("parity_db", "parity_floor_db"):
            if not math.isfinite(getattr(self, name)):
                raise BundleError(f"{name} is {getattr(self, name)}: it must be a number of dB")
        for name in ("delegated_macs_share", "delegated_ops_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise BundleError(f"{name} is {getattr(self, name)}: a share lies in 0 to 1")


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Shape of one picture's latents: channels, height and width in latent cells."""

    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        """Refuses an empty shape."""
        _require_positive(channels=self.channels, height=self.height, width=self.width)


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Size of the decoded picture in pixels."""

    height: int
    width: int

    def __post_init__(self) -> None:
        """Refuses an empty picture."""
        _require_positive(height=self.height, width=self.width)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What `generate` does unless told otherwise."""

    noise_scheduler: str
    steps: int
    guidance_scale: float
    full_steps: int

    def __post_init__(self) -> None:
        """Refuses defaults that no run could follow."""
        _require_noise_scheduler(self.noise_scheduler)
        _require_positive(steps=self.steps, full_steps=self.full_steps)
        if not math.isfinite(self.guidance_scale):
            raise BundleError(f"guidance_scale is {self.guidance_scale}: it must be a number")


@dataclass(frozen=True, slots=True)
class TokenizerEntry:
    """Where the CLIP vocabulary lies and how a prompt is framed."""

    vocab: str
    merges: str
    max_length: int = 77
    bos_token: str = "<|startoftext|>"
    eos_token: str = "<|endoftext|>"
    pad_token: str = "<|endoftext|>"

    def __post_init__(self) -> None:
        """Refuses a length that holds no prompt."""
        if self.max_length < 3:
            raise BundleError(f"max_length is {self.max_length}: it must be 3 or more")


@dataclass(frozen=True, slots=True)
class ReuseTableEntry:
    """Where a reuse table lies and what it was measured on."""

    file: str
    noise_scheduler: str
    steps: int

    def __post_init__(self) -> None:
        """Refuses a table of a noise scheduler that nobody can run."""
        _require_noise_scheduler(self.noise_scheduler)
        _require_positive(steps=self.steps)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and SHA-256 (64 lower-case hexadecimal digits) of a file."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Refuses what no file can have."""
        if self.bytes < 0:
            raise BundleError(f"bytes is {self.bytes}: it must be 0 or more")
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise BundleError(f'sha256 is "{self.sha256}": it must be 64 lower-case hex digits')


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a bundle says about itself.

    Attributes:
        name: Of the model, for people.
        cq_edge_version: Of the program that built it.
        latents: Shape that the `denoise` graphs work on.
        image_px: Size that the `decode` graph gives.
        guidance: "two_calls": batch 1, the unguided call first, then the guided one; "embedded":
            one call, which is told the scale (`guidance_scale`); "none": one call.
        empty_negative_prompt: Of two calls, what the first is told where there is no negative
            prompt: the empty prompt, "encoded", or "zeros" in place of it.
        graphs: By name: encode (where there are prompts), denoise, denoise_shallow, decode.
        noise_schedule: The noise schedule that the model was trained with.
        defaults: What `generate` does unless told otherwise.
        tokenizers: The vocabularies' files, one for each input of the encode graph.
        reuse_tables: One for each calibrated (noise scheduler, steps).
        alternatives: The same graphs, with the same inputs and outputs, for other backends, by
            backend.
        conditions: How it was built: versions, quantisation, machine.
        files: Every file of the folder but the manifest, by relative path; `write_manifest`
            fills it in.
    """

    name: str
    cq_edge_version: str
    latents: LatentShape
    image_px: ImageSize
    guidance: str = "two_calls"
    empty_negative_prompt: str = "encoded"
    graphs: Mapping[str, GraphEntry]
    noise_schedule: NoiseScheduleConfig
    defaults: Defaults
    tokenizers: tuple[TokenizerEntry, ...]
    reuse_tables: tuple[ReuseTableEntry, ...] = ()
    alternatives: Mapping[str, Mapping[str, GraphEntry]] = field(default_factory=dict)
    conditions: Mapping[str, str | int | float] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses guidance that this version cannot run and paths that leave the folder."""
        _require_one_of("guidance", self.guidance, GUIDANCES)
        _require_one_of("empty_negative_prompt", self.empty_negative_prompt, _EMPTY_PROMPTS)
        ids = self.graphs["encode"].inputs if "encode" in self.graphs else ()
        if len(ids) != len(self.tokenizers):
            raise BundleError(
                f"there are {len(self.tokenizers)} tokenizers, and encode takes {len(ids)} inputs: "
                "there must be one for each"
            )
        for path in self.files:
            _require_inside(path, f'files["{path}"]')
        for where, path in self.references().items():
            _require_inside(path, where)
        for backend, graphs in self.alternatives.items():
            self._check_alternative(backend, graphs)

    def references(self) -> dict[str, str]:
        """Returns every path that the manifest mentions outside `files`, by its key."""
        paths = {f"graphs.{name}.file": graph.file for name, graph in self.graphs.items()}
        paths |= {
            f"alternatives.{backend}.{name}.file": graph.file
            for backend, graphs in self.alternatives.items()
            for name, graph in graphs.items()
        }
        for i, tokenizer in enumerate(self.tokenizers):
            paths[f"tokenizers[{i}].vocab"] = tokenizer.vocab
            paths[f"tokenizers[{i}].merges"] = tokenizer.merges
        paths |= {f"reuse_tables[{i}].file": t.file for i, t in enumerate(self.reuse_tables)}
        return paths

    def graph(self, name: str) -> GraphEntry:
        """Returns a graph's entry.

        Raises:
            BundleError: There is none of that name; the message lists those there are.
        """
        if name not in self.graphs:
            there_are = ", ".join(self.graphs) or "none"
            raise BundleError(f"the bundle has no graph {name}: it has {there_are}")
        return self.graphs[name]

    def branches(self, guidance_scale: float) -> int:
        """Returns how often a guided step runs its graph: twice only where that guides."""
        return 1 if self.guidance != "two_calls" or guidance_scale == 1 else 2

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that the bundle has graphs for, its first choice first."""
        first = {graph.backend: None for graph in self.graphs.values()}
        return (*first, *self.alternatives)

    def for_backend(self, backend: str) -> Self:
        """Returns the manifest as if the bundle had been built for this backend alone.

        Raises:
            BundleError: It has no graphs for it; the message lists those it has.
        """
        if backend in self.alternatives:
            return replace(self, graphs=self.alternatives[backend], alternatives={})
        if backend not in self.backends:
            has = " and ".join(self.backends)
            raise BundleError(
                f"the bundle has no graphs for {backend}: it has some for {has}; "
                "`cq-edge build --backend executorch,coreml` makes both"
            )
        return replace(self, alternatives={})

    def _check_alternative(self, backend: str, graphs: Mapping[str, GraphEntry]) -> None:
        """Refuses other graphs, or graphs of another shape, under the name of a backend."""
        if {graph.backend for graph in graphs.values()} - {backend}:
            raise BundleError(f"alternatives.{backend} holds a graph of another backend")
        if backend in {graph.backend for graph in self.graphs.values()}:
            raise BundleError(f'alternatives.{backend} is the backend of "graphs" already')
        if graphs.keys() != self.graphs.keys():
            listed, there_are = ", ".join(graphs), ", ".join(self.graphs)
            raise BundleError(f"alternatives.{backend} has {listed}: it must have {there_are}")
        for name, graph in graphs.items():
            if (graph.inputs, graph.outputs) != (
                self.graphs[name].inputs,
                self.graphs[name].outputs,
            ):
                raise BundleError(
                    f"alternatives.{backend}.{name} takes or returns something else than "
                    f"graphs.{name}: inputs and outputs must be the same"
                )

    def to_json(self) -> str:
        """Returns the text of `manifest.json`: `format_version` first, then the fields in order.

        Raises:
            BundleError: A condition is not a finite number.
        """
        for key, value in self.conditions.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise BundleError(f"conditions.{key} is {value}: JSON has finite numbers only")
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = MANIFEST_FILE) -> Self:
        """Returns the manifest that a text describes.

        Args:
            text: A JSON object.
            source: What to call it in messages.

        Raises:
            BundleError: Not JSON, another version, or a key that is unknown, missing, doubled or
                of the wrong type; the message names the key with its path.
        """
        content = parse_object(text, source)
        _check_version(content.pop("format_version", None), source)
        try:
            manifest: Self = decode(cls, content, "")
        except CQEdgeError as error:
            raise BundleError(f"{source}: {error}") from None
        for where, path in manifest.references().items():
            if not _is_listed(path, manifest.files):
                raise BundleError(f'{source}: {where} is "{path}", which "files" does not list')
        return manifest


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Writes `manifest.json` with the size and digest of every file that lies in the folder.

    Args:
        folder: Holds every file that the manifest mentions.
        manifest: Its `files` are ignored.

    Returns:
        The manifest as written, `files` filled in.

    Raises:
        OutputExistsError: The folder has a manifest.
        BundleError: A file that the manifest mentions is missing, or a link leaves the folder.
    """
    target = folder / MANIFEST_FILE
    if target.exists():
        raise OutputExistsError(f"{target} exists: delete it, or write to another folder")
    manifest = replace(manifest, files=_digest_folder(folder))
    for where, path in manifest.references().items():
        if not _is_listed(path, manifest.files):
            raise BundleError(f'{where} is "{path}", but {folder} has no such file')
    unfinished = target.with_suffix(".json.part")
    unfinished.write_text(manifest.to_json(), encoding="utf-8")
    unfinished.replace(target)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Returns a bundle's manifest; its files are there and have the size that it says.

    Raises:
        BundleError: The folder is no bundle, the manifest is wrong, or a file is missing,
            truncated or outside the folder. Contents are `verify_files`' matter.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST_FILE}; `cq-edge build` makes bundles"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    manifest = Manifest.from_json(text, source=str(path))
    for relative, entry in manifest.files.items():
        _check_size(folder, relative, entry)
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Reads every file of the manifest; returns if all are what was written.

    Raises:
        BundleError: A file is missing, truncated, changed or outside the folder.
    """
    for relative, entry in manifest.files.items():
        _check_size(folder, relative, entry)
        path = folder / relative
        try:
            found = file_sha256(path)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error}") from None
        if found != entry.sha256:
            raise BundleError(
                f"{path} was changed after the bundle was written (its sha256 differs): "
                "copy or build the bundle again"
            )


def _check_size(folder: Path, relative: str, entry: FileEntry) -> None:
    path = folder / relative
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        found = path.stat().st_size if path.is_file() else None
    except (OSError, RuntimeError) as error:  # e.g. a name too long, a loop of links
        raise BundleError(f"{path} cannot be read: {error}") from None
    if not inside:
        raise BundleError(f"{path} is a link out of the bundle: put the file itself there")
    if found is None:
        raise BundleError(f"{path} is missing: copy or build the bundle again")
    if found != entry.bytes:
        fault = "truncated" if found < entry.bytes else "too long"
        raise BundleError(
            f"{path} is {fault}: it has {found} bytes and the manifest says {entry.bytes}; "
            "copy or build the bundle again"
        )


def _is_listed(path: str, files: Mapping[str, FileEntry]) -> bool:
    """Returns whether a path is one of the files, or a folder that holds some."""
    return path in files or any(file.startswith(f"{path}/") for file in files)


def _digest_folder(folder: Path) -> dict[str, FileEntry]:
    entries = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if not path.is_file():
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"{path} is a link out of the bundle: put the file itself there")
        entries[relative] = FileEntry(path.stat().st_size, file_sha256(path))
    return entries


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise BundleError(f"{name} is {value}: it must be 1 or more")


def _require_one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        listed = " or ".join(json.dumps(each) for each in allowed)
        raise BundleError(f"{key} is {json.dumps(value)}: it must be {listed}")


def _require_noise_scheduler(name: str) -> None:
    if name not in NAMES:
        raise BundleError(f'noise_scheduler is "{name}": it must be one of {", ".join(NAMES)}')


def _require_inside(path: str, where: str) -> None:
    """Refuses a path that is not plainly relative, on any operating system."""
    parts = path.split("/")
    odd = any(char in "\\:\0" or "\ud800" <= char <= "\udfff" for char in path)
    if odd or any(part in ("", ".", "..") for part in parts):
        raise BundleError(
            f"{where} leaves the bundle or is no plain relative path ({json.dumps(path)}): "
            "write it as folder/file, without a drive, a leading slash or .."
        )


def parse_object(text: str, source: str) -> dict[str, Any]:
    """Returns the JSON object in a text; refuses doubled keys and NaN.

    Raises:
        BundleError: Says what stands there instead; `source` names the text.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            doubled = next(key for key in keys if keys.count(key) > 1)
            raise BundleError(f'{source}: key "{doubled}" stands twice in one object')
        return content

    def refuse_constant(constant: str) -> NoReturn:
        raise BundleError(f"{source}: {constant} is not JSON; numbers must be finite")

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise BundleError(f"{source} holds {_kind(content)}: it must hold an object")
    return content


def _check_version(version: object, source: str) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        found = "missing" if version is None else json.dumps(version)
        raise BundleError(f"{source}: format_version is {found}: it must be {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{source} was written by a newer cq-edge (format_version {version}; this one reads "
            f"{FORMAT_VERSION}): upgrade cq-edge"
        )
    if version < FORMAT_VERSION:
        raise BundleError(
            f"{source} was written by an older cq-edge (format_version {version}; this one reads "
            f"{FORMAT_VERSION}): build the bundle again"
        )


def decode(kind: Any, value: Any, path: str) -> Any:
    """Returns a JSON value as what a record's type asks for, the records in it too.

    Raises:
        BundleError: A key is unknown or missing, a value of another type, or not finite; `path`
            names the value.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(value, float) and not math.isfinite(value):
        raise BundleError(f"{path} is {value}: numbers must be finite")
    if is_dataclass(kind):
        return _decode_record(kind, _require(dict, value, path), path)
    if origin is tuple:
        items = _require(list, value, path)
        return tuple(decode(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(items))
    if origin is Mapping:
        content = _require(dict, value, path)
        return {key: decode(arguments[1], item, f"{path}.{key}") for key, item in content.items()}
    if origin is UnionType:
        if type(value) is int and int not in arguments and float in arguments:
            value = float(value)
        if isinstance(value, arguments) and not isinstance(value, bool):
            return value
        wanted = "null or a number" if NoneType in arguments else "a string or a number"
        raise BundleError(f"{path} is {_kind(value)}: it must be {wanted}")
    return _require(kind, value, path)


def _decode_record(kind: Any, content: dict[str, Any], path: str) -> Any:
    prefix = f"{path}." if path else ""
    known = [record.name for record in fields(kind)]
    for key in content:
        if key not in known:
            raise BundleError(f"key {prefix}{key} is unknown: known here are {', '.join(known)}")
    for key in known:
        if key not in content:
            raise BundleError(f"key {prefix}{key} is missing")
    types = get_type_hints(kind)
    values = {key: decode(types[key], item, f"{prefix}{key}") for key, item in content.items()}
    try:
        return kind(**values)
    except CQEdgeError as error:
        raise BundleError(f"{path}: {error}" if path else str(error)) from None


def _require(kind: type, value: Any, path: str) -> Any:
    """Returns a JSON value of a plain type; a whole number counts as a float."""
    if kind is float and type(value) is int and abs(value) < _LARGEST_FLOAT:
        value = float(value)
    if type(value) is not kind:
        wanted = _JSON_KINDS[kind]
        raise BundleError(f"{path} is {_kind(value)}: it must be {wanted}")
    return value


def _kind(value: object) -> str:
    """Returns a JSON value's type, with the value where it is short."""
    name = _JSON_KINDS[type(value)]
    return name if isinstance(value, dict | list) or value is None else f"{name} ({value!r})"
