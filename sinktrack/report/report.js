"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { records, model, epsilon } = data;
  const last = records[records.length - 1];
  const blocks = last.concentration.length;
  const byId = (id) => document.getElementById(id);
  const shown = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits));
  const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);
  const range = (interval, form) => (interval ? `95 %: ${form(interval[0])} to ${form(interval[1])}` : "");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  byId("title").textContent = data.title;
  const experts = model.experts ? `, ${model.experts} experts` : "";
  byId("about").textContent =
    `${model.type}, ${model.blocks} blocks of ${model.heads} head${model.heads === 1 ? "" : "s"}${experts} · ` +
    `${records.length} record${records.length === 1 ? "" : "s"}, steps ${records[0].step.toLocaleString("en")} to ` +
    `${last.step.toLocaleString("en")} · probe ${data.probe.slice(0, 12)}`;
  byId("made").textContent =
    "Made with " + Object.entries(data.versions).map(([name, version]) => `${name} ${version}`).join(", ") + ".";

  const card = (value, name, detail) => {
    const box = document.createElement("div");
    box.className = "card";
    for (const [tag, text] of [["span", name], ["b", value], ["span", detail || "\u00a0"]]) {
      box.appendChild(document.createElement(tag)).textContent = text;
    }
    byId("headline").appendChild(box);
  };
  const reference = last.reference_block;
  card(percent(last.sink_rate), "sink rate", range(last.intervals.sink_rate, percent));
  card(last.formed ? `block ${reference}` : "none", "sink starts in", last.formed ? "" : "no block has formed a sink");
  card(percent(last.first_two_share), "written by blocks 0 and 1", range(last.intervals.first_two_share, percent));
  card(shown(last.depth), "depth of the writes", range(last.intervals.depth, shown));
  card(percent(last.first_two_gain), "growth in blocks 0 and 1", range(last.intervals.first_two_gain, percent));

  const ever = records.some((record) => record.formed);
  const verdict = byId("verdict");
  if (!ever) {
    const most = Math.max(...last.concentration.filter((value) => value !== null));
    verdict.textContent = `No sink has formed in this run: no block's mean attention to P0 reaches ${epsilon} ` +
      `(the largest now is ${shown(most)}). Shares are taken at block ${reference}, where the P0 norm stands out most.`;
    verdict.classList.add("warn");
  } else if (!last.formed) {
    verdict.textContent = `No block's mean attention to P0 reaches ${epsilon} any more; it did earlier in this run.`;
    verdict.classList.add("warn");
  } else if (reference === 0) {
    verdict.textContent = "The sink stands in block 0: it precedes any write, so there is nothing to localize.";
  } else if (reference <= 2) {
    verdict.textContent = `The sink starts in block ${reference}, so all writes before it lie in the first two blocks by ` +
      "construction: read the share of blocks 0 and 1 together with the block it is judged at.";
  } else {
    verdict.textContent = `The sink starts in block ${reference}.`;
  }

  if (!records.every((record) => record.tokens !== null)) byId("tokens").remove();

  const palette = () => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    return { ink: of("--ink"), muted: of("--muted"), line: of("--line"), accent: of("--accent") };
  };
  const depthColour = (block) => {
    const t = blocks > 1 ? block / (blocks - 1) : 0;
    const light = dark.matches ? 72 - 12 * t : 62 - 26 * t;
    return `hsl(${48 + 232 * t}, 68%, ${light}%)`;
  };
  const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
  const xs = () => records.map((record) => record[chosen("x")]);
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  const layout = (extra = {}) => {
    const { ink, muted, line } = palette();
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: { color: muted } };
    const title = chosen("x") === "step" ? "optimizer step" : "tokens";
    const { xaxis = {}, yaxis = {}, ...rest } = extra;
    return {
      margin: { l: 55, r: 15, t: 15, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: ink }, hovermode: "closest",
      xaxis: { ...axis, title: { text: title, font: { color: muted } }, type: chosen("scale"), ...xaxis },
      yaxis: { ...axis, ...yaxis }, legend: { orientation: "h", y: 1.12, x: 0 }, ...rest,
    };
  };
  const band = (x, name, axes = {}) => {
    const known = records.map((record, i) => [x[i], record.intervals[name]]).filter((pair) => pair[1]);
    const there = known.map((pair) => pair[0]);
    return {
      x: [...there, ...there.slice().reverse()],
      y: [...known.map((pair) => pair[1][0]), ...known.map((pair) => pair[1][1]).reverse()],
      fill: "toself", line: { width: 0 }, opacity: 0.25, hoverinfo: "skip", showlegend: false, type: "scatter",
      mode: "lines", ...axes,
    };
  };
  const curve = (x, y, name, extra = {}) => ({
    x, y, name, type: "scatter", mode: records.length < 60 ? "lines+markers" : "lines",
    marker: { size: 5 }, connectgaps: false, ...extra,
  });

  const drawCurves = () => {
    const { accent } = palette();
    const x = xs();
    const colour = { line: { color: accent, width: 2 }, marker: { color: accent, size: 5 } };
    Plotly.react("sink_rate", [
      { ...band(x, "sink_rate"), fillcolor: accent },
      curve(x, records.map((record) => record.sink_rate), "sink rate", { ...colour, showlegend: false }),
    ], layout({ yaxis: { range: [-0.02, 1.02], tickformat: ".0%" } }), config);

    const numbers = [...Array(blocks).keys()];
    Plotly.react("concentration", [{
      type: "heatmap", x, y: numbers, z: numbers.map((block) => records.map((record) => record.concentration[block])),
      zmin: 0, zmax: 1, hoverongaps: false, colorbar: { thickness: 10, outlinewidth: 0, len: 0.95 },
      colorscale: dark.matches
        ? [[0, "#1b2130"], [0.3, "#2f5ca8"], [0.6, "#5fb3c8"], [1, "#fdf3c0"]]
        : [[0, "#f4f6fb"], [0.3, "#9cc3e8"], [0.6, "#3b7cc4"], [1, "#122b63"]],
      hovertemplate: "%{x}, block %{y}: %{z:.3f}<extra></extra>",
    }], layout({ yaxis: { title: { text: "block" }, dtick: blocks <= 12 ? 1 : undefined, autorange: "reversed" } }), config);

    Plotly.react("norm_ratio", numbers.map((block) =>
      curve(x, records.map((record) => record.norm_ratio[block]), `block ${block}`, {
        line: { color: depthColour(block), width: 2 }, marker: { color: depthColour(block), size: 4 },
        showlegend: blocks <= 12,
      })), layout({ yaxis: { type: "log", tickformat: "~g", dtick: "D2" } }), config);

    const second = { yaxis: "y2" }, third = { yaxis: "y3" };
    const { muted, line } = palette();
    const small = { gridcolor: line, zerolinecolor: line, tickfont: { color: muted }, rangemode: "tozero" };
    const tone = (c) => ({ line: { color: c, width: 2 }, marker: { color: c, size: 5 } });
    Plotly.react("localization", [
      { ...band(x, "first_two_share"), fillcolor: accent },
      curve(x, records.map((record) => record.first_two_share), "share of blocks 0 and 1", tone(accent)),
      { ...band(x, "depth", second), fillcolor: "#c96f2b" },
      curve(x, records.map((record) => record.depth), "depth (blocks)", { ...second, ...tone("#c96f2b") }),
      curve(x, records.map((record) => record.reference_block), "reference block",
        { ...third, line: { color: muted, width: 2, shape: "hv" }, marker: { color: muted, size: 5,
          symbol: records.map((record) => (record.formed ? "circle" : "circle-open")) } }),
    ], layout({
      yaxis: { ...small, domain: [0.7, 1], tickformat: ".0%" },
      yaxis2: { ...small, domain: [0.36, 0.62] },
      yaxis3: { ...small, domain: [0, 0.28], dtick: blocks <= 6 ? 1 : undefined },
      xaxis: { anchor: "y3" },
    }), config);
  };

  const slider = byId("record");
  slider.max = records.length - 1;
  slider.value = records.length - 1;
  const nameOf = (part) =>
    (part.block === null ? "" : `block ${part.block} `) + part.kind.replaceAll("_", " ");
  const drawShares = () => {
    const record = records[Number(slider.value)];
    const { accent } = palette();
    byId("chosen").textContent = `step ${record.step.toLocaleString("en")}, at block ${record.reference_block}` +
      (record.formed ? "" : " (no sink)");
    slider.setAttribute("aria-valuetext", byId("chosen").textContent);
    let parts = record.shares.slice();
    if (parts.length > 24) parts = parts.sort((a, b) => Math.abs(b.share) - Math.abs(a.share)).slice(0, 24);
    Plotly.react("shares", [{
      type: "bar", orientation: "h", y: parts.map(nameOf), x: parts.map((part) => part.share),
      marker: { color: parts.map((part) => (part.block === null ? "#8a93a6" : depthColour(part.block))) },
      hovertemplate: "%{y}: %{x:.1%}<extra></extra>",
    }], layout({
      xaxis: { type: "linear", tickformat: ".0%", title: { text: `share (sum ${record.share_sum.toFixed(4)})` } },
      yaxis: { autorange: "reversed", automargin: true },
      height: Math.max(220, 90 + 26 * parts.length),
    }), config);
    const body = byId("components").tBodies[0];
    body.replaceChildren();
    for (const part of record.top_components) {
      const row = body.insertRow();
      const cells = [part.kind.replaceAll("_", " "), part.block ?? "", part.index ?? "", percent(part.share),
        part.gate === undefined ? "" : shown(part.gate)];
      for (const text of cells) row.insertCell().textContent = text;
    }
  };

  const draw = () => { drawCurves(); drawShares(); };
  slider.addEventListener("input", drawShares);
  byId("axis").addEventListener("change", drawCurves);
  byId("axis").addEventListener("submit", (event) => event.preventDefault());
  dark.addEventListener("change", draw);
  draw();
})();
