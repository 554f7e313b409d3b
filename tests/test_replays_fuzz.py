"""Damaged and hostile files: whatever is wrong, the answer is a recording or a `GbxError`, within a second of computing and 400 MiB.

TMLAB_FUZZ=20000 runs more than the usual 2,000 files; `pytest -s` shows the counts by outcome."""
import os, random, re, signal, struct, time, zlib
from collections import Counter
import pytest
from tmlab.core.runs import real_data
from tmlab.replays import gbx
from tmlab.replays.gbx import GbxError, ghost_states, read_recording

pytestmark = pytest.mark.skipif(real_data("index.tsv") is None, reason="real game files are not here (TMLAB_REAL_DATA)")
FILES = int(os.environ.get("TMLAB_FUZZ", 2000))
LIMIT_S, LIMIT_MIB = 1.0, 400  # computing time (CPU) of one file; memory above that of the process before it
NAMES = ("replays/stadium/A01-Race_23850_protraintrack.Replay.Gbx", "replays/edge/StarStadiumA5_18090_catasystgma.Replay.Gbx",
         "replays/stadium/TMNF-Trial_7740_malun22.Replay.Gbx", "replays/other_env/SnowB5_20700_dagy73.Replay.Gbx",
         "replays/stadium/TAS_Training_Map1_9290_drunkfinn.Replay.Gbx", "replays/not_forever/G-6_na_x.Replay.Gbx",
         "challenges/nadeo/A01-Race.Challenge.Gbx", "challenges/nadeo/A08-Endurance.Challenge.Gbx", "challenges/community/adlands.Challenge.Gbx")
NUMBERS = (0, 1, 2, 255, 65535, 10**5, 10**6, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)

pack = lambda *xs: b"".join(struct.pack("<I", x) if isinstance(x, int) else x for x in xs)
u32 = lambda data, at: struct.unpack_from("<I", data, at)[0]
body_start = lambda data: 25 + u32(data, 13)  # of a file without outside references

# ---- pieces of a file

def unpacked(data):
    "The same file with an uncompressed body."
    at = body_start(data)
    return data[:7] + b"U" + data[8:at] + gbx.read_container(data).body.data

def repacked(data):
    "An uncompressed file with its body compressed."
    at = body_start(data)
    body = data[at:]
    return data[:7] + b"C" + data[8:at] + pack(len(body), len(z := gbx.lzallright.LZOCompressor().compress(body)), z)

def with_samples(plain, which, change):
    "The file with the sample block of one ghost changed and compressed again."
    starts = list(gbx.GHOST_START.finditer(plain))
    at = starts[which % len(starts)].end()
    n = u32(plain, at + 4)
    block = change(zlib.decompress(plain[at + 8:at + 8 + n]))
    return plain[:at] + pack(len(block), len(z := zlib.compress(block, 1)), z) + plain[at + 8 + n:]

def with_map(plain, change):
    "The replay with its map file changed."
    at = plain.index(pack(0x03093002), body_start(plain)) + 4
    n = u32(plain, at)
    inner = change(plain[at + 4:at + 4 + n])
    return plain[:at] + pack(len(inner), inner) + plain[at + 4 + n:]

# ---- ways to damage bytes from `first` on

def flip(b, rnd, first):
    for _ in range(rnd.choice([1, 3, 20, 200])): b[rnd.randrange(first, len(b))] = rnd.randrange(256)

def cut_off(b, rnd, first): del b[rnd.randrange(first, len(b)):]

def forge(b, rnd, first):
    "A size, count or id replaced; mostly where a small number stands, as sizes do."
    spots = [p for p in (rnd.randrange(first, len(b) - 4) for _ in range(40)) if u32(b, p) < 10**6] or [first]
    struct.pack_into("<I", b, spots[0], rnd.choice(NUMBERS))

def leave_out(b, rnd, first):
    p = rnd.randrange(first, len(b))
    del b[p:p + rnd.randrange(1, 200)]

