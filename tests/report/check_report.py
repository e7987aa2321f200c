"""Opens report pages in headless Chromium and compares what is drawn with the documents that they were made from.

Reads `lowrank_report.json`, `lowrank_spectra.json` and `NAME.verification.json`, or `sweep.json`, `results.jsonl` and `results.csv` of a sweep,
itself; what the page derives is derived here once more. Leaves screenshots, and a print of each page, in --shots.
"""

import argparse
import csv
import json
import math
import re
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PROJECTIONS = ["gate", "down", "up"]
CARDS_GB = [16, 24, 40, 48, 80]

# What a chart holds, as ECharts normalised it, and what of it became SVG.
CHART = """id => {
  const element = document.getElementById(id);
  if (!element) return null;
  const series = echarts.getInstanceByDom(element).getOption().series;
  return {
    series: series.map(({ type, name, data }) => ({ type, name, data })),
    shapes: element.querySelectorAll("svg path").length,
    width: element.querySelector("svg").getBoundingClientRect().width,
    room: element.getBoundingClientRect().width,
  };
}"""
PIXEL = """([id, series, value]) => {
  const element = document.getElementById(id);
  element.scrollIntoView({ block: "center" });
  const box = element.getBoundingClientRect();
  const [x, y] = echarts.getInstanceByDom(element).convertToPixel({ seriesIndex: series }, value);
  return [box.left + x, box.top + y];
}"""
TOOLTIP = """id => [...document.getElementById(id).children].slice(1)
  .filter(one => getComputedStyle(one).visibility !== "hidden" && getComputedStyle(one).opacity !== "0")
  .map(one => one.innerText).join("\\n")"""


def place(name):
    layer, expert, projection = re.fullmatch(r".*layers\.(\d+)\..*experts\.(\d+)\.(w[123])", name).groups()
    projection = PROJECTIONS[int(projection[1]) - 1]
    return int(layer), int(expert), projection


def stored(row, storage, rank, width=None):
    m, n = row["shape"]
    if width is not None:
        m, n = (m, width) if place(row["name"])[2] == "down" else (width, n)
    if rank is None:
        return m * n
    return rank * (m + n) if storage == "uv" else rank * (m + n - rank)


def close(a, b):
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-12))


class Page:
    """One page, open."""

    def __init__(self, page, name):
        self.page, self.name, self.checks, self.hovered = page, name, 0, 0

    def check(self, condition, what):
        self.checks += 1
        if not condition:
            raise AssertionError(f"{self.name}: {what}")

    def same(self, found, wanted, what):
        self.check(found == wanted, f"{what}: found {found!r:.300}, wanted {wanted!r:.300}")

    def chart(self, id):
        chart = self.page.evaluate(CHART, id)
        self.check(chart is not None, f"{id} is not there")
        self.check(abs(chart["width"] - chart["room"]) <= 1, f"{id} is {chart['width']} wide in {chart['room']}")
        return chart

    def hover(self, id, series, value, *words):
        """Moves the mouse to a value and waits until the tooltip says these words."""
        x, y = self.page.evaluate(PIXEL, [id, series, value])
        self.page.mouse.move(x + 40, y + 40)
        self.page.mouse.move(x, y)
        for _ in range(40):
            said = self.page.evaluate(TOOLTIP, id)
            if all(word in said for word in words):
                self.hovered += 1
                return
            self.page.wait_for_timeout(25)
        raise AssertionError(f"{self.name}: {id} at {value} says {said!r}, wanted {words!r}")


