"""Small files that ask their reader for much memory or time, by name."""

from __future__ import annotations

import gzip
import struct
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from tests.checkpoint.builders import (
    call,
    get,
    integer,
    integers,
    listing,
    mapping,
    named,
    pickled,
    put,
    reference,
    sequence,
    storage,
    string,
    tensor,
    write_safetensors,
    write_tar,
    write_torch_legacy,
    write_torch_zip,
    write_zip,
)

BOMBS: dict[str, Callable[[Path], object]] = {}


def bomb(write: Callable[[Path], object]) -> Callable[[Path], object]:
    BOMBS[write.__name__] = write
    return write


def _numbered(row: bytes, count: int) -> bytes:
    """The row once for each number below `count`, in the place of its %07d."""
    rows = np.tile(np.frombuffer(row % 0, np.uint8), (count, 1))
    first = row.index(b"%07d")
    for place in range(7):
        rows[:, first + place] += (np.arange(count) // 10 ** (6 - place) % 10).astype(np.uint8)
    return rows.tobytes()


@bomb
def pickle_with_a_memo_index_of_4_billion(path: Path) -> None:
    write_torch_zip(path, b"](" * 3 + put(0xFFFFFFFF) + b"t")


@bomb
def pickle_with_a_line_without_an_end(path: Path) -> None:
    write_torch_zip(path, b"I" + b"1" * (5 << 20))


@bomb
def pickle_with_a_long_number_as_text(path: Path) -> None:
    write_torch_zip(path, b"L" + b"1" * (1 << 20) + b"L\n")


@bomb
def pickle_with_an_integer_of_megabytes(path: Path) -> None:
    write_torch_zip(path, b"\x8b" + struct.pack("<I", 1 << 20) + b"\x7f" * (1 << 20))


@bomb
def pickle_with_long_wide_text(path: Path) -> None:
    raw = "😀".encode() + b"a" * (1 << 20)
    write_torch_zip(path, b"X" + struct.pack("<I", len(raw)) + raw)


@bomb
def pickle_with_long_escaped_text(path: Path) -> None:
    write_torch_zip(path, b"S'" + b"\\U0001f600" + b"a" * (1 << 20) + b"'\n")


@bomb
def nested_lists(path: Path) -> None:
    write_torch_zip(path, b"]" * 100_000 + b"a" * 99_999)


@bomb
def nested_dicts(path: Path) -> None:
    write_torch_zip(path, b"}K\x01" * 100_000 + b"N" + b"s" * 100_000)


@bomb
def nested_tuples_as_a_key(path: Path) -> None:
    write_torch_zip(path, b"}" + b"N" + b"\x85" * 100_000 + b"Ns")


@bomb
def nested_records(path: Path) -> None:
    write_torch_zip(path, reference("a", "b") + b"q\x00)R" + b"\x85h\x00\x85R" * 100)


@bomb
def nested_calls(path: Path) -> None:
    """What is called is itself the result of a call, and its name is asked for in an error."""
    write_torch_zip(path, reference("a", "b") + b")R" * 100_000 + b"NR")


@bomb
def nested_subclasses(path: Path) -> None:
    rebuild = reference("torch._tensor", "_rebuild_from_type_v2")
    depth = 20_000
    args = b"(h\x00N" * depth + b")" + b"Nt" * depth
    write_torch_zip(path, rebuild + b"q\x00" + args + b"R")


@bomb
def subclasses_of_subclasses(path: Path) -> None:
    rebuild = reference("torch._tensor", "_rebuild_from_type_v2")
    again = rebuild + b"(" + reference("torch._utils", "_rebuild_parameter") + b"N("
    wrapper = call(reference("torch._utils", "_rebuild_wrapper_subclass"))
    depth = 5000
    write_torch_zip(path, named(w=again * depth + wrapper + b"t}tR" * depth, v=tensor()))


def _twice(index: int, kind: bytes) -> bytes:
    return b"(" + get(index) * 2 + kind


@bomb
def lists_that_hold_each_other_twice(path: Path) -> None:
    body = b"]" + put(0) + b"".join(b"0" + _twice(n, b"l") + put(n + 1) for n in range(60))
    write_torch_zip(path, named(state_dict=mapping((string("w"), tensor()), (string("x"), body))))


@bomb
def lists_of_tensors_that_hold_each_other_twice(path: Path) -> None:
    body = tensor() + put(0) + b"".join(b"0" + _twice(n, b"l") + put(n + 1) for n in range(60))
    write_torch_zip(path, named(state_dict=mapping((string("w"), tensor()), (string("x"), body))))


@bomb
def dicts_that_hold_each_other_twice(path: Path) -> None:
    levels = (
        b"0}(" + string("a") + get(n) + string("b") + get(n) + b"u" + put(n + 1) for n in range(60)
    )
    body = tensor() + put(0) + b"".join(levels)
    write_torch_zip(path, named(state_dict=mapping((string("w"), tensor()), (string("x"), body))))


def _tuples(deep: int = 60) -> bytes:
    return b")" + put(0) + b"".join(b"0" + get(n) * 2 + b"\x86" + put(n + 1) for n in range(deep))


@bomb
def tuples_that_hold_each_other_twice_as_a_key(path: Path) -> None:
    write_torch_zip(path, named(state_dict=mapping((_tuples(), tensor()))))


@bomb
def tuples_that_hold_each_other_twice_called(path: Path) -> None:
    write_torch_zip(path, _tuples() + b"NR")


@bomb
def tuples_that_hold_each_other_twice_as_a_storage(path: Path) -> None:
    write_torch_zip(path, _tuples() + b"Q")


@bomb
def tuples_that_hold_each_other_twice_as_a_persistent_id(path: Path) -> None:
    write_torch_zip(path, sequence(string("storage"), _tuples(), _tuples(5)) + b"Q")


@bomb
def tuples_that_hold_each_other_twice_as_a_size(path: Path) -> None:
    rebuild = reference("torch._utils", "_rebuild_tensor")
    write_torch_zip(path, call(rebuild, storage(), integer(0), _tuples(), _tuples()))


@bomb
def tuples_that_hold_each_other_twice_as_hyper_parameters(path: Path) -> None:
    keyed = mapping((_tuples(), b"N"))
    write_torch_zip(path, named(hyper_parameters=keyed, state_dict=named(w=tensor())))


@bomb
def lists_that_hold_each_other_twice_as_hyper_parameters(path: Path) -> None:
    body = b"]" + put(0) + b"".join(b"0" + _twice(n, b"l") + put(n + 1) for n in range(60))
    write_torch_zip(path, named(hyper_parameters=named(x=body), state_dict=named(w=tensor())))


@bomb
def tuples_that_hold_each_other_twice_as_a_module_key(path: Path) -> None:
    state = named(
        _parameters=mapping((_tuples(), tensor()), (string("w"), tensor())),
        _buffers=b"}",
        _modules=b"}",
    )
    write_torch_zip(path, reference("a", "Module") + b")R" + state + b"b")


@bomb
def tuples_that_hold_each_other_twice_as_a_legacy_key(path: Path) -> None:
    write_torch_legacy(path, named(w=tensor()), keys=listing(_tuples()))


@bomb
def lists_that_hold_each_other_twice_as_a_legacy_version(path: Path) -> None:
    write_torch_legacy(path, named(w=tensor()))
    data = path.read_bytes()
    body = b"]" + put(0) + b"".join(b"0" + _twice(n, b"l") + put(n + 1) for n in range(60))
    start = data.index(b".") + 1
    path.write_bytes(data[:start] + pickled(body) + data[data.index(b".", start) + 1 :])


@bomb
def one_list_copied_many_times(path: Path) -> None:
    long = b"(" + b"N" * 50_000 + b"l" + put(0) + b"0"
    kind = reference("builtins", "set") + put(1) + b"0"
    write_torch_zip(path, long + kind + b"(" + (get(1) + get(0) + b"\x85R") * 20_000 + b"l")


@bomb
def one_text_encoded_many_times(path: Path) -> None:
    long = string("a" * 200_000) + put(0) + b"0"
    encode = reference("_codecs", "encode") + put(1) + b"0" + string("latin1") + put(2) + b"0"
    unit = get(1) + get(0) + get(2) + b"\x86R"
    write_torch_zip(path, long + encode + b"(" + unit * 20_000 + b"l")


@bomb
def one_file_of_bytes_made_a_list(path: Path) -> None:
    raw = b"B" + struct.pack("<I", 5 << 20) + bytes(5 << 20)
    write_torch_zip(path, call(reference("builtins", "list"), raw))


@bomb
def one_size_checked_many_times(path: Path) -> None:
    long = b"(" + b"K\x01" * 50_000 + b"t" + put(0) + b"0"
    size = reference("torch", "Size") + put(1) + b"0"
    write_torch_zip(path, long + size + b"(" + (get(1) + get(0) + b"\x85R") * 200_000 + b"l")


@bomb
def one_argument_list_used_many_times(path: Path) -> None:
    long = b"(" + b"N" * 50_000 + b"t" + put(0) + b"0"
    wrapper = reference("torch._utils", "_rebuild_wrapper_subclass") + put(1) + b"0"
    write_torch_zip(path, long + wrapper + b"(" + (get(1) + get(0) + b"R") * 200_000 + b"l")


@bomb
def one_state_given_to_many_subclasses(path: Path) -> None:
    pairs = b"".join(b"X\x05\x00\x00\x00%05dN" % n for n in range(10_000))
    state = b"}(" + pairs + b"u" + put(0) + b"0"
    wrapped = sequence(reference("torch._utils", "_rebuild_wrapper_subclass"), b"N", b")", get(0))
    rebuild = reference("torch._tensor", "_rebuild_from_type_v2") + put(2) + b"0"
    unit = get(2) + get(1) + b"R"
    write_torch_zip(path, state + wrapped + put(1) + b"0" + rebuild + b"(" + unit * 50_000 + b"l")


@bomb
def one_long_key_above_many_tensors(path: Path) -> None:
    inner = b"(" + tensor() + put(0) + get(0) * 20_000 + b"l"
    write_torch_zip(path, named(state_dict=mapping((string("a" * 200_000), inner))))


@bomb
def one_module_name_above_many_tensors(path: Path) -> None:
    def module(parameters: bytes, modules: bytes) -> bytes:
        state = named(_parameters=parameters, _buffers=b"}", _modules=modules)
        return reference("a", "Module") + b")R" + state + b"b"

    names = b"".join(string(str(n)) + get(0) for n in range(20_000))
    inner = module(tensor() + put(0) + b"0}(" + names + b"u", b"}")
    write_torch_zip(path, module(b"}", mapping((string("m" * 200_000), inner))))


def _keys_above_many_tensors(path: Path, key: bytes) -> None:
    inner = b"}(" + b"".join(string(str(n)) + get(0) for n in range(20_000)) + b"u"
    nested = (b"}" + get(1)) * 100 + inner + b"s" * 100
    start = tensor() + put(0) + b"0" + key + put(1) + b"0"
    write_torch_zip(path, start + mapping((string("w"), get(0)), (string("nested"), nested)))


@bomb
def long_numbers_as_keys_above_many_tensors(path: Path) -> None:
    _keys_above_many_tensors(path, b"L" + b"9" * 4000 + b"L\n")


@bomb
def long_tuples_as_keys_above_many_tensors(path: Path) -> None:
    _keys_above_many_tensors(path, sequence(*[string("k" * 64)] * 16))


@bomb
def a_long_name_of_a_section(path: Path) -> None:
    write_torch_zip(path, mapping((string("s" * 1_000_000), named(w=tensor()))))


def _many_modules(path: Path, start: bytes, **state: bytes) -> None:
    """Modules that share what none of them has a tensor in."""
    parts = {"_parameters": b"}", "_buffers": b"}", "_modules": b"}"} | state
    module = reference("a", "Module") + b")R" + named(**parts) + b"b"
    children = b"}(" + b"".join(string(str(n)) + module for n in range(2000)) + b"u"
    top = {**parts, "_parameters": named(w=tensor()), "_modules": children}
    write_torch_zip(path, start + reference("a", "Module") + b")R" + named(**top) + b"b")


@bomb
def modules_that_share_many_names_of_buffers(path: Path) -> None:
    names = b"](" + b"".join(string(str(n)) for n in range(20_000)) + b"e"
    _many_modules(path, names + put(0) + b"0", _non_persistent_buffers_set=get(0))


@bomb
def modules_that_share_many_parameters_without_a_name(path: Path) -> None:
    numbers = b"}(" + b"".join(integer(n) + b"N" for n in range(20_000)) + b"u"
    _many_modules(path, numbers + put(0) + b"0", _parameters=get(0))


@bomb
def script_modules_of_many_buffers_that_are_none(path: Path) -> None:
    module = reference("__torch__", "A") + b")R}b"
    body = reference("__torch__", "A") + b")R" + named(w=tensor()) + b"b" + put(0) + b"0"
    modules = b"".join(string(str(n)) + module for n in range(2000))
    body = body + get(0) + b"}(" + string("w") + tensor() + modules + b"ub"
    names = b"".join(b'"%d",' % n for n in range(20_000))
    entries = {
        "a/data.pkl": pickled(body),
        "a/constants.pkl": pickled(b")"),
        "a/code/__torch__.py": b"class A(Module):\n  __buffers__ = [" + names + b'"w"]\n',
        "a/data/0": bytes(16),
    }
    write_zip(path, entries)


@bomb
def one_subclass_with_many_attributes_listed_many_times(path: Path) -> None:
    numbers = b"}(" + b"".join(integer(n) + b"N" for n in range(20_000)) + b"u"
    rebuild = reference("torch._tensor", "_rebuild_from_type_v2")
    wrapper = reference("torch._utils", "_rebuild_wrapper_subclass")
    one = rebuild + sequence(wrapper, b"N", b")", numbers) + b"R" + put(0) + b"0"
    write_torch_zip(
        path, one + mapping((string("w"), tensor()), (string("l"), b"](" + get(0) * 50_000 + b"e"))
    )


@bomb
def many_sections_around_one_long_list(path: Path) -> None:
    known = ["state_dict", "model_state_dict", "model_state", "model", "module", "net"]
    known += ["network", "weights", "params", "ema"]
    body = b"(" + b"N" * 50_000 + b"l" + put(0) + b"0"
    body += b"}(" + b"".join(string(f"k{n}") + get(0) for n in range(5000)) + b"u" + put(1)
    for level in range(1, 4):
        pairs = b"".join(string(name) + get(level) for name in known)
        extra = b"".join(string(f"x{n}") + b"N" for n in range(2000))
        body += b"0}(" + pairs + extra + b"u" + put(level + 1)
    write_torch_zip(path, body)


@bomb
def wide_below_deep(path: Path) -> None:
    wide = b"(" + b"]" * 20_000 + b"l"
    write_torch_zip(path, named(state_dict=b"(" * 100 + wide + b"l" * 100))


@bomb
def keys_that_hash_alike(path: Path) -> None:
    prime = (1 << 61) - 1
    pairs = b"".join(integer(prime * n) + b"N" for n in range(1, 20_000))
    write_torch_zip(path, named(state_dict=named(w=tensor()), x=b"}(" + pairs + b"u"))


@bomb
def keys_that_hash_alike_as_pairs(path: Path) -> None:
    prime = (1 << 61) - 1
    pairs = b"".join(integer(prime * n) + b"N\x86" for n in range(1, 20_000))
    ordered = call(reference("collections", "OrderedDict"), b"(" + pairs + b"l")
    write_torch_zip(path, named(state_dict=named(w=tensor()), x=ordered))


@bomb
def tensors_of_terabytes(path: Path) -> None:
    write_torch_zip(path, named(w=tensor((1 << 40,), (0,))))


@bomb
def many_tensors_of_a_gigabyte(path: Path) -> None:
    pairs = ((string(f"w{n}"), tensor((1 << 20, n), (0, 0))) for n in range(1, 1000))
    write_torch_zip(path, mapping(*pairs))


@bomb
def tensor_at_an_offset_of_4300_digits(path: Path) -> None:
    """So far off that Python does not print where it ends."""
    rebuild = reference("torch._utils", "_rebuild_tensor_v2")
    offset = b"L" + b"9" * 4300 + b"L\n"
    sizes = integers((2, 2)), integers((2, 1))
    write_torch_zip(path, named(w=call(rebuild, storage(), offset, *sizes, b"\x89", b"}")))


@bomb
def tensor_with_a_stride_of_4300_digits(path: Path) -> None:
    rebuild = reference("torch._utils", "_rebuild_tensor_v2")
    strides = sequence(integer(2), b"L" + b"9" * 4300 + b"L\n")
    sizes = integers((2, 2)), strides
    write_torch_zip(path, named(w=call(rebuild, storage(), integer(0), *sizes, b"\x89", b"}")))


@bomb
def tensor_of_impossible_dimensions(path: Path) -> None:
    write_torch_zip(path, named(w=tensor([1 << 61] * 64, [0] * 64)))


@bomb
def tensor_of_a_million_dimensions(path: Path) -> None:
    rebuild = reference("torch._utils", "_rebuild_tensor")
    sizes, strides = (b"(" + step * 100_000 + b"t" for step in (b"K\x01", b"K\x00"))
    write_torch_zip(path, named(w=call(rebuild, storage(), integer(0), sizes, strides)))


@bomb
def legacy_views_of_one_storage(path: Path) -> None:
    numel = 1 << 20

    def view(index: int) -> bytes:
        return (
            sequence(
                string("storage"),
                reference("torch", "FloatStorage"),
                string("0"),
                string("cpu"),
                integer(numel),
                sequence(string(str(index)), integer(index), integer(numel - index)),
            )
            + b"Q"
        )

    pairs = ((string(str(n)), tensor((numel - n,), (1,), of=view(n))) for n in range(1000))
    write_torch_legacy(path, mapping(*pairs), {"0": bytes(4 * numel)})


@bomb
def zip_of_many_entries(path: Path) -> None:
    count = 20_000
    central = struct.Struct("<4s6H3L5H2L")
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 3, 0)
    with path.open("wb") as file:
        names = [struct.pack(">I", n)[1:] for n in range(count)]
        file.write(b"".join(local + name for name in names))
        offset, nbytes = file.tell(), 0
        for n, name in enumerate(names):
            row = (b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 33 * n)
            nbytes += file.write(central.pack(*row) + name)
        file.write(
            struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, nbytes, offset)
        )
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, offset + nbytes, 1))
        file.write(
            struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, nbytes, 0xFFFFFFFF, 0)
        )


