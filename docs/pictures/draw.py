#!/usr/bin/env python3
"""Draws the pictures of docs/*.md from the formulas they illustrate.

    draw.py    writes every picture beside itself

tests/docs_test.py compares the cells of each grid with the pairs that `annulus explain` counts for the same rule.
"""

import html
import pathlib
import re

HERE = pathlib.Path(__file__).resolve().parent
INK, MUTED, PAPER, EDGE, HIDDEN, LINE = "#1b2733", "#566573", "#ffffff", "#d5dbe1", "#f1f4f7", "#c3ccd4"
SEEN, PALE, RED = "#2f7ebc", "#b9d7ee", "#b3303f"
RANKS = ["#9ecae8", "#fbc56d", "#a9d88e", "#d3b3e0"]  # light enough for dark text


class Picture:
    """Elements on a background of their own, so that dark pages do not matter."""

    def __init__(self):
        self.elements, self.width, self.height = [], 0, 0

    def rect(self, x, y, w, h, fill, stroke="none"):
        self.width, self.height = max(self.width, x + w), max(self.height, y + h)
        self.elements.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}" stroke="{stroke}"/>')

    def path(self, d, fill="none", stroke="none", width=1.0):
        self.elements.append(f'<path d="{d}" fill="{fill}" stroke="{stroke}" stroke-width="{width}"/>')

    def cells(self, left, top, size, cells, fill):
        self.path("".join(f"M{left + j * size} {top + i * size}h{size}v{size}h-{size}z" for i, j in cells), fill)

    def lines(self, left, top, size, rows, columns, step=1, stroke=LINE, width=1.0):
        self.path("".join(f"M{left + j * size} {top}v{rows * size}" for j in range(0, columns + 1, step)) +
                  "".join(f"M{left} {top + i * size}h{columns * size}" for i in range(0, rows + 1, step)),
                  stroke=stroke, width=width)

    def text(self, x, y, words, size=12.0, fill=INK, anchor="start", weight="normal",
             family="Helvetica,Arial,sans-serif"):
        reach = len(words) * size * 0.6 * {"start": 1, "middle": 0.5, "end": 0}[anchor]
        self.width, self.height = max(self.width, x + reach), max(self.height, y + size / 2)
        self.elements.append(f'<text x="{x}" y="{y}" font-size="{size}" font-family="{family}" font-weight="{weight}" '
                             f'fill="{fill}" text-anchor="{anchor}">{html.escape(words)}</text>')

    def svg(self):
        w, h = round(self.width) + 16, round(self.height) + 14
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}">',
            f'<rect x="0.5" y="0.5" width="{w - 1}" height="{h - 1}" rx="6" fill="{PAPER}" stroke="{EDGE}"/>',
            *self.elements, "</svg>", ""])


class Grid:
    """Queries i down, keys j to the right; a cell is drawn where the formula, a Python expression, is true.

    `options` of `annulus explain` that say the same, None if none do; `tensors`: what its INPUT holds beside q, k and v,
    as name: (dtype, shape, values)."""

    def __init__(self, title, q_len, kv_len, formula, note="", options=None, tensors=None, labels=None, **names):
        self.title, self.q_len, self.kv_len, self.lines = title, q_len, kv_len, [formula, note] if note else [formula]
        self.options, self.tensors, self.labels = options, tensors or {}, labels or range(max(q_len, kv_len))
        sees = eval(f"lambda i, j: {formula}", names)
        self.seen = [(i, j) for i in range(q_len) for j in range(kv_len) if sees(i, j)]

    def width(self, size):
        words = max([len(self.title) * 7.4] + [len(line) * 7 for line in self.lines])
        return round(max(26 + self.kv_len * size + (64 if len({i for i, _ in self.seen}) < self.q_len else 0), words))

    def draw(self, picture, x, y, size, owner=None):
        """Returns the height that it took. `owner`: query -> the rank whose colour its row gets."""
        left, top = x + 26, y + 36
        picture.text(x, y + 12, self.title, 13, weight="bold")
        picture.rect(left, top, self.kv_len * size, self.q_len * size, HIDDEN)
        for rank, fill in enumerate(RANKS if owner else [SEEN]):
            picture.cells(left, top, size, [(i, j) for i, j in self.seen if not owner or owner[i] == rank], fill)
        picture.lines(left, top, size, self.q_len, self.kv_len)
        for j in range(self.kv_len):
            picture.text(left + j * size + size / 2, top - 5, str(self.labels[j]), size / 2 + 1, MUTED, "middle")
        for i in range(self.q_len):
            picture.text(left - 5, top + i * size + size / 2 + 4, str(self.labels[i]), size / 2 + 1, MUTED, "end")
            if not any(i == row for row, _ in self.seen):
                picture.text(left + self.kv_len * size + 6, top + i * size + size / 2 + 4, "sees none", 10, RED)
        for n, line in enumerate(self.lines if not owner else []):
            picture.text(x, top + self.q_len * size + 20 + n * 16, line, 11.5, family="Menlo,Consolas,monospace")
        return 50 + self.q_len * size + 16 * len(self.lines)