def heat_maps(page, report):
    widths = {(row["layer"], row["expert"]): row["width"] for row in report.get("experts", [])}
    width_of = lambda row: widths.get((row["layer"], row["expert"]))
    if widths:
        gates = [row for row in report["matrices"] if place(row["name"])[2] == "gate"]
        cell = lambda row, height: (row["expert"], row["layer"], height, row["name"])
        narrowed = {cell(row, width_of(row)) for row in gates if width_of(row) is not None}
        whole = {cell(row, 0) for row in gates if width_of(row) is None}
        drawn = [{(*one["value"], one["name"]) for one in series["data"]} for series in page.chart("chart-widths-gate")["series"]]
        page.same(drawn, [narrowed, whole], "chart-widths-gate")
        row = next(row for row in gates if width_of(row) is not None)
        page.hover("chart-widths-gate", 0, [row["expert"], row["layer"]], row["name"], f"{width_of(row)} channels stay")
    else:
        page.check(page.page.locator("#chart-widths-gate").count() == 0, "widths from nowhere")
    is_shown = {
        "ranks": lambda row: row["rank"] is not None,
        "errors": lambda row: row["rank"] is not None or width_of(row) is not None,
    }
    for kind, value in [("ranks", lambda row: row["rank"]), ("errors", lambda row: row["relative_error"])]:
        shown = is_shown[kind]
        for projection in PROJECTIONS:
            id = f"chart-{kind}-{projection}"
            rows = [row for row in report["matrices"] if place(row["name"])[2] == projection]
            cell = lambda row, height: (place(row["name"])[1], place(row["name"])[0], height, row["name"])
            wanted = {cell(row, value(row)) for row in rows if shown(row)}
            dense = {cell(row, 0) for row in rows if not shown(row)}
            chart = page.chart(id)
            drawn = [{(*one["value"], one["name"]) for one in series["data"]} for series in chart["series"]]
            page.same(drawn, [wanted, dense], id)
            page.check(chart["shapes"] >= len(rows), f"{id}: {chart['shapes']} shapes for {len(rows)} matrices")
            factored = [row for row in rows if row["rank"] is not None]
            for row in factored[:1] + factored[-1:]:
                expert, layer, *_ = cell(row, 0)
                said = f"{row['relative_error']:.5g}"[:6]
                page.hover(id, 0, [expert, layer], row["name"], f"rank {row['rank']}, {row['route']}", said)
            for row in [row for row in rows if not shown(row)][:1]:
                expert, layer, *_ = cell(row, 0)
                said = "left dense" if width_of(row) is None else "not factored"
                page.hover(id, 1, [expert, layer], row["name"], said)


def error_basis(page, report):
    """Calibrated errors are of the stored values, all others of the factors before they were rounded."""
    factored = [row for row in report["matrices"] if row["rank"] is not None]
    calibrated = [row for row in factored if row.get("calibrated_error") is not None]
    said = page.page.inner_text("#errors")
    page.same("of the stored values" in said, bool(calibrated), "stored values")
    page.same("before rounding" in said, len(calibrated) < len(factored) or not factored, "before rounding")


def spectra(page, report, curves):
    if curves is None:
        page.check(page.page.locator("#chart-spectra-gate").count() == 0, "spectra from nowhere")
        page.check("no spectra were taken" in page.page.inner_text("#spectra"), "nothing said about spectra")
        return
    ranks = {row["name"]: row["rank"] for row in report["matrices"]}
    layers = 1 + max(place(row["name"])[0] for row in curves["matrices"])
    for layer in reversed(range(layers)):
        page.page.select_option("#spectra-layer", str(layer))
        for projection in PROJECTIONS:
            id = f"chart-spectra-{projection}"
            rows = [row for row in curves["matrices"] if place(row["name"])[0] == layer and place(row["name"])[2] == projection]
            chart = page.chart(id)
            *drawn, cut = chart["series"]
            wanted = [(row["name"], [list(point) for point in zip(curves["index"], row["sigma"])]) for row in rows]
            page.same([(series["name"], series["data"]) for series in drawn], wanted, f"{id}, layer {layer}")
            cuts = {(one["name"], one["value"][0]) for one in cut["data"]}
            page.same(cuts, {(row["name"], ranks[row["name"]]) for row in rows if ranks[row["name"]] is not None}, f"cuts of {id}")
            sigma = {row["name"]: dict(zip(curves["index"], row["sigma"])) for row in rows}
            for one in cut["data"]:
                rank, height = one["value"]
                points = sigma[one["name"]]
                above, below = max(i for i in points if i <= rank), min(i for i in points if i >= rank)
                page.check(points[below] * 0.999999 <= height <= points[above] * 1.000001, f"{one} is not on its curve")
            if layer == 0 and cut["data"]:
                # The last one drawn lies on top.
                one = cut["data"][-1]
                page.hover(id, len(drawn), one["value"], one["name"], f"rank {one['value'][0]}")