@bomb
def deflated_storage(path: Path) -> None:
    body = named(w=tensor((20 << 20,), (1,), of=storage("0", 20 << 20)))
    write_torch_zip(path, body, {"0": bytes(80 << 20)}, compression=zipfile.ZIP_DEFLATED)


@bomb
def deflated_pickle(path: Path) -> None:
    write_torch_zip(path, b"]" * (80 << 20), compression=zipfile.ZIP_DEFLATED)


@bomb
def gzipped_zeros(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=6) as file:
        for _ in range(80):
            file.write(bytes(1 << 20))


@bomb
def tar_with_a_huge_pax_header(path: Path) -> None:
    info = tarfile.TarInfo("model_weights.ckpt")
    info.pax_headers = {"comment": "x" * (2 << 20)}
    write_tar(path, [(info, b"")])


@bomb
def tar_with_many_pax_records(path: Path) -> None:
    records = b"6 a=b\n" * 2700
    info = tarfile.TarInfo("./PaxHeaders/x")
    info.type = tarfile.XHDTYPE
    info.size = len(records)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    padding = bytes(-len(records) % 512)
    path.write_bytes((header + records + padding) * 200 + bytes(1024))


@bomb
def tar_with_many_pax_headers(path: Path) -> None:
    with path.open("wb") as file:
        for part in range(100):
            records = b"".join(b"14 %09d=\n" % (part * 1000 + n) for n in range(1000))
            info = tarfile.TarInfo("./PaxHeaders/x")
            info.type = tarfile.XHDTYPE
            info.size = len(records)
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512))
        file.write(bytes(1024))