def sheet(grids, columns, size=20):
    picture, y = Picture(), 14
    widths = [max(grid.width(size) for grid in grids[c::columns]) for c in range(min(columns, len(grids)))]
    for first in range(0, len(grids), columns):
        row = grids[first:first + columns]
        y += 18 + max(grid.draw(picture, 16 + sum(widths[:c]) + 26 * c, y, size) for c, grid in enumerate(row))
    return picture.svg()


# ------------------------------------------------------------------------------------ rules of visibility

IDS = [0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1, -1]
SEGMENTS = {"labels": IDS, "id": IDS,
            "tensors": {name: ("I32", [1, 12], IDS) for name in ("q_segment_ids", "kv_segment_ids")}}
ROWS = ["11000000", "11000000", "00111000", "00111000", "00111000", "10000100", "10000110", "10000111"]
DENSE = [[int(bit) for bit in row] for row in ROWS]
MASK = {"mask": DENSE, "tensors": {"attention_mask": ("U8", [1, 1, 8, 8], sum(DENSE, []))}}
LENGTH = {"tensors": {"kv_lengths": ("I32", [1], [5])}}
BITS = {"bit": [[1, 0, 0], [1, 1, 0], [0, 1, 1]]}
TOP = " --causal-alignment top-left"

CAUSAL = [
    Grid("8 queries, 8 keys", 8, 8, "j <= i", "", "--causal"),
    Grid("5 x 8, bottom-right", 5, 8, "j <= i + 3", "shift 8 - 5 = 3", "--causal"),
    Grid("5 x 8, top-left", 5, 8, "j <= i", "shift 0", "--causal" + TOP),
    Grid("8 x 5, bottom-right", 8, 5, "j <= i - 3", "shift 5 - 8 = -3", "--causal"),
    Grid("8 x 5, top-left", 8, 5, "j <= i", "shift 0", "--causal" + TOP)]
WINDOW = [
    Grid("(2, 1)", 8, 8, "i-2 <= j <= i+1", "up to 4 keys", "--sliding-window 2,1"),
    Grid("2, the same as (2, 2)", 8, 8, "i-2 <= j <= i+2", "up to 5 keys", "--sliding-window 2"),
    Grid("(2, -1)", 8, 8, "i-2 <= j", "-1: no limit", "--sliding-window 2,-1"),
    Grid("2 and causal", 8, 8, "i-2 <= j <= i+2 and j <= i", "up to w + 1 = 3 keys", "--sliding-window 2 --causal"),
    Grid("(2, 0), 5 x 8, bottom-right", 5, 8, "i+3-2 <= j <= i+3", "shift 8 - 5 = 3", "--sliding-window 2,0"),
    Grid("(2, 0), 5 x 8, top-left", 5, 8, "i-2 <= j <= i", "shift 0", "--sliding-window 2,0" + TOP)]
CHUNKED = [
    Grid("chunk_size 4", 12, 12, "i//4 == j//4 and j <= i", "", "--chunk-size 4"),
    Grid("chunk_size 4, 6 x 12", 6, 12, "i//4 == j//4 and j <= i", "no shift, ever", "--chunk-size 4")]
PACKED = [
    Grid("equal ids", 12, 12, "id[i] == id[j]", "-1 is an id like any other", "", **SEGMENTS),
    Grid("padding_segment_id -1", 12, 12, "id[i] == id[j] != -1", "", "--padding-segment-id=-1", **SEGMENTS),
    Grid("and causal: packed documents", 12, 12, "id[i] == id[j] != -1 and j <= i", "",
         "--padding-segment-id=-1 --causal", **SEGMENTS)]
DATA = [
    Grid("kv_lengths[b] = 5", 8, 8, "j < 5", "", "", **LENGTH),
    Grid("kv_lengths[b] = 5 and causal", 8, 8, "j < 5 and j <= i", "", "--causal", **LENGTH),
    Grid("attention_mask", 8, 8, "mask[i][j]", "", "", **MASK),
    Grid("attention_mask and (2, -1)", 8, 8, "mask[i][j] and i-2 <= j", "", "--sliding-window=2,-1", **MASK)]
