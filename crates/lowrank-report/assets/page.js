// Draws the page from the JSON in #data. Every figure is a function from that data to an ECharts option, so that a change of
// theme or width can redraw it. Text from the data is only inserted as text, never as markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const PROJECTIONS = ["gate", "down", "up"];
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
/** Colours of the experts' lines, distinct in both themes and for most colour-blind people (Paul Tol's bright scheme). */
const LINES = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999", "#ee7733"];
const figures = [];

// ---- elements

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") element.className = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function section(id, title, hint) {
  const element = el("section", { id }, el("h2", {}, title));
  if (hint) element.append(el("p", { class: "hint" }, hint));
  document.getElementById("main").append(element);
  return element;
}

/** A figure that `option()` draws, now and whenever theme or width change. */
function figure(parent, id, caption, option, heightPx) {
  const chart = el("div", { class: "chart", id, role: "img", "aria-label": caption });
  if (heightPx) chart.style.height = `${heightPx}px`;
  parent.append(el("figure", {}, el("figcaption", {}, el("h3", {}, caption)), chart));
  figures.push({ chart, option });
}

function table(parent, header, rows, kind = "") {
  const cell = (tag, value, at) =>
    el(tag, { class: typeof rows[0]?.[at] === "number" || header[at].endsWith("#") ? "number" : "text" }, value);
  const head = header.map((name, at) => cell("th", name.replace(/#$/, ""), at));
  const body = rows.map((row) => el("tr", {}, ...row.map((value, at) => cell("td", value ?? "–", at))));
  parent.append(el("div", { class: "scroll" }, el("table", { class: kind }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body))));
}

function tiles(parent, all) {
  const one = ([label, value, note, kind]) =>
    el("div", { class: "tile" }, el("div", { class: "label" }, label), el("div", { class: `value ${kind ?? ""}` }, value),
      el("div", { class: "note" }, note ?? ""));
  parent.append(el("div", { class: "tiles" }, ...all.filter(Boolean).map(one)));
}

function key(parent, ...children) {
  parent.append(el("div", { class: "key" }, ...children));
}

function ramp() {
  const element = el("span", { class: "ramp" });
  element.style.background = `linear-gradient(to right, ${VIRIDIS.join(",")})`;
  return element;
}

// ---- numbers

const grouped = (count) => count.toLocaleString("en-US");
function digits(value, count = 4) {
  if (value === null || value === undefined) return "–";
  // Not five zeros before the first digit.
  const small = value !== 0 && Math.abs(value) < 1e-4;
  return small ? Number(value).toExponential(count - 1) : Number(value).toPrecision(count);
}
const percent = (part, whole) => `${(100 * part / whole).toFixed(2)}\u00a0%`;
const margin = (error, show) => (error === null || error === undefined ? "" : `± ${show(error)}`);

function bytes(count) {
  for (const [power, unit] of [[12, "TB"], [9, "GB"], [6, "MB"], [3, "kB"]]) {
    if (count >= 10 ** power) return `${(count / 10 ** power).toFixed(2)}\u00a0${unit}`;
  }
  return `${count}\u00a0B`;
}

function params(count, precision) {
  for (const [power, unit] of [[9, "B"], [6, "M"], [3, "k"]]) {
    const scaled = count / 10 ** power;
    if (scaled >= 1) return `${precision ? Number(scaled.toPrecision(precision)) : scaled.toFixed(2)}\u00a0${unit}`;
  }
  return String(count);
}

const range = (count) => Array.from({ length: count }, (_, index) => index);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- options

const SAFE = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const escaped = (text) => String(text).replace(/[&<>"]/g, (character) => SAFE[character]);
const lines = (...all) => all.filter(Boolean).map(escaped).join("<br>");

function base(extra) {
  return {
    animation: false,
    textStyle: { color: css("--ink"), fontFamily: "system-ui, sans-serif" },
    tooltip: {
      confine: true,
      backgroundColor: css("--card"),
      borderColor: css("--line"),
      textStyle: { color: css("--ink"), fontSize: 12 },
      // The tooltip stays inside its figure, so it must fit into a narrow one.
      extraCssText: "max-width: min(88vw, 26rem); white-space: normal; overflow-wrap: anywhere;",
      ...extra.tooltip,
    },
    ...Object.fromEntries(Object.entries(extra).filter(([name]) => name !== "tooltip")),
  };
}

function axis(extra) {
  return {
    nameLocation: "middle",
    nameGap: 26,
    nameTextStyle: { color: css("--faint") },
    axisLine: { lineStyle: { color: css("--line") } },
    axisTick: { lineStyle: { color: css("--line") } },
    axisLabel: { color: css("--faint"), hideOverlap: true },
    splitLine: { lineStyle: { color: css("--line"), opacity: 0.6 } },
    ...extra,
  };
}

const legend = () => ({ top: 0, type: "plain", textStyle: { color: css("--ink") }, itemWidth: 16, itemHeight: 8 });

/** `cells`: [column, row, value or null, name]; null is drawn as left dense. */
function heatMap({ cells, columns, rows, low, high, columnName, rowName, tooltip, cellName }) {
  const paper = css("--paper");
  const style = { borderColor: paper, borderWidth: 1 };
  const pick = (wanted) =>
    cells.filter(([, , value]) => (value !== null) === wanted)
      .map(([column, row, value, id]) => ({ value: [column, row, wanted ? value : 0], name: id }));
  return base({
    tooltip: { formatter: ({ data: { name } }) => tooltip(name) },
    grid: { left: 44, right: 8, top: 8, bottom: 40 },
    xAxis: axis({ type: "category", data: columns, name: columnName, splitLine: { show: false } }),
    yAxis: axis({ type: "category", data: rows, name: rowName, inverse: true, splitLine: { show: false }, nameGap: 28 }),
    visualMap: [
      { type: "continuous", show: false, seriesIndex: 0, dimension: 2, min: low, max: high > low ? high : low + 1, inRange: { color: VIRIDIS } },
      { type: "piecewise", show: false, seriesIndex: 1, dimension: 2, pieces: [{ value: 0, color: css("--dense") }] },
    ],
    series: [
      { type: "heatmap", name: cellName, data: pick(true), itemStyle: style, emphasis: { itemStyle: { borderColor: css("--ink"), borderWidth: 2 } } },
      {
        type: "heatmap", name: "left dense", data: pick(false), itemStyle: style,
        label: { show: true, formatter: "–", color: css("--faint"), fontSize: 9 },
      },
    ],
  });
}

const heatHeight = (rows) => Math.max(180, Math.min(26, Math.max(11, 420 / rows)) * rows + 60);

// ---- sections of a checkpoint

function summary({ report, verification, cards }) {
  const part = section("summary", "What was removed");
  const [before, after] = [report.before, report.after];
  const removed = { params: before.params - after.params, bytes: before.bytes - after.bytes };
  const narrowed = new Set((report.experts ?? []).map((row) => `${row.layer}.${row.expert}`));
  const isNarrowed = (row) => narrowed.has(`${row.layer}.${row.expert}`);
  const factored = report.matrices.filter((row) => row.rank !== null).length;
  const dense = report.matrices.filter((row) => row.rank === null && !isNarrowed(row)).length;
  const smallest = cards.find((card) => card.room_after !== null);
  tiles(part, [
    ["Parameters", `${params(before.params)} → ${params(after.params)}`, `${grouped(removed.params)} removed, ${percent(removed.params, before.params)}`],
    ["Bytes of weights", `${bytes(before.bytes)} → ${bytes(after.bytes)}`, `${bytes(removed.bytes)} removed, ${percent(removed.bytes, before.bytes)}`],
    ["Smallest GPU that holds the weights", smallest ? `${smallest.card_gb} GB` : "none of these", smallest ? `${bytes(smallest.room_after)} remain for caches and activations` : "the weights need more than one GPU"],
    ["Expert matrices", `${factored} of ${report.matrices.length}`,
      `factored${narrowed.size > 0 ? `; ${narrowed.size} experts narrowed` : ""}; ${dense} left dense`],
    verification
      ? ["Verification", verification.verdict, `${verification.findings.length} findings`, verification.verdict === "passed" ? "good" : "bad"]
      : ["Verification", "not yet", "run lowrank-compress verify"],
  ]);
  const fits = (room) => (room === null ? "no" : `yes, ${bytes(room)} left`);
  const rows = cards.map((card) => [`${card.card_gb} GB`, fits(card.room_before), fits(card.room_after)]);
  table(part, ["GPU memory", "Held the original weights", "Holds the compressed weights"], rows);
}

function perLayer({ layers }) {
  const part = section("layers", "Parameters of the experts by layer");
  const bars = (name, colour, values) => ({ type: "bar", stack: "all", name, data: values, itemStyle: { color: css(colour) } });
  figure(part, "chart-layers", "Kept and removed", () => base({
    tooltip: { trigger: "axis", axisPointer: { type: "shadow" }, valueFormatter: (value) => grouped(value) },
    legend: legend(),
    grid: { left: 64, right: 12, top: 36, bottom: 40 },
    xAxis: axis({ type: "category", name: "layer", data: layers.map((row) => row.layer), splitLine: { show: false } }),
    yAxis: axis({ type: "value", axisLabel: { color: css("--faint"), formatter: (value) => params(value, 3) } }),
    series: [
      bars("kept", "--accent", layers.map((row) => row.params_after)),
      bars("removed", "--dense", layers.map((row) => row.params_before - row.params_after)),
    ],
  }), 260);
}

/** Rounds up to 1, 2 or 5 times a power of ten. */
function roundedUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * (1 - 1e-9));
}

function roundedDown(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [5, 2, 1].find((step) => step * power <= value * (1 + 1e-9));
}

/** The curve's height at a rank, interpolated linearly on logarithmic axes. */
function heightAt(index, sigma, rank) {
  const after = index.findIndex((i) => i >= rank);
  if (after <= 0 || index[after] === rank) return sigma[Math.max(after, 0)];
  const [x0, x1, y0, y1] = [index[after - 1], index[after], sigma[after - 1], sigma[after]].map(Math.log);
  return Math.exp(y0 + (y1 - y0) * (Math.log(rank) - x0) / (x1 - x0));
}

function spectra({ report, spectra: curves }) {
  const part = section("spectra", "Singular values and chosen ranks", curves
    ? "One line per routed expert. The dot marks the rank that was kept; a matrix without a dot was left dense. The flatter a line, the larger the truncation error."
    : "The ranks of this checkpoint were given, so no spectra were taken.");
  if (!curves) return;
  const ranks = new Map(report.matrices.map((row) => [row.name, row.rank]));
  const places = new Map(report.matrices.map(({ name, layer, expert, projection }) => [name, { layer, expert, projection }]));
  const rows = curves.matrices.map((row) => ({ ...row, ...places.get(row.name) }));
  // Layers without experts have no curves.
  const layers = [...new Set(rows.map((row) => row.layer))];
  const experts = 1 + Math.max(...rows.map((row) => row.expert));
  const select = el("select", { id: "spectra-layer", "aria-label": "layer" }, ...layers.map((layer) => el("option", { value: layer }, `layer ${layer}`)));
  const panels = el("div", { class: "panels" });
  const shade = (expert) => LINES[expert % LINES.length];
  key(part, "expert", ...range(experts).map((expert) => {
    const swatch = el("span", { class: "swatch" });
    swatch.style.background = shade(expert);
    return el("span", {}, swatch, ` ${expert}`);
  }));
  part.append(select, panels);
  // One scale for all panels and layers, so that they can be compared.
  const heights = rows.flatMap((row) => row.sigma).filter((sigma) => sigma > 0);
  const [low, high] = [roundedDown(Math.min(...heights)), roundedUp(Math.max(...heights))];
  for (const projection of PROJECTIONS) {
    figure(panels, `chart-spectra-${projection}`, projection, () => {
      const here = rows.filter((row) => row.layer === Number(select.value) && row.projection === projection);
      const drawn = (row) => curves.index.map((i, at) => [i, row.sigma[at]]).filter(([, sigma]) => sigma > 0);
      const cuts = here.filter((row) => ranks.get(row.name) !== null).map((row) => {
        const rank = ranks.get(row.name);
        return { name: row.name, value: [rank, heightAt(curves.index, row.sigma, rank)], itemStyle: { color: shade(row.expert) } };
      });
      return base({
        tooltip: {
          trigger: "item",
          formatter: ({ seriesName, name, value }) => (seriesName === "cut"
            ? lines(name, `rank ${value[0]}, σ ≈ ${digits(value[1])}`)
            : lines(seriesName, `σ at ${value[0]}: ${digits(value[1], 5)}`)),
        },
        grid: { left: 48, right: 12, top: 12, bottom: 40 },
        xAxis: axis({ type: "log", name: "i", min: 1, max: curves.index.at(-1), axisLabel: { color: css("--faint"), hideOverlap: true, formatter: (i) => grouped(Math.round(i)) } }),
        yAxis: axis({ type: "log", min: low, max: high, axisLabel: { color: css("--faint"), formatter: (value) => String(Number(value.toPrecision(3))) } }),
        series: [
          ...here.map((row) => ({
            type: "line", name: row.name, data: drawn(row), symbol: "circle", symbolSize: 6, showSymbol: false, triggerLineEvent: true,
            lineStyle: { width: 1.25, color: shade(row.expert) }, itemStyle: { color: shade(row.expert) }, emphasis: { lineStyle: { width: 3 } },
          })),
          { type: "scatter", name: "cut", data: cuts, symbolSize: 9, z: 5, itemStyle: { borderColor: css("--ink"), borderWidth: 1 } },
        ],
      });
    });
  }
  select.addEventListener("change", drawAll);
}

function heatMaps({ report, error_basis }) {
  const rows = report.matrices;
  const byName = new Map(rows.map((row) => [row.name, row]));
  const layers = 1 + Math.max(...rows.map((row) => row.layer));
  const isShared = (row) => row.expert === "shared";
  const routed = 1 + Math.max(...rows.filter((row) => !isShared(row)).map((row) => row.expert));
  const columns = [...range(routed), ...(rows.some(isShared) ? ["shared"] : [])];
  const widths = new Map((report.experts ?? []).map((row) => [`${row.layer}.${row.expert}`, row.width]));
  const shared = new Set(report.shared_base_layers ?? []);
  const besideBase = (row) => row.rank !== null && !isShared(row) && shared.has(row.layer);
  const widthOf = (row) => widths.get(`${row.layer}.${row.expert}`) ?? null;
  const tooltip = (name) => {
    const row = byName.get(name);
    return lines(
      row.name,
      `[${row.shape.join(", ")}]: ${row.rank === null ? (widthOf(row) === null ? "left dense" : "not factored") : `rank ${row.rank}, ${row.route}`}`,
      widthOf(row) !== null && `${widthOf(row)} channels stay`,
      besideBase(row) && "beside a base that the experts of its layer share",
      row.rank !== null && `relative error ${digits(row.relative_error, 5)}`,
      typeof row.calibrated_error === "number" && `in the calibrated norm, before rounding ${digits(row.calibrated_error, 5)}`,
      row.excess_over_optimum !== null && `excess over the optimum of this rank ${digits(row.excess_over_optimum, 2)}`,
      row.round_trip_error !== undefined && `error of rounding to its number format ${digits(row.round_trip_error, 3)}`,
    );
  };
  const group = (id, title, hint, value, show, absent = "left dense", panelsOf = PROJECTIONS) => {
    const part = section(id, title, hint);
    const known = rows.map(value).filter((one) => one !== null);
    const [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
    key(part, el("span", {}, known.length ? show(low) : "–"), ramp(), el("span", {}, known.length ? show(high) : "–"), el("span", { class: "swatch" }), absent);
    const panels = el("div", { class: "panels" });
    part.append(panels);
    for (const projection of panelsOf) {
      const cells = rows.filter((row) => row.projection === projection).map((row) => [isShared(row) ? routed : row.expert, row.layer, value(row), row.name]);
      figure(panels, `chart-${id}-${projection}`, projection, () => heatMap({
        cells, columns, rows: range(layers), low, high, columnName: "expert", rowName: "layer", tooltip, cellName: id,
      }), heatHeight(layers));
    }
  };
  if (widths.size > 0) {
    group("widths", "Width of every expert", "Channels that stay. Hover over a cell or tap it for details of its gate matrix.",
      widthOf, String, "all channels", ["gate"]);
  }
  const ofBases = shared.size > 0 ? ` In layers ${[...shared].join(", ")} the experts share a base, and ranks are those of the differences from it.` : "";
  group("ranks", "Rank of every expert matrix", `Hover over a cell or tap it for details of its matrix.${ofBases}`, (row) => row.rank, String);
  group("errors", "Relative error of every expert matrix", `‖W − Ŵ‖ / ‖W‖ ${error_basis}.`,
    (row) => (row.rank === null && widthOf(row) === null ? null : row.relative_error), (value) => digits(value, 3));
}

function coverage({ report }) {
  const tokens = report.calibration?.tokens_per_expert;
  if (!tokens) return;
  const part = section("coverage", "Calibration tokens routed to each expert", "The fewer tokens an expert received, the less the calibration knows about its use.");
  const unrouted = report.calibration.unrouted_experts ?? [];
  if (unrouted.length > 0) {
    const [shown, more] = [unrouted.slice(0, 16).join(", "), unrouted.length - 16];
    part.append(el("p", { class: "hint", id: "unrouted" },
      `Experts without any token, compressed by their weights alone (${grouped(unrouted.length)}): ${shown}${more > 0 ? ` and ${grouped(more)} more` : ""}`));
  }
  const cells = tokens.flatMap((row, layer) => row.map((count, expert) => [expert, layer, count, `${layer} ${expert}`]));
  const counts = cells.map(([, , count]) => count);
  const [low, high] = [Math.min(...counts), Math.max(...counts)];
  key(part, el("span", {}, grouped(low)), ramp(), el("span", {}, grouped(high)));
  figure(part, "chart-coverage", "Tokens", () => heatMap({
    cells, columns: range(tokens[0].length), rows: range(tokens.length), low, high, columnName: "expert", rowName: "layer", cellName: "tokens",
    tooltip: (name) => {
      const [layer, expert] = name.split(" ").map(Number);
      return lines(`layer ${layer}, expert ${expert}`, `${grouped(tokens[layer][expert])} tokens`);
    },
  }), heatHeight(tokens.length));
}

function layerErrors({ layers, verification }) {
  const part = section("layer-errors", "Error by layer");
  const measured = verification?.outcome?.layers ?? null;
  part.append(el("p", { class: "hint" }, measured
    ? "Weights: root mean square of ‖W − Ŵ‖ / ‖W‖ over the layer's expert matrices. Local: the output of the layer's MoE block on the original model's inputs. Propagated: the hidden states after the layer, with all earlier layers compressed too."
    : "Weights: root mean square of ‖W − Ŵ‖ / ‖W‖ over the layer's expert matrices. To measure the error of the layers' outputs on a text, run lowrank-compress verify."));
  const series = (name, colour, values) => ({
    type: "line", name, data: values, symbolSize: 6, lineStyle: { color: css(colour) }, itemStyle: { color: css(colour) },
  });
  figure(part, "chart-layer-errors", "Relative error", () => base({
    tooltip: { trigger: "axis", valueFormatter: (value) => digits(value) },
    legend: legend(),
    grid: { left: 48, right: 12, top: 36, bottom: 40 },
    xAxis: axis({ type: "category", name: "layer", data: layers.map((row) => row.layer), splitLine: { show: false } }),
    yAxis: axis({ type: "value", min: 0 }),
    series: [
      series("weights", "--third", layers.map((row) => row.weight_error)),
      ...(measured ? [series("local", "--accent", measured.map((row) => row.local)), series("propagated", "--second", measured.map((row) => row.propagated))] : []),
    ],
  }));
}

function quality({ verification }) {
  const part = section("quality", "Original and compressed model on the same text");
  const outcome = verification?.outcome;
  const logits = outcome?.logits;
  if (!logits) {
    part.append(el("p", { class: "hint" }, verification
      ? "The models were not run, or a value was not finite; see the findings below."
      : "Not measured yet. Run lowrank-compress verify --original BASE --compressed THIS"));
    return;
  }
  part.append(el("p", { class: "hint" }, `${outcome.text.source}: ${grouped(outcome.text.tokens)} tokens in ${grouped(outcome.text.sequences)} windows, on ${outcome.engine}`));
  tiles(part, [
    ["Perplexity", `× ${logits.perplexity_ratio.toFixed(4)}`, margin(logits.perplexity_ratio_error, (error) => error.toFixed(4))],
    ["Mean KL, nats per token", logits.mean_kl.toFixed(5), `${margin(logits.mean_kl_error, (error) => error.toFixed(5))}; largest ${digits(logits.max_kl, 3)}`],
    ["Same top-1 token", `${(100 * logits.top1_agreement).toFixed(2)} %`, margin(logits.top1_error, (error) => `${(100 * error).toFixed(2)} %`)],
  ]);
  const values = [["original", logits.perplexity_original, "--dense"], ["compressed", logits.perplexity_compressed, "--accent"]];
  figure(part, "chart-perplexity", "Perplexity", () => base({
    tooltip: { trigger: "item", valueFormatter: (value) => digits(value, 6) },
    grid: { left: 84, right: 64, top: 8, bottom: 28 },
    xAxis: axis({ type: "value", min: 0 }),
    yAxis: axis({ type: "category", data: values.map(([name]) => name), inverse: true, splitLine: { show: false } }),
    series: [{
      type: "bar", name: "perplexity", barMaxWidth: 28,
      label: { show: true, position: "right", color: css("--ink"), formatter: ({ value }) => value.toFixed(3) },
      data: values.map(([, value, colour]) => ({ value, itemStyle: { color: css(colour) } })),
    }],
  }), 130);
}

function findings({ verification }) {
  if (!verification?.findings.length) return;
  const part = section("findings", "Findings of the verification");
  table(part, ["Kind", "Where", "Finding"], verification.findings.map((one) => [one.kind, one.name, one.detail]));
}

function provenance({ report }) {
  const part = section("provenance", "Base model and settings");
  part.classList.add("long");
  const flat = (value) => {
    if (Array.isArray(value)) return value.length ? value.map(flat).join(", ") : "none";
    if (typeof value === "number" && Number.isInteger(value)) return grouped(value);
    return value !== null && typeof value === "object" ? JSON.stringify(value) : String(value ?? "none");
  };
  const { budget, calibration } = report;
  // Report version 1 had no recipe and kept some settings with the calibration.
  const { gate_weight, target, blend } = calibration ?? {};
  const recipe = report.recipe ?? { ...report.settings, ...(calibration ? { gate_weight, target, blend } : {}) };
  const ofCalibration = /^(calibrat|gate|shrinkage|sensitivity-tokens|propagate|target-interpolation)/;
  const isShown = ([name]) => !["remove", "ranks"].includes(name) && (calibration || !ofCalibration.test(name));
  const settings = Object.entries(recipe).filter(isShown);
  table(part, ["Setting", "Value"], [
    ["Tool", `${report.tool} ${report.version}`],
    ["Base model", report.base_model.id ?? "given as a directory"],
    ["Revision", report.base_model.revision],
    ["Storage of factors", report.storage],
    ["Budget", budget && `remove at least ${grouped(budget.asked)} ${budget.unit}; ${grouped(budget.overshoot)} more were removed`],
    ["Predicted error above the optimum by at most", typeof report.optimality?.duality_gap === "number" ? percent(report.optimality.duality_gap, 1) : null],
    ...settings.map(([name, value]) => [name.replaceAll(/[_-]/g, " "), flat(value)]),
    ["Decomposed on", report.algebra],
    ["Calibrated on", calibration ? `${calibration.texts.map((text) => text.source).join(", ")}: ${grouped(calibration.texts.reduce((sum, text) => sum + text.tokens, 0))} tokens` : "no text: errors are those of the weights"],
    ...(calibration ? [
      ["Tokens, BLAKE3", el("code", {}, calibration.tokens_blake3)],
      ["Calibration run on", calibration.engine],
    ] : []),
  ]);
  baseFiles(part, report.base_model);
}

function baseFiles(part, { files: all }) {
  const files = el("details", {}, el("summary", {}, `${all.length} files of the base model`));
  part.append(files);
  table(files, ["File", "Bytes#", "SHA-256"], all.map((file) => [el("code", {}, file.name), grouped(file.bytes), el("code", {}, file.sha256)]));
}

// ---- sections of a sweep

const settingText = (value) => {
  if (value === undefined || value === null) return "–";
  if (Array.isArray(value)) return value.length ? value.map(String).join(" | ") : "none";
  return String(value);
};

/** A row, the values derived from it, and its label. */
const pointsOf = ({ header, rows, derived }) => rows.map((row, at) => ({
  ...row, ...derived[at],
  label: header.axes.filter((axis) => axis in row.settings).map((axis) => `${axis} ${settingText(row.settings[axis])}`).join(", "),
}));

function sweepSummary({ header, rows }) {
  const part = section("sweep-summary", "Overview");
  const count = (status) => rows.filter((row) => row.status === status).length;
  const verified = rows.filter((row) => row.mean_kl !== null);
  const sizes = rows.filter((row) => row.params !== null).map((row) => row.params);
  tiles(part, [
    ["Base model", params(header.params_before), `${grouped(header.params_before)} parameters, ${bytes(header.bytes_before)}`],
    ["Points", grouped(rows.length), `${count("planned")} planned, ${count("verified")} compressed and verified`],
    ["Failed", grouped(count("failed")), "reasons in the table below", count("failed") ? "bad" : ""],
    sizes.length ? ["Remaining parameters", `${params(Math.min(...sizes))} – ${params(Math.max(...sizes))}`, `${percent(Math.min(...sizes), header.params_before)} – ${percent(Math.max(...sizes), header.params_before)} of the base`] : null,
    verified.length ? ["Mean KL, nats per token", `${digits(Math.min(...verified.map((row) => row.mean_kl)), 3)} – ${digits(Math.max(...verified.map((row) => row.mean_kl)), 3)}`, `${header.verification.text.source}, ${grouped(header.verification.text.tokens)} tokens`] : null,
  ]);
}

/** Parameters against an error: every point, and a line through the Pareto front. */
function pareto(points, error, onFront, errorName, more) {
  const known = points.filter((one) => one.params !== null && error(one) !== null);
  const at = (one) => ({ name: one.id, value: [one.params, error(one)] });
  const best = known.filter(onFront).sort((a, b) => a.params - b.params || error(a) - error(b));
  const byId = new Map(points.map((one) => [one.id, one]));
  const positive = known.every((one) => error(one) > 0);
  const values = known.map(error);
  const log = positive && known.length ? { type: "log", min: roundedDown(Math.min(...values)), max: roundedUp(Math.max(...values)) } : { type: "value" };
  return base({
    tooltip: {
      trigger: "item",
      formatter: ({ name, value }) => {
        const one = byId.get(name);
        return lines(`point ${one.point}`, one.label, `${grouped(one.params)} parameters, ${bytes(one.bytes)}`, `${errorName} ${digits(value[1], 5)}`, ...more(one));
      },
    },
    legend: legend(),
    grid: { left: 64, right: 16, top: 36, bottom: 44 },
    xAxis: axis({ type: "value", scale: true, name: "remaining parameters", axisLabel: { color: css("--faint"), hideOverlap: true, formatter: (value) => params(value, 4) } }),
    yAxis: axis({ ...log, axisLabel: { color: css("--faint"), formatter: (value) => String(Number(value.toPrecision(3))) } }),
    series: [
      { type: "line", name: "Pareto front", data: best.map(at), symbol: "circle", symbolSize: 9, z: 4, lineStyle: { color: css("--accent") }, itemStyle: { color: css("--accent") } },
      { type: "scatter", name: "other points", data: known.filter((one) => !onFront(one)).map(at), symbolSize: 7, itemStyle: { color: css("--second"), opacity: 0.75 } },
    ],
  });
}

function measuredCurve(sweep) {
  const part = section("measured", "Size and measured error", sweep.rows.some((row) => row.mean_kl !== null)
    ? "The points that were compressed and compared with the original on the same text. Lower and further left is better. Hover over a point or tap it for its settings."
    : "No point was compressed. To compress the points on the Pareto front, set compress = \"pareto\" in the config.");
  const points = pointsOf(sweep);
  if (!points.some((one) => one.mean_kl !== null)) return;
  const measured = (one) => [
    one.mean_kl !== null && `perplexity × ${one.perplexity_ratio.toFixed(4)}, same top-1 token ${(100 * one.top1_agreement).toFixed(2)} %`,
    one.predicted_error !== null && `predicted ${digits(one.predicted_error, 4)} (${one.scale})`,
  ];
  figure(part, "chart-measured", "Mean KL(original ‖ compressed), nats per token", () => pareto(points, (one) => one.mean_kl, (one) => one.on_measured_front, "mean KL", measured), 340);
}

function predictedCurves(sweep) {
  const part = section("predicted", "Size and predicted error", "Every planned point. Predicted errors can be compared only within one scale (the same sensitivity and calibration text); choose the scale here.");
  const points = pointsOf(sweep).filter((one) => one.scale !== null);
  const scales = [...new Set(points.map((one) => one.scale))].sort();
  if (!scales.length) return;
  const select = el("select", { id: "scale", "aria-label": "scale" }, ...scales.map((scale) => el("option", { value: scale }, scale)));
  part.append(select);
  const more = (one) => [
    typeof one.duality_gap === "number" && `above the optimum by at most ${digits(100 * one.duality_gap, 2)} %`,
    one.mean_kl !== null && `measured: mean KL ${digits(one.mean_kl, 4)}`,
  ];
  figure(part, "chart-predicted", "Predicted error", () => pareto(points.filter((one) => one.scale === select.value), (one) => one.predicted_error, (one) => one.on_front, "predicted", more), 340);
  select.addEventListener("change", drawAll);
}

function pointTable(sweep) {
  const part = section("points", "All points");
  part.classList.add("long");
  const points = pointsOf(sweep);
  const { axes } = sweep.header;
  const number = (one) => (one.page ? el("a", { href: one.page }, String(one.point)) : String(one.point));
  const known = (value, show) => (value === null ? null : show(value));
  const card = (one) => known(one.bytes, () => (one.smallest_card_gb ? `${one.smallest_card_gb} GB` : "none"));
  const best = (one) => [one.on_front && "predicted", one.on_measured_front && "measured"].filter(Boolean).join(", ");
  const failed = points.some((one) => one.error !== null);
  const rows = points.map((one) => [
    number(one), one.status, known(one.params, grouped), known(one.bytes, bytes), card(one), digits(one.predicted_error), digits(one.mean_kl),
    known(one.perplexity_ratio, (ratio) => ratio.toFixed(4)), known(one.top1_agreement, (share) => `${(100 * share).toFixed(2)}\u00a0%`), best(one),
    ...axes.map((axis) => settingText(one.settings[axis])), ...(failed ? [one.error ?? ""] : []),
  ]);
  const header = ["Point#", "Status", "Parameters#", "Bytes#", "Smallest GPU#", "Predicted error#", "Mean KL#", "Perplexity ×#", "Same top-1 token#", "On Pareto front"];
  table(part, [...header, ...axes, ...(failed ? ["Error"] : [])], rows, "wide");
}

function sweepProvenance({ header }) {
  const part = section("provenance", "Base model and text");
  const text = header.verification?.text;
  table(part, ["Setting", "Value"], [
    ["Tool", `${header.tool} ${header.version}`],
    ["Base model", header.base_model.id ?? "given as a directory"],
    ["Revision", header.base_model.revision ?? "none"],
    ["Verified on", text ? `${text.source}: ${grouped(text.tokens)} tokens in ${grouped(text.sequences)} windows` : "nothing"],
    ["Tokens, BLAKE3", header.verification?.tokens_blake3 ?? "none"],
  ]);
  baseFiles(part, header.base_model);
}

// ---- the page

function drawAll() {
  for (const { chart, option } of figures) {
    const instance = echarts.getInstanceByDom(chart) ?? echarts.init(chart, null, { renderer: "svg" });
    instance.resize();
    instance.setOption(option(), true);
  }
}

function watchWidths() {
  const observer = new ResizeObserver((entries) => entries.forEach(({ target }) => echarts.getInstanceByDom(target)?.resize()));
  figures.forEach(({ chart }) => observer.observe(chart));
}

function watchTheme() {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  dark.addEventListener("change", drawAll);
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    drawAll();
  });
  // Print in the light theme, whatever the screen shows.
  let screenTheme;
  window.addEventListener("beforeprint", () => {
    screenTheme = root.dataset.theme;
    root.dataset.theme = "light";
    drawAll();
  });
  window.addEventListener("afterprint", () => {
    if (screenTheme) root.dataset.theme = screenTheme;
    else delete root.dataset.theme;
    drawAll();
  });
}

document.getElementById("name").textContent = data.name;
document.getElementById("subtitle").textContent = data.subtitle;
const link = document.getElementById("download");
link.download = `${data.name}.report.json`;
link.addEventListener("click", () => {
  link.href = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
});
if (data.checkpoint) {
  for (const draw of [summary, quality, heatMaps, spectra, layerErrors, perLayer, coverage, findings, provenance]) draw(data.checkpoint);
}
if (data.sweep) {
  for (const draw of [sweepSummary, measuredCurve, predictedCurves, pointTable, sweepProvenance]) draw(data.sweep);
}
drawAll();
watchWidths();
watchTheme();