@bomb
def tar_of_many_folders(path: Path) -> None:
    info = tarfile.TarInfo("folder")
    info.type = tarfile.DIRTYPE
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) * 10_000 + bytes(1024))


def _nemo(path: Path, config: bytes) -> None:
    weights = BytesIO()
    write_torch_zip(weights, named(w=tensor()))  # type: ignore[arg-type]
    write_tar(path, [("model_config.yaml", config), ("model_weights.ckpt", weights.getvalue())])


@bomb
def yaml_of_aliases(path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    _nemo(path, "\n".join(lines).encode())


@bomb
def yaml_of_merges(path: Path) -> None:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]
    _nemo(path, "\n".join(lines).encode())


@bomb
def yaml_nested(path: Path) -> None:
    _nemo(path, b"a: " + b"[" * 500_000)


@bomb
def yaml_nested_by_dashes(path: Path) -> None:
    _nemo(path, b"- " * 500_000 + b"x")


@bomb
def yaml_of_a_long_sexagesimal_number(path: Path) -> None:
    _nemo(path, b"a: 1" + b":59" * 300_000)


@bomb
def yaml_of_a_sexagesimal_number_beyond_floats(path: Path) -> None:
    _nemo(path, b"a: 1" + b":59" * 300 + b".5")


@bomb
def safetensors_with_a_large_header(path: Path) -> None:
    row = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    write_safetensors(path, b"{" + _numbered(row, 1_100_000)[:-1] + b"}")