ALGEBRA = [
    Grid("prefix(3)", 12, 12, "j < 3"),
    Grid("prefix(3) | causal()", 12, 12, "j < 3 or j <= i"),
    Grid("(prefix(2) | window(3, 0)) & causal()", 12, 12, "(j < 2 or i-3 <= j <= i) and j <= i"),
    Grid("block_sparse(4, 3, 3, bit)", 12, 12, "bit[i//4][j//4]", "bit: 100 110 011", **BITS),
    Grid("block_sparse(4, 3, 3, bit) & causal()", 12, 12, "bit[i//4][j//4] and j <= i", "bit: 100 110 011", **BITS),
    Grid("window(1, 1) | chunked(6)", 12, 12, "i-1 <= j <= i+1 or i//6 == j//6 and j <= i")]


# ------------------------------------------------------------------------------------ tiles and partitions

def tiles():
    picture, n, t, size, top = Picture(), 16, 4, 15, 40
    for k, (title, formula) in enumerate([("causal", "j <= i"), ("window (5, 0)", "i-5 <= j <= i"),
                                          ("chunked(6)", "i//6 == j//6 and j <= i")]):
        left, visible = 20 + k * 280, Grid(title, n, n, formula).seen
        count = {"full": 0, "partial": 0, "empty": 0}
        picture.text(left, 26, f"{title}, 16 x 16", 13, weight="bold")
        for a, b in [(a, b) for a in range(0, n, t) for b in range(0, n, t)]:
            seen = [(i, j) for i, j in visible if (i - i % t, j - j % t) == (a, b)]
            kind = "full" if len(seen) == t * t else "partial" if seen else "empty"
            count[kind] += 1
            picture.rect(left + b * size, top + a * size, t * size, t * size, PALE if kind == "partial" else HIDDEN)
            picture.cells(left, top, size, seen, SEEN)
            picture.rect(left + (b + 1.5) * size, top + (a + 1.4) * size, size, size * 1.1, PAPER)
            picture.text(left + (b + 2) * size, top + (a + 2) * size + 4, kind[0].upper(), 13, INK, "middle", "bold")
        picture.lines(left, top, size, n, n, t, INK, 1.5)
        picture.text(left, top + n * size + 20, ", ".join(f"{count[kind]} {kind}" for kind in count))
    picture.text(20, top + n * size + 42, "F full: no mask is looked at.   P partial: a bit per pair.   E empty: never "
                 "computed.")
    return picture.svg()


