"""The unpickler reads plain data and refuses everything else that a pickle can do."""

import copyreg
import datetime
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memscope.errors import TraceFileError
from memscope.exchange.pickle_scan import Refused
from memscope.exchange.plain_pickle import _PlainUnpickler, read_plain_pickle

PROTOCOLS = (2, 3, 4, 5)
INTEGERS = st.integers(-(2**63), 2**64 - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | st.text() | st.tuples(INTEGERS, INTEGERS),
    lambda values: (
        st.lists(values) | st.dictionaries(st.text() | INTEGERS | st.floats(allow_nan=False), values, max_size=5)
    ),
    max_leaves=20,
)


@pytest.fixture
def read(tmp_path):
    """Read a pickle from bytes."""

    def read(data):
        path = tmp_path / "snapshot.pickle"
        path.write_bytes(data)
        return read_plain_pickle(path)

    return read


# Plain data.


@given(PLAIN, st.sampled_from(PROTOCOLS))
@settings(deadline=None)
def test_plain_data_is_read_as_python_reads_it(tmp_path_factory, value, protocol):
    path = tmp_path_factory.mktemp("plain") / "snapshot.pickle"
    path.write_bytes(pickle.dumps(value, protocol))
    assert read_plain_pickle(path) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_large_and_shared_data_is_read(read, protocol):
    shared = {"name": "f" * 300, "line": 2**40, "é": -1.5, "id": (0, 0)}
    data = {"frames": [[shared] * 2000, [shared, *range(70_000)]], "bytes": b"x" * 300 if protocol > 2 else None}
    found = read(pickle.dumps(data, protocol))
    assert found == data
    assert found["frames"][0][0] is found["frames"][1][0]


def test_a_deeply_nested_list_is_read_without_recursion(read):
    depth = 300_000
    found, levels = read(b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b"."), 1
    while found:
        (found,), levels = found, levels + 1
    assert levels == depth


# Code: never executed.


class Calls:
    """Calls a function when it is unpickled, as `pickle` documents (`object.__reduce__`)."""

    def __init__(self, function, *arguments):
        self.called = (function, arguments)

    def __reduce__(self):
        return self.called


def exploits(mark):
    """Pickles that create the file `mark` when Python reads them, or try to, each in another way."""
    word = struct.pack("<I", len(mark)) + mark.encode()
    mkdir = b"\x80\x02cos\nmkdir\n"
    return {
        **{f"REDUCE os.mkdir, protocol {n}": pickle.dumps(Calls(os.mkdir, mark), n) for n in PROTOCOLS},
        "REDUCE builtins.eval": pickle.dumps(Calls(eval, f"__import__('os').mkdir({mark!r})"), 4),
        "REDUCE builtins.exec, deep in a snapshot": pickle.dumps(
            {"segments": [{"blocks": [Calls(exec, f"import os; os.mkdir({mark!r})")]}], "device_traces": []}, 4
        ),
        "a snapshot whose key is code": pickle.dumps({"segments": [], Calls(os.mkdir, mark): 1}, 4),
        "GLOBAL and REDUCE": mkdir + b"X" + word + b"\x85R.",
        "OBJ": b"\x80\x02(cos\nmkdir\nX" + word + b"o.",
        "INST": b"\x80\x02(X" + word + b"ios\nmkdir\n.",
        "NEWOBJ": b"\x80\x02ctypes\nFunctionType\n)\x81.",
        "NEWOBJ_EX": b"\x80\x04\x8c\x05types\x8c\x08CodeType\x93)}\x92.",
        "GLOBAL and BUILD": b"\x80\x02cos\n_Environ\n)\x81}X\x04\x00\x00\x00nameX" + word + b"sb.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93X" + word + b"\x85R.",
        "STACK_GLOBAL of the memo": b"\x80\x04\x8c\x02os\x94\x8c\x05mkdir\x94h\x00h\x01\x93X" + word + b"\x85R.",
        "STACK_GLOBAL of a dotted name": b"\x80\x04\x8c\x06memscope\x8c\x0derrors.difflib\x93.",
        "code after plain data": pickle.dumps({"segments": []}, 2)[:-1] + b"cos\nmkdir\nX" + word + b"\x85R.",
        "persistent id": b"\x80\x02X" + word + b"Q.",
        "persistent id in text": b"\x80\x02P" + mark.encode() + b"\n.",
        "a function of a module that runs when it is imported": b"\x80\x02cthis\ns\n.",
    }


@pytest.mark.parametrize("name", exploits(""))
def test_code_in_a_pickle_is_refused_and_never_executed(read, tmp_path, name):
    mark = tmp_path / "executed"
    with pytest.raises(TraceFileError, match=r"refused: the file asks .* Nothing in it was executed"):
        read(exploits(str(mark))[name])
    assert not mark.exists()