@bomb
def safetensors_with_large_metadata(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b'{"__metadata__":{')
        file.truncate(8 + 100_000_001)


@bomb
def safetensors_with_the_largest_metadata_that_is_read(path: Path) -> None:
    metadata = _numbered(b'"%07d":"",', 490_000)[:-1]
    tensors = b'"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    write_safetensors(path, b'{"__metadata__":{' + metadata + b"}," + tensors + b"}")


@bomb
def safetensors_with_a_wide_header(path: Path) -> None:
    metadata = '"😀":"'.encode() + b"a" * (15 << 20) + b'"'
    tensors = b'"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    write_safetensors(path, b'{"__metadata__":{' + metadata + b"}," + tensors + b"}")


@bomb
def safetensors_with_many_duplicate_names(path: Path) -> None:
    row = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    write_safetensors(path, b"{" + _numbered(row + b",", 20_000) + row % 19_999 + b"}")


@bomb
def safetensors_with_a_huge_shape(path: Path) -> None:
    shape = b"[0," + b",".join([b"1"] * 400_000) + b"]"
    write_safetensors(path, b'{"w":{"dtype":"U8","shape":' + shape + b',"data_offsets":[0,0]}}')


@bomb
def index_of_many_keys(path: Path) -> None:
    rows = _numbered(b'"%07d":"a",', 1_500_000)
    path.write_bytes(b'{"weight_map":{' + rows[:-1] + b"}}")


@bomb
def index_of_many_numbers(path: Path) -> None:
    path.write_bytes(b'{"weight_map":{"a":"b"},"x":[' + b"300," * 4_000_000 + b"300]}")


@bomb
def index_nested(path: Path) -> None:
    path.write_bytes(b'{"weight_map":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@bomb
def index_of_wide_text(path: Path) -> None:
    text = '{"weight_map":{"a":"b"},"x":"😀' + "a" * (15 << 20) + '"}'
    path.write_bytes(text.encode())


def _script(path: Path, code: bytes) -> None:
    entries = {
        "a/data.pkl": pickled(named(w=tensor())),
        "a/constants.pkl": pickled(b")"),
        "a/code/x.py": code,
        "a/data/0": bytes(16),
    }
    write_zip(path, entries)


@bomb
def script_of_much_code(path: Path) -> None:
    """TorchScript whose code lists a million buffers."""
    code = b"class A(Module):\n  __buffers__ = [" + b'"aa",' * 1_500_000 + b"]\n"
    _script(path, code + "# 😀\n".encode())


@bomb
def script_of_many_empty_lines(path: Path) -> None:
    _script(path, b"class A(Module):\n" + b"\n" * 1_000_000)


@bomb
def header_json_nested(path: Path) -> None:
    write_safetensors(path, b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