def double(b, rnd, first):
    p, q = rnd.randrange(first, len(b)), rnd.randrange(first, len(b))
    b[p:p] = b[q:q + rnd.choice([4, 200, 20_000])]

def swap_chunks(b, rnd, first):
    "Two chunks that carry their length change places; where there are none, two stretches of bytes."
    marks = [m.start() - 4 for m in re.finditer(struct.pack("<I", gbx.SKIPPABLE), bytes(b)) if m.start() >= first + 4]
    spans = [(p, p + 12 + u32(b, p + 8)) for p in marks if p + 12 <= len(b) and p + 12 + u32(b, p + 8) <= len(b)]
    if len(spans) < 2: spans = sorted((p, p + 40) for p in rnd.sample(range(first, max(len(b) - 40, first + 2)), 2))
    (a, a1), (c, c1) = sorted(rnd.sample(spans, 2))
    if a1 <= c: b[a:c1] = b[c:c1] + b[a1:c] + b[a:a1]

DAMAGE = (flip, cut_off, forge, leave_out, double, swap_chunks)

def damaged(data, rnd, first=0):
    "`data` damaged in one way, now and then in two."
    b = bytearray(data)
    for _ in range(rnd.choice([1, 1, 1, 2])):
        if len(b) > first + 8: rnd.choice(DAMAGE)(b, rnd, first)
    return bytes(b)

# ---- where in a file

def in_file(f, rnd): return damaged(f["file"], rnd)
def in_header(f, rnd): return damaged(f["file"][:body_start(f["file"])], rnd) + f["file"][body_start(f["file"]):]
def in_body(f, rnd): return damaged(f["plain"], rnd, body_start(f["plain"]))
def in_packed_body(f, rnd): return repacked(in_body(f, rnd))
def in_map(f, rnd): return with_map(f["plain"], lambda m: rnd.choice([lambda x: x, repacked])(damaged(unpacked(m), rnd, body_start(unpacked(m)))))
def in_samples(f, rnd): return with_samples(f["plain"], rnd.randrange(4), lambda block: damaged(block, rnd))
def sizes(f, rnd):
    "The sizes around compressed data: of the body, of a ghost's samples, of the map."
    plain, at = bytearray(f["plain"]), body_start(f["plain"])
    spots = [m.end() + k for m in gbx.GHOST_START.finditer(plain) for k in (0, 4)]
    if f["map"]: spots.append(at + 4)
    if not spots or rnd.random() < 0.5:
        packed = bytearray(f["file"])
        struct.pack_into("<I", packed, body_start(packed) + rnd.choice([0, 4]), rnd.choice(NUMBERS + (u32(packed, body_start(packed)) + rnd.choice([-1, 1]),)))
        return bytes(packed)
    struct.pack_into("<I", plain, rnd.choice(spots), rnd.choice(NUMBERS))
    return bytes(plain)

def spliced(files, rnd):
    "The head of one body and the tail of another."
    a, b = rnd.choice(files)["plain"], rnd.choice(files)["plain"]
    return a[:rnd.randrange(body_start(a), len(a))] + b[rnd.randrange(body_start(b), len(b)):]

def read_all(names=NAMES):
    out = []
    for name in names:
        file = real_data(*name.split("/")).read_bytes()
        plain = unpacked(file)
        out.append(dict(name=name, file=file, plain=plain, map=name.startswith("replays") and "not_forever" not in name, ghosts=bool(gbx.GHOST_START.search(plain))))
    return out

def mutated(files, rnd):
    "(what was done, bytes): one damaged file."
    f = rnd.choice(files)
    places = [in_file, in_header, in_body, in_body, in_packed_body, sizes, spliced] + [in_map, in_map] * f["map"] + [in_samples] * f["ghosts"]
    place = rnd.choice(places)
    return place.__name__, place(files if place is spliced else f, rnd)

# ---- reading within limits

class Hang(BaseException): "A file that took longer than the limit."

def on_time(*_): raise Hang