def layers(page, report, verification):
    count = 1 + max(place(row["name"])[0] for row in report["matrices"])
    of = [[row for row in report["matrices"] if place(row["name"])[0] == layer] for layer in range(count)]
    before = [sum(stored(row, "uv", None) for row in rows) for rows in of]
    widths = {(row["layer"], row["expert"]): row["width"] for row in report.get("experts", [])}
    width_of = lambda row: widths.get((row["layer"], row["expert"]))
    after = [sum(stored(row, report["storage"], row["rank"], width_of(row)) for row in rows) for rows in of]
    kept, removed = page.chart("chart-layers")["series"]
    page.same((kept["data"], removed["data"]), (after, [b - a for b, a in zip(before, after)]), "parameters of layers")
    page.same(sum(removed["data"]), report["before"]["params"] - report["after"]["params"], "the sum of the bars")

    series = {one["name"]: one["data"] for one in page.chart("chart-layer-errors")["series"]}
    rms = [math.sqrt(sum(row["relative_error"] ** 2 for row in rows) / len(rows)) for rows in of]
    page.check(all(close(a, b) for a, b in zip(series["weights"], rms)), f"weights: {series['weights']} {rms}")
    outcome = verification and verification["outcome"]
    page.same(set(series), {"weights", "local", "propagated"} if outcome else {"weights"}, "lines of errors")
    for name in ["local", "propagated"] if outcome else []:
        page.same(series[name], [row[name] for row in outcome["layers"]], name)


def quality(page, verification):
    text = page.page.inner_text("#quality")
    if verification is None:
        page.check("Not measured yet" in text, text)
        return
    logits = verification["outcome"]["logits"]
    bars = [one["value"] for one in page.chart("chart-perplexity")["series"][0]["data"]]
    page.same(bars, [logits["perplexity_original"], logits["perplexity_compressed"]], "perplexity")
    for shown in [f"{logits['perplexity_ratio']:.4f}", f"{logits['mean_kl']:.5f}", f"{100 * logits['top1_agreement']:.2f} %"]:
        page.check(shown in text, f"{shown} is not in {text!r}")


def summary(page, report, verification):
    text = page.page.inner_text("#summary").replace("\u00a0", " ")
    before, after = report["before"], report["after"]
    removed = before["params"] - after["params"]
    for shown in [f"{removed:,} removed", f"{100 * removed / before['params']:.2f} %", verification["verdict"] if verification else "not yet"]:
        page.check(shown in text, f"{shown} is not in {text!r}")
    rows = page.page.locator("#summary tbody tr").all_inner_texts()
    for gb, row in zip(CARDS_GB, rows, strict=True):
        fits = ["yes" if size["bytes"] <= gb * 10**9 else "no" for size in (before, after)]
        page.same([cell.split(",")[0] for cell in row.split("\t")], [f"{gb} GB", *fits], "card")


def coverage(page, report):
    tokens = report.get("calibration", {}).get("tokens_per_expert")
    if tokens is None:
        page.check(page.page.locator("#coverage").count() == 0, "tokens from nowhere")
        return
    unrouted = report["calibration"]["unrouted_experts"]
    told = page.page.locator("#unrouted")
    page.same(told.count(), int(bool(unrouted)), "unrouted experts are named where there are any")
    page.check(all(name in told.inner_text() for name in unrouted[:16]), "an unrouted expert is not named")
    drawn = {tuple(one["value"]) for one in page.chart("chart-coverage")["series"][0]["data"]}
    page.same(drawn, {(expert, layer, count) for layer, row in enumerate(tokens) for expert, count in enumerate(row)}, "tokens")
    page.hover("chart-coverage", 0, [1, 0], "layer 0, expert 1", f"{tokens[0][1]:,} tokens")