@pytest.mark.parametrize("name", [name for name in exploits("") if name.startswith("REDUCE os.mkdir")])
def test_these_exploits_work_on_a_reader_that_is_not_restricted(tmp_path, name):
    mark = tmp_path / "executed"
    pickle.loads(exploits(str(mark))[name])
    assert mark.exists()


def test_the_error_names_the_object_that_was_requested(read):
    with pytest.raises(TraceFileError, match=rf"{os.mkdir.__module__}\.mkdir"):
        read(pickle.dumps({"segments": [Calls(os.mkdir, "x")]}, 4))
    with pytest.raises(TraceFileError, match=r"datetime\.date"):
        read(pickle.dumps(datetime.date(2025, 1, 1), 2))


def test_an_extension_code_is_refused_even_where_this_process_knows_it(read):
    # After the first read, Python takes the class for the code from a cache, bypassing find_class.
    copyreg.add_extension("os", "mkdir", 0x7654)
    try:
        known = b"\x80\x02\x83" + struct.pack("<H", 0x7654)
        assert pickle.loads(known + b".") is os.mkdir
        with pytest.raises(TraceFileError, match="EXT2"):
            read(known + b"X\x01\x00\x00\x00x\x85R.")
    finally:
        copyreg.remove_extension("os", "mkdir", 0x7654)


@pytest.mark.parametrize(
    ("value", "name"),
    [({1, 2}, "EMPTY_SET"), (frozenset([1]), "FROZENSET"), (bytearray(b"x"), "BYTEARRAY8")],
    ids=lambda value: type(value).__name__,
)
def test_even_harmless_objects_beyond_plain_data_are_refused(read, value, name):
    with pytest.raises(TraceFileError, match=name):
        read(pickle.dumps({"segments": value}, 5))


def test_buffers_from_outside_are_refused(read):
    with pytest.raises(TraceFileError, match="outside the file"):
        read(pickle.dumps(pickle.PickleBuffer(b"x"), 5, buffer_callback=lambda _: False))


@pytest.mark.parametrize("code", [b"cos\nmkdir\n", b"X\x01\x00\x00\x00xQ"], ids=["class", "persistent id"])
def test_the_second_check_holds_without_the_first(code):
    with pytest.raises(Refused):
        _PlainUnpickler(io.BytesIO(b"\x80\x02" + code + b".")).load()


# Broken pickles.


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_cut_anywhere_is_refused(read, protocol):
    whole = pickle.dumps(
        {"segments": [{"size": 2**40, "name": "f" * 300, "x": 1.5, "y": [True, None, (1, 2)]}]}, protocol
    )
    for length in range(len(whole)):
        with pytest.raises(TraceFileError, match=r"truncated|empty"):
            read(whole[:length])


def is_plain(value):
    """Whether a value holds only plain data; lists and dicts may contain themselves."""
    waiting, seen = [value], set()
    while waiting:
        part = waiting.pop()
        if type(part) not in (dict, list, tuple, str, bytes, int, float, bool, type(None)):
            return False
        if isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            waiting += [*part.keys(), *part.values()] if isinstance(part, dict) else part
    return True


@given(st.binary(max_size=200), st.sampled_from(PROTOCOLS))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_plain_data_or_refused(tmp_path_factory, data, protocol):
    path = tmp_path_factory.mktemp("garbage") / "snapshot.pickle"
    path.write_bytes(bytes([0x80, protocol]) + data)
    found, told = None, f"{path}: "
    try:
        found = read_plain_pickle(path)
    except TraceFileError as refusal:
        told = str(refusal)
    assert is_plain(found)
    assert told.startswith(f"{path}: ")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04]r\xff\xff\xff\x3f.",  # remembers a list as number 2^30
        b"\x80\x02]r\x00\x01\x00\x00r\xff\xff\xff\x00.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",  # BINUNICODE8
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # BINBYTES8
        b"\x80\x04X\xff\xff\xff\x7fx.",  # BINUNICODE
        b"\x80\x04\x8b\xff\xff\xff\x7fx.",  # LONG4
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",  # FRAME
    ],
)
def test_a_small_file_cannot_ask_for_all_memory(read, data):
    tracemalloc.start()
    try:
        with pytest.raises(TraceFileError, match=r"truncated|damaged|64 bits"):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


# Small files that would take forever. Each of these tests would hang if its file were read.

SHARED_TUPLES = b"\x80\x02})q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(40)) + b"K\x01s."
"""A key of 40 pairs, each of which holds the last one twice: Python would hash 2^40 empty tuples."""