def memory_mib(which):
    "Resident memory of this process, MiB: VmRSS now, VmHWM at most since `reset_peak`."
    with open("/proc/self/status") as f: return next(int(line.split()[1]) for line in f if line.startswith(which)) / 1024

def reset_peak():
    with open("/proc/self/clear_refs", "w") as f: f.write("5")

def attempt(data, limit_s=LIMIT_S):
    "(outcome, computing time in s, memory at most in MiB) of reading a file; anything but a recording or a `GbxError` is raised."
    reset_peak()
    before, start, recording = memory_mib("VmRSS"), time.process_time(), None
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try: recording = read_recording(data)
    except GbxError as e: assert len(str(e)) < 400, str(e)[:1000]
    finally: signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, mib = time.process_time() - start, memory_mib("VmHWM") - before
    if recording: use(recording)
    return "parsed" if recording else "refused", seconds, mib

def use(recording):
    "What others do with a recording works for one from a damaged file, too."
    for g in recording.ghosts:
        if g.inputs is not None and len(g.samples) < 10_000: ghost_states(g)
        assert len(repr(g)) < 10**6
    recording.best, recording.map.plain_name

@pytest.fixture
def watched():
    "A signal that ends a reading which takes longer than `LIMIT_S` of computing."
    if not hasattr(signal, "ITIMER_PROF") or not os.path.exists("/proc/self/clear_refs"): pytest.skip("needs Linux to limit time and to measure memory")
    old = signal.signal(signal.SIGPROF, on_time)
    yield
    signal.signal(signal.SIGPROF, old)

def test_damaged_files(watched):
    files, rnd = read_all(), random.Random(20260)
    outcomes, slowest, largest = Counter(), 0.0, 0.0
    for i in range(FILES):
        done, data = mutated(files, rnd)
        try: outcome, seconds, mib = attempt(data)
        except (Exception, Hang) as e: pytest.fail(f"file {i} ({done}, {len(data)} bytes): {type(e).__name__}: {e}")
        outcomes[done, outcome] += 1
        slowest, largest = max(slowest, seconds), max(largest, mib)
    total = Counter()
    for (_, outcome), n in outcomes.items(): total[outcome] += n
    print(f"\n{FILES} files: {dict(total)}; slowest {slowest:.3f} s of computing, most memory {largest:.0f} MiB")
    for (done, outcome), n in sorted(outcomes.items()): print(f"  {done:15s} {outcome:8s} {n}")
    assert largest < LIMIT_MIB and total["refused"] > 0.3 * FILES and total["parsed"] > 0.1 * FILES
    assert len({done for done, _ in outcomes}) == 8

# ---- files made to hurt

text = lambda s: pack(len(s), s.encode())

def file_of(kind, body):
    h = pack(0)
    return b"GBX" + struct.pack("<H", 6) + b"BUCR" + pack(kind, len(h), h, 2, 0, len(body), len(z := gbx.lzallright.LZOCompressor().compress(body)), z)

def map_of(count=0, rows=b"", rest=pack(gbx.END)):
    ident = pack(0xFFFFFFFF) * 3
    return file_of(0x03043000, pack(0x0304301F, 3, ident, text("m"), ident, 32, 32, 32, 0, 1, count, rows, rest))

def replay_of(*ghosts):
    m = map_of()
    listed = b"".join(pack(i + 5, g) for i, g in enumerate(ghosts))
    return file_of(0x03093000, pack(0x03093002, len(m), m, 0x03093014, 10, len(ghosts), listed, 0, 0, gbx.END))

def ghost_of(n, announced=None):
    "A ghost that stands still for `n` samples."
    block = pack(0x0A02B000, 1, 0, 100, 9, 61 * n, bytes(61 * n), n, 0, 61)
    return pack(0x03092000, 0x0303F005, len(block) if announced is None else announced, len(z := zlib.compress(block)), z, gbx.END)

