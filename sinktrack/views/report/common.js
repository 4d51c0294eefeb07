"use strict";

// The data, and what the user has chosen to see.
let { runs, epsilon, live, fields, compared, rate } = JSON.parse(document.getElementById("data").textContent);
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
/** Behind a number: its unit where a percent sign does not say it. */
const unitOf = (name) => (fields[name].unit && !["share", "probability", "block", "cosine"].includes(fields[name].unit) ? ` ${fields[name].unit}` : "");
/** An interval in words, also where it has no width that shows. */
const between = (interval, form) => {
  if (!interval) return "no interval";
  const [low, high] = interval.map(form);
  if (low !== high) return `95 %: ${low} to ${high}`;
  return interval[0] === interval[1] ? "every sequence gives the same" : "95 %: narrower than the last digit";
};
/** Plotly takes some tags in names for markup. */
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const words = (kind) => kind.replace("mlp", "MLP").replaceAll("_", " ");
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
const settings = () => [...new Set(runs.map((run) => run.setting))];
/** A colour each of eight; where runs are grouped, of eight settings; of more, of the run in detail alone. */
const runColour = (run) => {
  const [places, place] = compared ? [settings().length, settings().indexOf(runs[run].setting)] : [runs.length, run];
  if (places <= 8) return colour(`run-${place}`);
  return run === state.run ? colour("accent") : colour("gap");
};
/** No longer than so many characters, the end kept, which tells names apart. */
const short = (name, most) => (name.length <= most ? name : `${name.slice(0, Math.max(1, Math.floor(most / 3)))}…${name.slice(-Math.max(1, most - 1 - Math.max(1, Math.floor(most / 3))))}`);
/** Least and largest that an axis must show: one wild record, or one wild run of several, does not count.

Takes the values of each curve, nulls among them, by run. A last record may be a beginning, so it counts. */
const robustRange = (byRun) => {
  const calm = (values) => [1, -1].reduce((kept, sign) => {
    if (kept.length < 4) return kept;
    const order = kept.map((value) => sign * value);
    const wild = order.slice(0, -1).reduce((top, value, i) => (value > order[top] ? i : top), 0);
    const rest = order.filter((_, i) => i !== wild);
    const top = largest(rest, -Infinity);
    return order[wild] - top > 3 * (top + largest(rest.map((value) => -value), -Infinity)) ? kept.filter((_, i) => i !== wild) : kept;
  }, values);
  const known = byRun.map((curves) => curves.map((values) => values.filter((value) => value !== null && value !== undefined)));
  const all = known.flat(2);
  if (!all.length) return null;
  const [lows, highs] = [Math.min, Math.max].map((of) => known.map((curves) => curves.flatMap(calm).reduce((a, b) => of(a, b), of === Math.min ? Infinity : -Infinity)).filter(Number.isFinite).sort((a, b) => a - b));
  let [low, high] = [lows[0], highs.at(-1)];
  if (highs.length > 2 && high - highs.at(-2) > 3 * (highs.at(-2) - low)) high = highs.at(-2);
  if (lows.length > 2 && lows[1] - low > 3 * (high - lows[1])) low = lows[1];
  const [least, most] = [all.reduce((a, b) => Math.min(a, b)), all.reduce((a, b) => Math.max(a, b))];
  if (high <= low || most - least <= 5 * (high - low)) return { low: least, high: most, beyond: 0 };
  const room = 0.15 * (high - low);
  return { low: low - room, high: high + room, beyond: all.filter((value) => value < low - room || value > high + room).length };
};
/** Says how many values an axis leaves out. */
const beyondNote = (found, extra = {}) => (found?.beyond ? [{
  text: `${plural(found.beyond, "value")} beyond this axis`, xref: "paper", yref: "paper", x: 1, y: 1, xanchor: "right", yanchor: "bottom", showarrow: false, font: { color: colour("muted"), size: 11 }, ...extra,
}] : []);
/** Is there a number in it? */
const some = (values) => values.some((value) => value !== null && value !== undefined);
/** Says that a chart is empty on purpose. */
const emptyNote = (values, why = "none of it was measured") => (some(values) ? [] : [{
  text: why, xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, font: { color: colour("muted") },
}]);
/** Ticks of a log axis that do not touch: whole powers, or 1, 2, 5 of each, or round numbers between close ends. */
const logTicks = (values, most) => {
  const positive = values.filter((value) => value > 0);
  if (!positive.length) return {};
  const [low, high] = [positive.reduce((a, b) => Math.min(a, b)), positive.reduce((a, b) => Math.max(a, b))];
  const [first, last] = [Math.floor(Math.log10(low)) - 1, Math.ceil(Math.log10(high)) + 1];
  const powers = range(last - first + 1).map((i) => i + first);
  const within = (ticks) => ticks.filter((tick) => tick >= low / 1.3 && tick <= high * 1.3);
  const fine = within(powers.flatMap((power) => [1, 2, 5].map((digit) => Number(`${digit}e${power}`))));
  let ticks = fine;
  if (fine.length > most) {
    const every = Math.max(1, Math.ceil((Math.log10(high / low) + 1) / most));
    ticks = within(powers.filter((power) => power % every === 0).map((power) => Number(`1e${power}`)));
  } else if (fine.length < 3 && high > low) {
    const unit = 10 ** Math.floor(Math.log10((high - low) / 2));
    const step = unit * [1, 2, 5, 10].find((factor) => (high - low) / (unit * factor) <= 4);
    ticks = range(12).map((i) => Number(((Math.floor(low / step) + i) * step).toPrecision(12))).filter((tick) => tick > 0 && tick <= high + step);
  }
  const word = (tick) => (tick >= 1e4 || tick < 1e-3 ? tick.toExponential().replace("e+", "e") : String(tick));
  return ticks.length ? { tickvals: ticks, ticktext: ticks.map((tick) => (tick >= 1e3 && tick < 1e15 ? compact.format(tick).replace("K", "k") : word(tick))) } : {};
};
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

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