@pytest.mark.parametrize(
    "key",
    [SHARED_TUPLES[3:-3], *(b")\x94" + nest * 1_000_000 for nest in (b"\x85", b"K\x00\x86", b"h\x00\x86"))],
    ids=["shared", "deep", "deep, with numbers", "deep, with others"],
)  # fmt: skip
def test_tuples_of_more_than_integers_are_refused(read, key):
    # Python hashes a key of a dict by recursion in C, without a limit and without a chance for Ctrl-C.
    with pytest.raises(TraceFileError, match=r"a tuple of other than one to three integers"):
        read(b"\x80\x04}" + key + b"K\x00s.")


def colliding(count):
    """Integers of 64 bits that Python's dicts look for in the same places: see `perturb` in Objects/dictobject.c."""
    return [(n << 40) + 7 for n in range(count)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("keys", [colliding(100_000), [n * (2**61 - 1) for n in range(8)] * 1000])
def test_a_dict_of_thousands_of_numbers_is_refused(read, protocol, keys):
    items = b"".join(b"\x8a\x09" + key.to_bytes(9, "little") + b"N" for key in keys)
    with pytest.raises(TraceFileError, match=r"a dict of more than 2,048 items \(byte [\d,]+\): no snapshot has one"):
        read(b"\x80%c}(" % protocol + items + b"u.")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_dict_that_is_filled_in_batches_is_counted_as_one(read, protocol):
    # Picklers fill a dict with 1000 items at a time.
    assert len(read(pickle.dumps(dict.fromkeys(range(1500)), protocol))) == 1500
    with pytest.raises(TraceFileError, match="a dict of more than 2,048 items"):
        read(pickle.dumps(dict.fromkeys(range(5000)), protocol))


@pytest.mark.parametrize("item", [b"K\x01NK\x02N", b"K\x01]K\x02aK\x02}"], ids=["flat", "nested"])
def test_a_dict_is_not_filled_again_later(read, item):
    for again in (b"h\x00(", b"0("):  # recalled, or after a value that is dropped
        with pytest.raises(TraceFileError, match=r"fills nothing that was begun|refused|truncated"):
            read(b"\x80\x02}q\x00(" + item + b"u" + again + item + b"u.")


def test_items_added_one_by_one_are_counted(read):
    def one_by_one(count):
        return b"\x80\x04]" + b"}" + b"".join(b"J%s]s" % n.to_bytes(4, "little") for n in range(count))

    assert len(read(one_by_one(10_000) + b"a.")[0]) == 10_000
    with pytest.raises(TraceFileError, match="more than 10,000 dicts with one item"):
        read(one_by_one(10_001) + b"a.")


@pytest.mark.parametrize("number", [2**64, -(2**71), 2**2047, 10**4000], ids=["2^64", "-2^71", "2^2047", "10^4000"])
def test_an_integer_of_more_than_64_bits_is_refused(read, number):
    with pytest.raises(TraceFileError, match=r"an integer of more than 64 bits"):
        read(pickle.dumps({"segments": number}, 4))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"{'segments': []}", "not a pickle of protocol 2 to 5"),
        (pickle.dumps([], 0), "not a pickle of protocol 2 to 5"),
        (b"\x80\x07N.", "protocol 7"),
        (b"\x1f\x8b\x08\x00", "gunzip"),
        (b"\x80\x04\xff.", "not an instruction"),
        (b"\x80\x04}]K\x00s.", "damaged pickle"),  # a list as a key
        (b"\x80\x04a.", "damaged pickle"),  # appends to an empty stack
        (b"\x80\x04h\x07.", "damaged pickle"),  # recalls a value that was never stored
        (b"\x80\x04.", "damaged pickle"),
    ],
)
def test_a_broken_pickle_is_refused_with_the_reason(read, data, expected):
    with pytest.raises(TraceFileError, match=expected):
        read(data)


def test_an_archive_of_torch_save_is_not_opened(read):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Calls(os.mkdir, "x"), 2))
    with pytest.raises(TraceFileError, match=r"zip archive, as torch\.save"):
        read(archive.getvalue())


def test_a_missing_file_and_a_folder_have_different_errors(tmp_path):
    with pytest.raises(TraceFileError, match="no such file"):
        read_plain_pickle(tmp_path / "snapshot.pickle")
    with pytest.raises(TraceFileError, match="cannot be read"):
        read_plain_pickle(tmp_path)


def test_progress_reaches_the_end_of_the_file(tmp_path):
    path, told = tmp_path / "snapshot.pickle", []
    path.write_bytes(pickle.dumps(list(range(2_000_000)), 4))
    read_plain_pickle(path, lambda *what: told.append(what))
    size = path.stat().st_size
    assert ("reading", size, size) in told
    assert {name for name, _, _ in told} == {"checking", "reading"}