def cut(index, parts, n):  # the first n mod parts runs hold one more
    begin = index * (n // parts) + min(index, n % parts)
    return list(range(begin, begin + n // parts + (index < n % parts)))


def positions(partition, rank, world, n):
    if partition == "striped":
        return list(range(rank, n, world))
    if partition == "zigzag":
        return cut(rank, 2 * world, n) + cut(2 * world - 1 - rank, 2 * world, n)
    return cut(rank, world, n)


def deal():
    picture, size, y = Picture(), 26, 16
    for n in (16, 19):
        picture.text(16, y + 10, f"{n} tokens, 4 ranks", 13, weight="bold")
        for partition in ("contiguous", "striped", "zigzag"):
            picture.text(16, y + 38, partition)
            for rank, p in [(rank, p) for rank in range(4) for p in positions(partition, rank, 4, n)]:
                picture.rect(104 + p * size, y + 22, size, 24, RANKS[rank], PAPER)
                picture.text(104 + p * size + size / 2, y + 38, str(p), 11, INK, "middle")
            y += 30
        y += 40
    for rank in range(4):
        picture.rect(104 + rank * 90, y - 12, 16, 16, RANKS[rank])
        picture.text(126 + rank * 90, y + 1, f"rank {rank}")
    return picture.svg()


def work():
    picture, n, world = Picture(), 16, 4
    for k, partition in enumerate(("contiguous", "striped", "zigzag")):
        x, grid = 16 + k * 300, Grid(f"{partition}: who computes what", n, n, "j <= i")
        owner = {p: rank for rank in range(world) for p in positions(partition, rank, world, n)}
        grid.draw(picture, x, 12, 14, owner)
        # In step s of a one-way ring, rank r has the keys of rank r - s.
        steps = [[sum((owner[i], owner[j]) == (r, (r - s) % world) for i, j in grid.seen) for r in range(world)]
                 for s in range(world)]
        table = [[f"rank {rank}" for rank in range(world)] + ["slowest"]] + [row + [max(row)] for row in steps]
        table.append([sum(row[c] for row in table[1:]) for c in range(world + 1)])
        for s, row in enumerate(table):
            y, head = 292 + s * 24, ["", *(f"step {s}" for s in range(world)), "sum"][s]
            picture.text(x, y + 15, head, 11, MUTED)
            for c, number in enumerate(row):
                if 0 < s <= world and c < world:
                    picture.rect(x + 48 + c * 44, y, 42, 22, RANKS[c] if number else HIDDEN)
                picture.text(x + 69 + c * 44, y + 15, str(number), 11.5, RED if c == world else INK, "middle",
                             "bold" if s > world else "normal")
    return picture.svg()


# ----------------------------------------------------------------------------------------------- numerics

def wavefront_times(panels, blocks, threads, needed):
    """{(panel, block): (tick, thread)}. Free threads take the panels in order; a panel adds to a block's dq when all
    earlier panels have."""
    done, busy, waiting, tick = {}, {}, list(range(panels)), 0
    while waiting or busy:
        tick, before = tick + 1, dict(done)
        for thread in range(threads):
            if thread not in busy and waiting:
                panel = waiting.pop(0)
                busy[thread] = panel, [b for b in range(blocks) if needed(panel, b)]
        for thread, (panel, left) in list(busy.items()):
            if all((p, left[0]) in before for p in range(panel) if needed(p, left[0])):
                done[panel, left.pop(0)] = (tick, thread)
                if not left:
                    del busy[thread]
    return done


def wavefront():
    picture, size, top = Picture(), 34, 62
    for k, (title, needed) in enumerate([("full", lambda p, b: True), ("causal", lambda p, b: b >= p)]):
        left, times = 84 + k * 380, wavefront_times(6, 8, 3, needed)
        picture.text(left, 24, f"{title}: 6 panels of keys, 3 threads", 13, weight="bold")
        for p, b in [(p, b) for p in range(6) for b in range(8)]:
            x, y, (tick, thread) = left + b * size, top + p * size, times.get((p, b), ("", -1))
            picture.rect(x, y, size, size, HIDDEN if thread < 0 else RANKS[thread], PAPER)
            picture.text(x + size / 2, y + 21, str(tick), 12, INK, "middle")
        for b in range(8):
            picture.text(left + b * size + size / 2, top - 8, f"dq {b}", 11, MUTED, "middle")
        for p in range(6):
            picture.text(left - 8, top + p * size + 21, f"panel {p}", 11, MUTED, "end")
    picture.text(84, top + 6 * size + 22, "Number: when.   Colour: which thread.   Down a column: the order in which "
                 "the block's dq is summed.")
    return picture.svg()


def growth():
    """Draws the table of docs/numerics.md, which has the commands that its numbers come from."""
    text = (HERE.parent / "numerics.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ((?:workers|annulus,|model,) .*) \|$", text, re.M)
    worlds, *rows = [row.split(" | ") for row in table]
    picture, left, top, wide, high = Picture(), 48, 44, 440, 210
    picture.text(16, 24, "rms error of out with P workers / with one", 13, weight="bold")
    for error in range(7):
        picture.path(f"M{left} {top + high - error * 35}h{wide}", stroke=LINE)
        picture.text(left - 8, top + high - error * 35 + 4, str(error), 11, MUTED, "end")
    for n, world in enumerate(worlds[1:]):
        picture.text(left + n * wide // 6, top + high + 18, f"P = {world}", 11, MUTED, "middle")
    for row, colour, lift in zip(rows, (SEEN, "#2c8a4b", RED), (-2, 14, 4)):
        points = [(left + n * wide // 6, round(top + high - 35 * float(error), 1)) for n, error in enumerate(row[1:])]
        picture.path("M" + "L".join(f"{x} {y}" for x, y in points), stroke=colour, width=2.5)
        picture.text(left + wide + 10, points[-1][1] + lift, row[0], 12, colour, weight="bold")
    return picture.svg()


GRIDS = {"causal": (CAUSAL, 5), "window": (WINDOW, 3), "chunked": (CHUNKED, 2), "segments": (PACKED, 3),
         "data": (DATA, 2), "algebra": (ALGEBRA, 3)}


def pictures():
    """{name: SVG}."""
    drawn = {name: sheet(grids, columns) for name, (grids, columns) in GRIDS.items()}
    return drawn | {function.__name__: function() for function in (tiles, deal, work, wavefront, growth)}


if __name__ == "__main__":
    for name, svg in pictures().items():
        (HERE / f"{name}.svg").write_text(svg, encoding="utf-8")