def ghost_with_inputs(names, n):
    return pack(0x03092000, 0x03092019, 100, 0, names, 3, b"\xff" * (4 * names), n, 0, bytes(9 * n), text(""), 0, 0, 0, text(""), 0, gbx.END)

def stretched(body_size, packed): return map_of()[:21] + pack(2, 0, body_size, len(packed), packed)

M, S = gbx.MAX_BYTES, gbx.MAX_STEPS
HOSTILE = dict(  # what the refusal says, empty where the file is within bounds; the file
    blocks=("", lambda: map_of(S // 2 - 10, pack(0xFFFFFFFF, bytes(4), 0) * (S // 2 - 10))),
    chunks=("list items", lambda: map_of(rest=pack(0x03043022, 1) * (M // 8 - 100))),
    chunks_of_strings=("list items", lambda: map_of(rest=pack(0x0305B001, 0, 0, 0, 0) * (M // 20 - 100))),
    chunks_to_skip=("list items", lambda: map_of(rest=pack(0x03043FFF, gbx.SKIPPABLE, 0) * (M // 12 - 100))),
    chunks_in_chunks=("cut short", lambda: map_of(rest=pack(0x03043011, gbx.SKIPPABLE, M - 500, 7, 0x03043000) * 40 + bytes(M - 900))),
    file_references=("", lambda: map_of(rest=pack(0x03092017, S - 100, bytes(5 * S)))),
    ghost_marks=("list items", lambda: map_of(rest=pack(0x03043ABC) + pack(0x03092000, 0x0303F005) * (M // 8 - 100))),
    long_ghost=("", lambda: replay_of(ghost_of((M - 90_000) // 61))),
    two_long_ghosts=("", lambda: replay_of(*[ghost_of((M // 2 - 60_000) // 61)] * 2)),
    too_long_ghosts=("announced", lambda: replay_of(*[ghost_of((M - 90_000) // 61)] * 3)),
    many_ghosts=("", lambda: replay_of(*[ghost_of(2)] * 500)),
    too_many_ghosts=("list items", lambda: replay_of(*[ghost_of(2)] * 2000)),
    samples_smaller=("announced", lambda: replay_of(ghost_of(10**6, 100))),
    samples_larger=("announced", lambda: replay_of(ghost_of(10, 2**32 - 1))),
    events=("", lambda: replay_of(ghost_with_inputs(1, S * 4 - 9000))),
    too_many_events=("list items", lambda: replay_of(ghost_with_inputs(1, M // 10))),
    event_names=("list items", lambda: replay_of(ghost_with_inputs(M // 5, 0))),
    lzo_steps=("size announced", lambda: stretched(M - 1, bytes([21]) + b"abcd" + bytes([0x44, 0]) * (M // 4))),
    lzo_bomb=("size announced", lambda: stretched(1 << 20, gbx.lzallright.LZOCompressor().compress(bytes(200 << 20)))),
    lzo_huge=("are not read", lambda: stretched(2**32 - 1, b"\x11\0\0")))

@pytest.mark.parametrize("name", HOSTILE)
def test_files_made_to_hurt(name, watched):
    said, make = HOSTILE[name]
    data = make()
    outcome, seconds, mib = attempt(data, 3 * LIMIT_S)
    print(f"\n{name}: {len(data)} bytes, {outcome}, {seconds:.2f} s, {mib:.0f} MiB")
    assert mib < LIMIT_MIB and outcome == ("refused" if said else "parsed")
    if said: pytest.raises(GbxError, read_recording, data).match(said)

def test_the_largest_real_files_are_far_from_the_limits():
    path = real_data("replays", "edge", "Canopus_5588870_malun22.Replay.Gbx")
    budget = [gbx.MAX_BYTES, gbx.MAX_STEPS]
    chunks, _ = gbx.read_main(gbx.read_container(path.read_bytes(), budget).body, 0x03093002)
    gbx.read_map(gbx.read_container(chunks[0x03093002], budget))
    assert budget[0] > 0.75 * gbx.MAX_BYTES and budget[1] > 0.75 * gbx.MAX_STEPS