def provenance(page, report):
    text = page.page.evaluate("document.getElementById('provenance').textContent")
    calibration = report.get("calibration")
    more = [calibration["texts"][0]["source"], calibration["engine"]] if calibration else []
    for shown in [report["version"], report["storage"], *more, *[file["sha256"] for file in report["base_model"]["files"]]]:
        page.check(shown in text, f"{shown} is not there")


def documents(file):
    """What the page was made from: the checkpoint lies beside it."""
    name = file.name.removesuffix(".report.html")
    read = lambda path: json.loads(path.read_text()) if path.exists() else None
    folder = file.with_name(name)
    return (name, read(folder / "lowrank_report.json"), read(folder / "lowrank_spectra.json"), read(file.with_name(f"{name}.verification.json")))


def checkpoint(page, file):
    name, report, curves, verification = documents(file)
    shown = page.inside["checkpoint"]
    page.same((shown["report"], shown["spectra"], shown["verification"]), (report, curves, verification), "the data inside")
    page.same(page.page.inner_text("h1"), name, "title")
    summary(page, report, verification)
    quality(page, verification)
    heat_maps(page, report)
    error_basis(page, report)
    spectra(page, report, curves)
    layers(page, report, verification)
    coverage(page, report)
    provenance(page, report)


def front(points):
    """Ids of (id, size, error) that no other beats; sizes within a thousandth count as equal."""
    beats = lambda a, b: a[1] <= b[1] + b[1] // 1000 and a[2] <= b[2] and (a[1] < b[1] or a[2] < b[2])
    return {point[0] for point in points if not any(beats(other, point) for other in points)}


def curve(page, id, rows, key, *words):
    """A chart of sizes and errors; hovers its best and one that is beaten."""
    known = [row for row in rows if row["params"] is not None and row[key] is not None]
    best = front([(row["id"], row["params"], row[key]) for row in known])
    line, others = page.chart(id)["series"]
    place = lambda row: (row["id"], row["params"], row[key])
    drawn = lambda series: [(one["name"], *one["value"]) for one in series["data"]]
    page.same(set(drawn(line)), {place(row) for row in known if row["id"] in best}, f"front of {id}")
    page.same(set(drawn(others)), {place(row) for row in known if row["id"] not in best}, f"others of {id}")
    sizes = [size for _, size, _ in drawn(line)]
    page.same(sizes, sorted(sizes), f"the line of {id} runs to the right")
    for row in [row for row in known if row["id"] in best][:1]:
        value = "".join(f"{row[key]:.5g}"[:6])
        page.hover(id, 0, [row["params"], row[key]], f"point {row['point']}", f"{row['params']:,} parameters", value, *words)


