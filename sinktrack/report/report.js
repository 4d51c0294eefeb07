"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { records, model, epsilon } = data;
  const last = records.at(-1);
  const blocks = model.blocks;
  const LARGEST = 16;

  const $ = (id) => document.getElementById(id);
  const range = (count) => [...Array(count).keys()];
  const count = (value) => value.toLocaleString("en");
  const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
  const fixed = (value) => (value === null ? "–" : value.toFixed(2));
  const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1).replace(/^-(0\.0)$/, "$1")} %`);
  const words = (kind) => kind.replaceAll("_", " ");
  const element = (tag, text, parent, className = "") => {
    const made = parent.appendChild(document.createElement(tag));
    made.textContent = text;
    made.className = className;
    return made;
  };

  const describe = () => {
    const facts = {
      model: model.type,
      size: [plural(model.blocks, "block"), plural(model.heads, "head"), model.experts && plural(model.experts, "expert")]
        .filter(Boolean).join(", "),
      steps: records.length > 1 ? `${count(records[0].step)} to ${count(last.step)}` : count(last.step),
      records: count(records.length),
      probe: data.probe.slice(0, 12),
    };
    for (const [name, value] of Object.entries(facts)) {
      const pair = element("div", "", $("facts"));
      element("dt", name, pair);
      element("dd", value, pair);
    }
    const card = (name, value, note) => {
      const box = element("div", "", $("cards"), "card");
      element("p", name, box);
      element("p", value, box, "value");
      element("p", note, box);
    };
    const measured = (name, field, none) => {
      const interval = last.intervals[field];
      const note = interval ? `95 %: ${percent(interval[0])} to ${percent(interval[1])}` : "no interval";
      card(name, percent(last[field]), last[field] === null ? none : note);
    };
    const reference = last.reference_block;
    measured("Sink rate", "sink_rate", "no block has softmax attention");
    card("Reference block", last.formed ? `block ${reference}` : "none",
      last.formed ? "the first with a sink" : "no block has formed a sink");
    measured("First-two share", "first_two_share", "the sink precedes any write");
    measured("First-two gain", "first_two_gain", "P0's norm has not doubled");

    const ever = records.some((record) => record.formed);
    const most = Math.max(0, ...last.concentration);
    const judged = `Shares are taken at block ${reference}, where the norm of P0 stands out most.`;
    const [finding, note] = !ever
      ? [`No sink has formed in this run: no block's concentration reaches ${epsilon} (largest now: ${fixed(most)}).`, judged]
      : !last.formed
        ? [`In the last record no block's concentration reaches ${epsilon} any more (largest: ${fixed(most)}).`, judged]
        : reference === 0
          ? ["The sink stands in block 0: it precedes any write.", "So no block has a share in it."]
          : [`The sink starts in block ${reference}.`, reference > 2 ? "" :
            "All writes before it lie in the first two blocks by construction: read the first-two share beside the reference block."];
    element("b", finding, $("verdict"));
    $("verdict").append(" ", note);
    $("verdict").parentElement.classList.toggle("warn", !last.formed);
    $("versions").textContent = Object.entries(data.versions).map((pair) => pair.join(" ")).join(", ") + ".";
    for (const place of document.querySelectorAll(".epsilon")) place.textContent = epsilon;
  };

  // Printing is always light, whatever the screen is.
  const dark = window.matchMedia("screen and (prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const scaleOf = (stops) => stops.map((stop, i) => [i / (stops.length - 1), stop]);
  const depths = () => dark.matches
    ? ["#8c9bff", "#c07cf0", "#f2719f", "#ff9b62", "#ffd96b"]
    : ["#20307c", "#6d2a93", "#b8336f", "#e0632f", "#eba52a"];
  const heats = () => dark.matches
    ? ["#1b2233", "#28487f", "#3a80b8", "#78c4c9", "#f6f3c4"]
    : ["#f3f7fd", "#b9d6f0", "#6aa6da", "#2b67b0", "#0f2a63"];
  const depthColour = (block) => {
    const stops = depths();
    const place = (Math.min(block, blocks) / Math.max(1, blocks)) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    const channel = (stop, i) => parseInt(stop.slice(1 + 2 * i, 3 + 2 * i), 16);
    const mix = (i) => Math.round(channel(stops[low], i) + (place - low) * (channel(stops[low + 1], i) - channel(stops[low], i)));
    return `rgb(${range(3).map(mix)})`;
  };

  const chosen = (name) => new FormData($("axis")).get(name);
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

  const drawCurves = () => {
    const field = chosen("x") ?? "step";
    const scale = chosen("scale");
    const drawn = scale === "log" ? records.filter((record) => record[field] > 0) : records;
    const absent = records.length - drawn.length;
    $("left_out").textContent = absent ? `${plural(absent, "record")} at ${field === "step" ? "step" : "token"} 0 left out` : "";
    const x = drawn.map((record) => record[field]);
    const xAxis = (extra = {}) => axis({
      title: field === "step" ? "optimizer steps" : "tokens", type: scale, ...extra,
      ...(drawn.length === 1 ? { tickvals: x, ticktext: [count(x[0])] } : {}),
    });
    const mode = drawn.length > 60 ? "lines" : "lines+markers";
    const curve = (name, value, tone, extra = {}) => ({
      x, y: drawn.map(value), name, type: "scatter", mode, connectgaps: false,
      line: { color: tone, width: 2 }, marker: { color: tone, size: 5 }, ...extra,
    });
    // One polygon for each stretch of records that have an interval.
    const band = (name, tone, extra = {}) => {
      const stretches = [[]];
      drawn.forEach((record, i) => {
        const interval = record.intervals[name];
        if (interval) stretches.at(-1).push([x[i], ...interval]);
        else stretches.push([]);
      });
      const corners = stretches.filter((points) => points.length).flatMap((points) => [
        ...points.map(([at, low]) => [at, low]), ...points.toReversed().map(([at, , high]) => [at, high]),
        points[0].slice(0, 2), [null, null],
      ]);
      return {
        x: corners.map((corner) => corner[0]), y: corners.map((corner) => corner[1]), type: "scatter", mode: "lines",
        fill: "toself", fillcolor: tone, line: { color: tone, width: drawn.length === 1 ? 8 : 1 }, opacity: 0.2, hoverinfo: "skip", showlegend: false, ...extra,
      };
    };
    const accent = colour("accent");

    Plotly.react("sink_rate", [
      band("sink_rate", accent),
      curve("sink rate", (record) => record.sink_rate, accent, { hovertemplate: "%{x:,}: %{y:.1%}<extra></extra>" }),
    ], layout({ showlegend: false, xaxis: xAxis(), yaxis: axis({ range: [-0.02, 1.02], tickformat: ".0%" }) }), config);

    const most = records.reduce((top, record) => Math.max(top, ...record.concentration), epsilon);
    Plotly.react("concentration", [{
      type: "heatmap", x, y: range(blocks), z: range(blocks).map((block) => drawn.map((record) => record.concentration[block])),
      zmin: 0, zmax: most, hoverongaps: false, colorscale: scaleOf(heats()), colorbar: bar("concentration"),
      hovertemplate: "%{x:,}, block %{y}: %{z:.3f}<extra></extra>",
    }], layout({
      plot_bgcolor: colour("gap"), xaxis: xAxis({ showgrid: false }),
      yaxis: axis({ title: "block", showgrid: false, zeroline: false, autorange: "reversed", ...(blocks > 12 ? {} : { dtick: 1 }) }),
    }), config);

    const norms = drawn.flatMap((record) => record.norm_ratio).filter((value) => value > 0);
    const spread = norms.reduce((a, b) => Math.max(a, b), 0) / norms.reduce((a, b) => Math.min(a, b), Infinity);
    Plotly.react("norm_ratio", [
      ...range(blocks + 1).map((block) => {
        const name = block < blocks ? `block ${block}` : "output";
        return curve(name, (record) => record.norm_ratio[block], depthColour(block), {
          line: { color: depthColour(block), width: blocks > 12 ? 1.2 : 2 }, hovertemplate: `${name}, %{x:,}: %{y:.3g}<extra></extra>`,
        });
      }),
      { x: [null], y: [null], type: "scatter", mode: "markers", hoverinfo: "skip",
        marker: { color: [0], cmin: 0, cmax: blocks, colorscale: scaleOf(depths()), showscale: true,
          colorbar: { ...bar("block"), ...(blocks > 12 ? {} : { tickvals: range(blocks + 1), ticktext: [...range(blocks), "output"] }) } } },
    ], layout({
      showlegend: false, xaxis: xAxis(), yaxis: axis({ type: "log", tickformat: "~g", ...(spread > 5 ? { dtick: "D2" } : {}) }),
    }), config);

    const reference = (record) => record.reference_block;
    const [second, third] = [colour("second"), colour("third")];
    const below = { yaxis: "y2", showlegend: false };
    const lowest = { yaxis: "y3", showlegend: false, mode: "lines", hoverinfo: "skip" };
    const steps = { color: colour("muted"), width: 2, shape: "hv" };
    Plotly.react("localization", [
      band("first_two_share", accent),
      curve("first-two share", (record) => record.first_two_share, accent, { hovertemplate: "%{y:.1%}" }),
      band("first_two_gain", second),
      curve("first-two gain", (record) => record.first_two_gain, second, { hovertemplate: "%{y:.1%}" }),
      band("depth", third, below),
      curve("depth", (record) => record.depth, third, { ...below, hovertemplate: "%{y:.2f}" }),
      curve("", reference, "", { ...lowest, line: { ...steps, dash: "dot", width: 1.5 } }),
      curve("", (record) => (record.formed ? reference(record) : null), "", { ...lowest, line: steps }),
      curve("reference block", reference, "", {
        yaxis: "y3", showlegend: false, mode: "markers", hovertemplate: drawn.map((record) => (record.formed ? "%{y}" : "%{y}, no sink")),
        marker: { color: colour("muted"), size: mode === "lines" ? 0.1 : 5, symbol: drawn.map((record) => (record.formed ? "circle" : "circle-open")) },
      }),
    ], layout({
      hovermode: "x unified", xaxis: xAxis({ anchor: "y3", hoverformat: "," }),
      yaxis: axis({ title: "first-two", domain: [0.62, 1], tickformat: ".0%", rangemode: "tozero" }),
      yaxis2: axis({ title: "depth", domain: [0.31, 0.55], rangemode: "tozero", nticks: 4 }),
      yaxis3: axis({ title: "reference", domain: [0, 0.24], rangemode: "tozero", nticks: 4, tickformat: "d" }),
    }), config);
  };

  const label = (part) => (part.block === null ? "" : `block ${part.block} `) + words(part.kind);
  const largest = (shares) => {
    if (shares.length <= LARGEST) return shares;
    const least = shares.map((part) => Math.abs(part.share)).sort((a, b) => b - a)[LARGEST - 1];
    const rest = shares.filter((part) => Math.abs(part.share) < least);
    const share = rest.reduce((sum, part) => sum + part.share, 0);
    return [...shares.filter((part) => !rest.includes(part)), { kind: `the other ${rest.length}`, block: null, share }];
  };

  const drawShares = () => {
    const slider = $("record");
    const record = records[Number(slider.value)];
    const block = record.reference_block;
    $("chosen").textContent = `step ${count(record.step)}`;
    slider.setAttribute("aria-valuetext", $("chosen").textContent);
    $("reference").textContent = !record.formed
      ? `No block's concentration reaches ${epsilon} here; judged at block ${block}, where the norm of P0 stands out most.`
      : block === 0
        ? "The sink stands in block 0: it precedes any write, so the embedding is all there is."
        : `Judged at block ${block}, the first with a sink.` + (block > 2 ? "" : " All block shares lie in the first two blocks by construction.");

    const parts = largest(record.shares);
    const shares = parts.map((part) => part.share);
    const [low, high] = [Math.min(0, ...shares), Math.max(1, ...shares)];
    const room = 0.12 * (high - low);
    const slots = Math.max(parts.length, 4);
    Plotly.react("shares", [{
      type: "bar", orientation: "h", x: shares, y: parts.map(label), text: shares.map(percent), textposition: "outside", cliponaxis: false,
      textfont: { color: colour("muted") }, hovertemplate: "%{y}: %{x:.2%}<extra></extra>",
      marker: { color: parts.map((part) => (part.block === null ? colour("muted") : depthColour(part.block))) },
    }], layout({
      height: 60 + 26 * slots, showlegend: false, bargap: 0.25,
      xaxis: axis({ title: "share", tickformat: ".0%", range: [low - (low < 0 ? room : 0), high + room] }),
      yaxis: axis({ range: [slots - 0.5, -0.5], showgrid: false }),
    }), config);

    const rows = record.top_components.map((part) => {
      const row = document.createElement("tr");
      const gate = part.gate === undefined ? "" : fixed(part.gate);
      for (const text of [words(part.kind), part.block ?? "", part.index ?? "", percent(part.share), gate]) element("td", text, row);
      return row;
    });
    $("components").tBodies[0].replaceChildren(...rows);
  };

  describe();
  if (records.some((record) => record.tokens === null)) $("over").remove();
  document.querySelector("input[value=log]").disabled = !records.some((record) => record.step > 0);
  $("record").max = records.length - 1;
  $("record").value = records.length - 1;
  $("record").addEventListener("input", drawShares);
  $("axis").addEventListener("change", drawCurves);
  const draw = () => { drawCurves(); drawShares(); };
  dark.addEventListener("change", draw);
  draw();
})();
