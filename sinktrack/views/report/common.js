"use strict";

// The data, and what the user has chosen to see.
let { runs, epsilon, live, fields } = JSON.parse(document.getElementById("data").textContent);
const state = { run: 0, record: runs.map((run) => run.records.length - 1) };
const shown = () => runs[state.run];
/** What the address asks for: run, step, x, scale, and the fields chosen by the id of their list. */
const wanted = new URLSearchParams(location.hash.slice(1));
const shownRecord = () => shown().records[state.record[state.run]];

const $ = (id) => document.getElementById(id);
const range = (count) => [...Array(count).keys()];
const largest = (values, least) => values.reduce((top, value) => Math.max(top, value), least);

// Words and numbers.
const count = (value) => (value === null ? "–" : value.toLocaleString("en"));
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
const fixed = (value) => (value === null ? "–" : value.toFixed(2));
const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1).replace(/^-(0\.0)$/, "$1")} %`);
/** A number as its field writes it, by Python's format: .1%, .2f, +z.2f, .3g. */
const formatted = (value, form) => {
  if (value === null || value === undefined) return "–";
  const [, sign, digits, kind] = /^(\+?)z?\.(\d+)([%fg])$/.exec(form);
  const text = kind === "g" ? String(Number(value.toPrecision(digits))) : (kind === "%" ? 100 * value : value).toFixed(digits);
  const plain = /^-0(\.0*)?$/.test(text) ? text.slice(1) : text;
  return (sign && !plain.startsWith("-") ? "+" : "") + plain + (kind === "%" ? " %" : "");
};
/** A record's number as its field writes it. */
const told = (record, name) => formatted(record[name], fields[name].form);
/** For Plotly's templates, which know no z. */
const d3form = (form) => form.replace("z", "");
const sentence = (text) => text[0].toUpperCase() + text.slice(1);
const titled = (name) => fields[name].title + (fields[name].unit && !["share", "probability"].includes(fields[name].unit) ? ` (${fields[name].unit})` : "");
const between = (interval, form) => (interval ? `95 %: ${form(interval[0])} to ${form(interval[1])}` : "no interval");
/** Plotly takes some tags in names for markup. */
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const words = (kind) => kind.replaceAll("_", " ");
const element = (tag, text, parent, className = "") => {
  const made = parent.appendChild(document.createElement(tag));
  made.textContent = text;
  made.className = className;
  return made;
};
const row = (cells, parent, tag = "td") => {
  const made = element("tr", "", parent);
  for (const text of cells) element(tag, text, made);
  return made;
};

// Colours. Printing is always light, whatever the screen is.
const dark = window.matchMedia("screen and (prefers-color-scheme: dark)");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const scaleOf = (stops) => stops.map((stop, i) => [i / (stops.length - 1), stop]);
const depths = () => dark.matches
  ? ["#8c9bff", "#c07cf0", "#f2719f", "#ff9b62", "#ffd96b"]
  : ["#20307c", "#6d2a93", "#b8336f", "#e0632f", "#eba52a"];
const heats = () => dark.matches
  ? ["#1b2233", "#28487f", "#3a80b8", "#78c4c9", "#f6f3c4"]
  : ["#f3f7fd", "#b9d6f0", "#6aa6da", "#2b67b0", "#0f2a63"];
const mixed = (stops, fraction) => {
  const place = Math.min(Math.max(fraction, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const channel = (stop, i) => parseInt(stop.slice(1 + 2 * i, 3 + 2 * i), 16);
  const mix = (i) => Math.round(channel(stops[low], i) + (place - low) * (channel(stops[low + 1], i) - channel(stops[low], i)));
  return `rgb(${range(3).map(mix)})`;
};
const depthColour = (block, blocks) => mixed(depths(), block / Math.max(1, blocks));
const runColour = (run) => colour(`run-${run % 8}`);

// Charts.
const config = { displaylogo: false, responsive: true, modeBarButtons: [["resetScale2d", "toImage"]] };
const axis = (extra = {}) => ({
  gridcolor: colour("grid"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true,
  tickfont: { color: colour("muted") }, ...extra, title: { text: extra.title ?? "", font: { color: colour("muted") }, standoff: 8 },
});
const layout = (extra) => ({
  margin: { l: 48, r: 12, t: 10, b: 40 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
  font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 12, color: colour("ink") },
  hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
  legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }, hovermode: "closest", ...extra,
});
const bar = (title) => ({
  thickness: 10, outlinewidth: 0, len: 1, title: { text: title, side: "right", font: { color: colour("muted") } },
  tickfont: { color: colour("muted") },
});