def sweep(page, file):
    folder = file.parent
    header = json.loads((folder / "sweep.json").read_text())
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    page.same(page.page.inner_text("h1"), folder.name, "title")
    page.same((page.inside["sweep"]["header"], page.inside["sweep"]["rows"]), (header, rows), "the data inside")
    page.same([row["point"] for row in rows], list(range(1, len(rows) + 1)), "one row a point, in order")

    with open(folder / "results.csv", newline="") as table:
        lines = list(csv.DictReader(table))
    text = lambda value: "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    for row, line in zip(rows, lines, strict=True):
        for key in ["id", "status", "params", "bytes", "scale", "on_front"]:
            page.same(line[key], text(row[key]), f"{key} in results.csv")
        for key in ["predicted_error", "mean_kl", "perplexity_ratio", "plan_seconds"]:
            page.check((line[key] == "") == (row[key] is None) and close(float(line[key] or 0), row[key] or 0), f"{key} in results.csv")

    counted = page.page.inner_text("#sweep-summary").replace("\u00a0", " ")
    verified = [row for row in rows if row["status"] == "verified"]
    for shown in [f"{header['params_before']:,} parameters", f"{len(verified)} compressed and verified"]:
        page.check(shown in counted, f"{shown} is not in {counted!r}")

    curve(page, "chart-measured", rows, "mean_kl", header["axes"][0], "perplexity × ")
    scales = sorted({row["scale"] for row in rows if row["scale"] is not None})
    page.check(len(scales) > 1, "only one scale is tried")
    for scale in reversed(scales):
        page.page.select_option("#scale", scale)
        here = [row for row in rows if row["scale"] == scale]
        page.same({row["id"] for row in here if row["on_front"]}, front([(row["id"], row["params"], row["predicted_error"]) for row in here]), f"front of {scale}")
        curve(page, "chart-predicted", here, "predicted_error", header["axes"][0])

    shown = page.page.locator("#points tbody tr")
    page.same(shown.count(), len(rows), "rows of the table")
    for index in {0, len(rows) // 2, len(rows) - 1}:
        cells = shown.nth(index).locator("td").all_inner_texts()
        page.same(cells[:2], [str(rows[index]["point"]), rows[index]["status"]], "cells")
        page.check(f"{rows[index]['params']:,}" in cells, f"{cells} lack the parameters")
    links = page.page.locator("#points a").evaluate_all("all => all.map(one => one.getAttribute('href'))")
    page.same(links, [f"points/{row['id']}.report.html" for row in verified], "links to pages")
    page.check(all((folder / link).is_file() for link in links), "a link leads nowhere")
    page.check(header["verification"]["tokens_blake3"] in page.page.inner_text("#provenance"), "provenance")


def check(browser, file, shots):
    of_sweep = (file.parent / "sweep.json").exists()
    name = f"sweep-{file.parent.name}" if of_sweep else documents(file)[0]
    total = hovered = 0
    for view, scheme, width in [("light", "light", 1200), ("dark", "dark", 1200), ("narrow", "light", 400), ("narrow-dark", "dark", 400)]:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
        tab = context.new_page()
        trouble, requests = [], []
        tab.on("console", lambda message: trouble.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(file.resolve().as_uri())
        page = Page(tab, f"{name}, {view}")
        page.inside = json.loads(tab.inner_text("#data", timeout=1000) or tab.evaluate("document.getElementById('data').textContent"))
        (sweep if of_sweep else checkpoint)(page, file)
        tab.mouse.move(0, 0)
        page.check(tab.evaluate("document.documentElement.scrollWidth") <= width, "wider than the screen")
        tab.screenshot(path=shots / f"{name}-{view}.png", full_page=True)
        if view == "dark":
            tab.pdf(path=shots / f"{name}.pdf", format="A4")
        paper = lambda: tab.evaluate("getComputedStyle(document.body).backgroundColor")
        was = paper()
        page.same(was, "rgb(255, 255, 255)" if scheme == "light" else "rgb(18, 22, 29)", "paper")
        tab.click("#theme")
        page.check(paper() != was, "the button does not change the theme")
        tab.click("#theme")
        page.same(paper(), was, "the button twice")
        page.same(trouble, [], "trouble")
        page.same(requests, [file.resolve().as_uri()], "requests")
        total, hovered = total + page.checks, hovered + page.hovered
        context.close()
    print(f"{name}: {total} checks, {hovered} tooltips read")
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", required=True)
    parser.add_argument("--shots", type=Path, required=True)
    parser.add_argument("pages", type=Path, nargs="+")
    args = parser.parse_args()
    args.shots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        # Root may not use Chromium's sandbox; the pages are our own.
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        try:
            for page in args.pages:
                check(browser, page, args.shots)
        finally:
            browser.close()


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        sys.exit(f"error: {error}")
